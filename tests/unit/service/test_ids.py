import re

import pytest

from service.errors import NotFoundError
from service.ids import IdKind, expect, kind_of, new_id


def test_ids_sort_by_creation() -> None:
    ids = [new_id(IdKind.SAMPLE) for _ in range(1000)]
    assert ids == sorted(ids)
    assert len(set(ids)) == 1000


def test_an_id_has_the_prefix_of_its_kind() -> None:
    pair_id = new_id(IdKind.PAIR)
    assert pair_id.startswith("pair_")
    assert kind_of(pair_id) is IdKind.PAIR
    assert expect(IdKind.PAIR, pair_id) == pair_id

    message = f"expected job id of the form job_…, got '{pair_id}'"
    with pytest.raises(NotFoundError, match=re.escape(message)):
        expect(IdKind.JOB, pair_id)


@pytest.mark.parametrize("text", ["", "job", "job_", "JOB_" + "0" * 26, "job_" + "0" * 25, "job_" + "0" * 26 + "\n"])
def test_other_strings_are_not_ids(text: str) -> None:
    assert kind_of(text) is None
