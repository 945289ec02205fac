import pytest

from service.errors import StorageError
from service.storage import object_key, stage_of_key

SHA256 = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"


@pytest.mark.parametrize("part", ["", "..", "a..b", "/", "a/b", "A", ".hidden", "a\0", "x" * 101])
def test_keys_consist_of_plain_names(part: str) -> None:
    with pytest.raises(StorageError, match="expected a plain name as part of a key"):
        object_key("job_1", part, "image", SHA256)


def test_a_key_names_its_stage() -> None:
    assert stage_of_key(object_key("job_1", "stg_1", "image", SHA256)) == "stg_1"
    assert stage_of_key("jobs/job_1/stg_1/image/.part-x") == "stg_1"
    assert stage_of_key("jobs/job_1/stg_1") is None
    assert stage_of_key("other/job_1/stg_1/image/x") is None
