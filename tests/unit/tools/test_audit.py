"""`make check` without a network. With one it runs pip-audit itself."""

import pytest

from tests.servers import free_port
from tools import audit


def test_without_a_network_it_says_so_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{free_port()}")
    assert audit.main() == 0
    assert capsys.readouterr().out.startswith("pip-audit: left out, because https://api.osv.dev/v1/query cannot be")
