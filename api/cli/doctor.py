"""`dfusion doctor`: diagnoses the service and this machine, and suggests fixes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import typer
from rich.console import RenderableType

from api.cli.screens import listing, size, styled_state
from api.cli.session import ERROR, Session
from api.client import ApiError, Client, UnauthorizedError, UnreachableError
from api.wire.health import CheckOut, CheckState
from service.catalogue import Catalogue
from service.errors import StartError
from service.settings import Settings

_LITTLE_BYTES = 5_000_000_000
_TORCH_SECONDS = 120
_ASK_TORCH = """
import importlib.util, json
found = {"installed": importlib.util.find_spec("torch") is not None}
if found["installed"]:
    import torch
    found["version"] = torch.__version__
    found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(json.dumps(found))
"""


def doctor(ctx: typer.Context) -> None:
    """Check the service (reachable, ready, files) and this machine (disk, torch, GPU, model files).

    Each line is ok, a warning, or wrong, with a suggested fix. Exit code 1 if anything is wrong.

    Example: dfusion doctor --url http://gpu-box:8000
    """
    session: Session = ctx.obj
    checks = [*_service(session), *_machine()]
    session.answer({"data": [check.model_dump() for check in checks]}, lambda: _screen(checks))
    if any(check.state == "wrong" for check in checks):
        raise typer.Exit(ERROR)


def _screen(checks: list[CheckOut]) -> RenderableType:
    return listing(("check", "", "found"), ((one.name, styled_state(one.state), one.detail) for one in checks))


def _service(session: Session) -> Iterator[CheckOut]:
    try:
        with session.client() as client:
            yield _reachable(client)
            yield from (_named(f"service: {check.name}", check) for check in client.ready().checks)
            yield _key(client)
            yield _artifact(client)
    except UnreachableError as error:
        fix = "start it with `make serve` or `python -m api`, or say where it is with --url or DFUSION_URL"
        yield _check("service", "wrong", f"{error.detail}; {fix}")
    except ApiError as error:
        yield _check("service", "wrong", error.detail)


def _check(name: str, state: CheckState, detail: str) -> CheckOut:
    return CheckOut(name=name, state=state, detail=detail)


def _named(name: str, check: CheckOut) -> CheckOut:
    return check.model_copy(update={"name": name})


def _reachable(client: Client) -> CheckOut:
    client.health()
    there, here = client.version(), _own_version()
    if there != here:
        detail = f"{client.base_url} is of version {there}, this command line of {here}: install the same"
        return _check("service", "warning", detail)
    return _check("service", "ok", f"{client.base_url} answers, version {there}")


def _own_version() -> str:
    try:
        return version("dfusion")
    except PackageNotFoundError:
        return "0"


def _key(client: Client) -> CheckOut:
    try:
        client.jobs_page(1)
    except UnauthorizedError as error:
        return _check("access", "wrong", f"{error.detail}; give a key with --api-key or DFUSION_API_KEY")
    return _check("access", "ok", "jobs can be read")


def _artifact(client: Client) -> CheckOut:
    """One file through whatever clients fetch files through, the service or the storage's public address."""
    name = "files"
    try:
        samples = client.samples_page(1).data
        if not samples:
            return _check(name, "ok", "nothing was made yet that could be fetched")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "image"
            client.download(samples[0].image, file)
            return _check(name, "ok", f"{samples[0].image}: {size(file.stat().st_size)}, SHA-256 as stored")
    except ApiError as error:
        return _check(name, "wrong", f"{error.detail}; look at DFUSION_S3_PUBLIC_ENDPOINT and the service's log")


def _machine() -> Iterator[CheckOut]:
    try:
        settings = Settings.read()
    except StartError as error:
        yield _check("here: settings", "wrong", str(error))
        return
    yield _disk(settings.data_dir)
    yield torch_check(sys.executable)
    yield from (_model(name, model.source) for name, model in Catalogue.of(settings).models.items())


def _disk(folder: Path) -> CheckOut:
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < _LITTLE_BYTES:
        return _check("here: disk", "warning", f"{size(free)} free at {place}: make room, or move DFUSION_DATA_DIR")
    return _check("here: disk", "ok", f"{size(free)} free at {place}")


def torch_check(python: str) -> CheckOut:
    """torch and GPUs, in a process of its own: this one must stay small and start at once."""
    name = "here: torch"
    try:
        probe = subprocess.run(
            [python, "-c", _ASK_TORCH], capture_output=True, text=True, timeout=_TORCH_SECONDS, check=True
        )
        found = json.loads(probe.stdout.splitlines()[-1])
    except subprocess.CalledProcessError as error:
        why = (error.stderr.strip().splitlines() or ["no message"])[-1]
        return _check(name, "wrong", f"torch cannot be imported ({why}): install it again for this machine")
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired) as error:
        return _check(name, "warning", f"nothing could be found out about torch: {error}")
    if not found["installed"]:
        return _check(name, "ok", "not installed: this machine can be a client, not a worker")
    if not found["gpus"]:
        return _check(name, "warning", f"{found['version']}, no GPU: enough for the shapes world, slow for others")
    return _check(name, "ok", f"{found['version']}, {', '.join(found['gpus'])}")


def _model(name: str, source: str) -> CheckOut:
    """Whether a worker on this machine would find the model's files."""
    from dfusion.sources import HUB_MODELS  # only here: the hub's client takes longer to import than all others

    what = f"here: model {name}"
    if Path(source).is_dir():
        if (Path(source) / "model_index.json").is_file():
            return _check(what, "ok", source)
        return _check(what, "wrong", f"{source} holds no model_index.json: name a diffusers folder in DFUSION_MODELS")
    if source in HUB_MODELS or ("@" in source and source.count("/") == 1):
        return _check(what, "ok", f"{source}, from the model hub when it is first used")
    hint = "name a diffusers folder, one of " + ", ".join(HUB_MODELS) + ", or owner/name@revision in DFUSION_MODELS"
    return _check(what, "wrong", f"there is no folder {source}: {hint}")
