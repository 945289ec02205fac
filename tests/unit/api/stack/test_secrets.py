import stat
from pathlib import Path

from api.stack.secrets import Secrets


def test_they_are_made_once_for_a_folder_and_for_its_owner_alone(tmp_path: Path) -> None:
    made = Secrets.of(tmp_path)
    assert Secrets.of(tmp_path) == made
    assert stat.S_IMODE((tmp_path / "secrets.json").stat().st_mode) == 0o600
    assert len({made.postgres_password, made.redis_password, made.s3_access_key, made.s3_secret_key}) == 4
    assert made.redis_password not in repr(made)
