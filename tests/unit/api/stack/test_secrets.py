import stat
from pathlib import Path

from api.stack.secrets import Secrets


def test_secrets_are_created_once_per_folder_and_readable_only_by_the_owner(tmp_path: Path) -> None:
    secrets = Secrets.of(tmp_path)
    assert Secrets.of(tmp_path) == secrets
    assert stat.S_IMODE((tmp_path / "secrets.json").stat().st_mode) == 0o600
    assert len({secrets.postgres_password, secrets.redis_password, secrets.s3_access_key, secrets.s3_secret_key}) == 4
    assert secrets.redis_password not in repr(secrets)
