"""Marks for tests of extras that the environment of `make test` leaves out."""

from importlib.util import find_spec

import pytest

NEEDS_BITSANDBYTES = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="pip install '.[bitsandbytes]'")
"""peft imports it wherever it is installed, which takes 2.8 s for each process of the tests."""
