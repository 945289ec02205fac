"""The fault suite: rounds of faults in real processes, with the invariants checked after each (docs/reliability.md).

`python -m tests.faults` runs the rounds that are not recorded yet; `make test` runs a selection.
"""
