"""Client downloads that the service redirects to S3."""

import hashlib
from pathlib import Path

import pytest

from api.client import Client, DownloadError
from api.main import create_app
from tests.live_service import serving
from tests.proxy import proxy
from tests.servers import S3Server
from tests.service import PROMPTS, settings_for, work_until_idle


def test_files_come_from_the_storage_and_are_checked_by_what_the_service_says(
    tmp_path: Path, pipeline: Path, s3: S3Server
) -> None:
    passed: list[bytes] = []
    spoil = [b"", b""]

    def responses(piece: bytes) -> bytes:
        passed.append(piece)
        return piece.replace(*spoil) if spoil[0] else piece

    with proxy(s3.port, responses=responses) as port:
        public = f"http://127.0.0.1:{port}"
        settings = settings_for(tmp_path / "data", pipeline, **s3.settings("client"), s3_public_endpoint=public)
        app = create_app(settings)
        with (
            serving(app) as service_port,
            Client(f"http://127.0.0.1:{service_port}", "dfk_1", trust_env=False) as client,
        ):
            job = client.start_sampling(
                {"model": "tiny", "prompts": PROMPTS[:1], "samples_per_prompt": 1, "scorers": ["constant"]}
            )
            work_until_idle(app.state.service)
            image = next(client.samples(job=job.id)).image
            digest = client.download(image, tmp_path / "image.png")
            content = (tmp_path / "image.png").read_bytes()
            assert (digest, content[:4]) == (hashlib.sha256(content).hexdigest(), b"\x89PNG")
            assert content in b"".join(passed)
            spoil[:] = content[-30:], bytes(30)
            with pytest.raises(DownloadError):
                client.download(image, tmp_path / "other.png")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["data", "image.png"]
