"""The table of `make test-mutations` matches the source. These tests do not apply the mutations."""

import pytest

from tests.mutations import MUTATIONS, Mutation, MutationError

MUTATION = Mutation("a name", "tests/mutations.py", "ROOT = Path", "ROOT = str", ("tests/x.py::test_x",))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_source_and_the_tests_are_there(mutation: Mutation) -> None:
    mutation.check()
    assert mutation.tests and mutation.mutant != mutation.source


@pytest.mark.parametrize(("text", "times"), [("ROOT = 1", 0), ("ROOT = Path, ROOT = Path", 2)])
def test_text_that_is_not_there_once_is_named(text: str, times: int) -> None:
    with pytest.raises(MutationError, match=rf"'ROOT = Path' once in tests/mutations.py, got it {times} times"):
        MUTATION.mutated(text)
    assert MUTATION.mutated("ROOT = Path(1)") == "ROOT = str(1)"


def test_a_test_that_is_not_there_is_named() -> None:
    with pytest.raises(MutationError, match=r"expected the test tests/x\.py::test_x, got none"):
        MUTATION.check()
