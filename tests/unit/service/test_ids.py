import pytest

from service.errors import NotFoundError
from service.ids import IdKind, expect, kind_of, new_id


def test_ids_sort_in_the_order_they_were_made() -> None:
    made = [new_id(IdKind.SAMPLE) for _ in range(1000)]
    assert made == sorted(made)
    assert len(set(made)) == 1000


def test_an_id_says_what_it_is_of() -> None:
    made = new_id(IdKind.PAIR)
    assert made.startswith("pair_")
    assert kind_of(made) is IdKind.PAIR
    assert expect(IdKind.PAIR, made) == made
    with pytest.raises(NotFoundError, match="the id of a pair; expected that of a job"):
        expect(IdKind.JOB, made)


@pytest.mark.parametrize("text", ["", "job", "job_", "JOB_" + "0" * 26, "job_" + "0" * 25, "job_" + "0" * 26 + "\n"])
def test_other_texts_are_no_ids(text: str) -> None:
    assert kind_of(text) is None
