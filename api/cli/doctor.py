"""`dfusion doctor`: diagnoses the service and this machine, and suggests fixes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType

from api.cli.model_check import check_model, summary
from api.cli.screens import listing, size, styled_state
from api.cli.session import ERROR, Session
from api.client import ApiError, UnauthorizedError, UnreachableError
from api.wire.health import CheckOut, CheckState
from dfusion.errors import ModelNotFoundError
from service.errors import StartError

if TYPE_CHECKING:
    from api.client import Client

_MIN_FREE_BYTES = 5_000_000_000
_TORCH_SECONDS = 120
_TORCH_PROBE = """
import gc, importlib.util, json
gc.disable()  # it would scan the objects of torch many times while they are imported
facts = {"installed": importlib.util.find_spec("torch") is not None}
if facts["installed"]:
    import torch
    facts["version"] = torch.__version__
    facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(json.dumps(facts))
"""


def doctor(
    ctx: typer.Context,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", metavar="MODEL", help="Also load this model and sample an image; repeatable"),
    ] = None,
) -> None:
    """Check the service (reachable, ready, files) and this machine (disk, torch, GPU, model files).

    Each check is ok, a warning or failed, with a suggested fix. Exit code 1 if a check has failed.

    Examples:
      dfusion doctor --url http://gpu-box:8000
      dfusion doctor --model shapes
    """
    session: Session = ctx.obj
    checks = [*_service_checks(session), *_machine_checks(), *map(_sampled_model, model or [])]
    session.show({"data": [check.model_dump() for check in checks]}, lambda: _screen(checks))
    if any(check.state == "failed" for check in checks):
        raise typer.Exit(ERROR)


def _screen(checks: list[CheckOut]) -> RenderableType:
    rows = [(check.name, styled_state(check.state), check.detail) for check in checks]
    return listing(("check", "", "details"), rows)


def _service_checks(session: Session) -> Iterator[CheckOut]:
    try:
        with session.client() as client:
            yield _reachability(client)
            for check in client.ready().checks:
                yield check.model_copy(update={"name": f"service: {check.name}"})
            yield _access(client)
            yield _download(client)
    except UnreachableError as error:
        fix = "start it with `make serve` or `python -m api`, or set its address with --url or DFUSION_URL"
        yield _check("service", "failed", f"{error.detail}; {fix}")
    except ApiError as error:
        yield _check("service", "failed", error.detail)


def _check(name: str, state: CheckState, detail: str) -> CheckOut:
    return CheckOut(name=name, state=state, detail=detail)


def _reachability(client: Client) -> CheckOut:
    client.health()
    service_version = client.version()
    cli_version = _installed_version()
    if service_version != cli_version:
        detail = (
            f"{client.base_url} has version {service_version}, this command line has {cli_version}: "
            "install the same version"
        )
        return _check("service", "warning", detail)
    return _check("service", "ok", f"{client.base_url} is reachable, version {service_version}")


def _installed_version() -> str:
    try:
        return version("dfusion")
    except PackageNotFoundError:
        return "0"


def _access(client: Client) -> CheckOut:
    try:
        client.jobs_page(1)
    except UnauthorizedError as error:
        return _check("access", "failed", f"{error.detail}; set a key with --api-key or DFUSION_API_KEY")
    return _check("access", "ok", "the key can read jobs")


def _download(client: Client) -> CheckOut:
    """Download one file as any client does: from the service or from the storage's public address."""
    name = "files"
    try:
        samples = client.samples_page(1).data
        if not samples:
            return _check(name, "ok", "no samples yet, so there is no file to download")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "image"
            client.download(samples[0].image, file)
            return _check(name, "ok", f"{samples[0].image}: {size(file.stat().st_size)}, SHA-256 as stored")
    except ApiError as error:
        return _check(name, "failed", f"{error.detail}; check DFUSION_S3_PUBLIC_ENDPOINT and the service's log")


def _machine_checks() -> Iterator[CheckOut]:
    from service.catalogue import Catalogue
    from service.settings import Settings

    try:
        settings = Settings.read()
        catalogue = Catalogue.of(settings)
    except StartError as error:
        yield _check("here: settings", "failed", str(error))
        return
    yield _disk(settings.data_dir)
    yield torch_check(sys.executable)
    for name, model in catalogue.models.items():
        yield _model_files(name, model.source)
        if model.adapter is not None:
            yield _adapter(name, model.adapter, catalogue.adapter_problem(name))


def _adapter(name: str, file: Path, problem: str | None) -> CheckOut:
    """Check that a worker on this machine can load the model's own adapter."""
    what = f"here: adapter of {name}"
    if not os.path.exists(file):  # False for names that the file system refuses
        return _check(what, "failed", f"{file} does not exist: set a file or folder of this machine in DFUSION_MODELS")
    if problem is not None:
        return _check(what, "failed", f"{problem}: set another adapter in DFUSION_MODELS")
    return _check(what, "ok", str(file))


def _disk(folder: Path) -> CheckOut:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    detail = f"{size(free)} free at {existing}"
    if free < _MIN_FREE_BYTES:
        return _check("here: disk", "warning", f"{detail}: free some space or move DFUSION_DATA_DIR")
    return _check("here: disk", "ok", detail)


def torch_check(python: str) -> CheckOut:
    """Check torch and the GPUs in a subprocess, so that the command line starts without torch."""
    name = "here: torch"
    try:
        probe = subprocess.run(
            [python, "-c", _TORCH_PROBE], capture_output=True, text=True, timeout=_TORCH_SECONDS, check=True
        )
        facts = json.loads(probe.stdout.splitlines()[-1])
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["no message"])[-1]
        return _check(name, "failed", f"torch cannot be imported ({reason}): reinstall torch for this machine")
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired) as error:
        return _check(name, "warning", f"the check for torch did not run: {error}")

    if not facts["installed"]:
        return _check(name, "ok", "not installed: this machine can be a client but not a worker")
    if not facts["gpus"]:
        return _check(name, "warning", f"{facts['version']}, no GPU: fast enough only for the shapes world")
    return _check(name, "ok", f"{facts['version']}, {', '.join(facts['gpus'])}")


def _sampled_model(name: str) -> CheckOut:
    """Load a model and sample an image, which is not kept."""
    what = f"here: image of {name}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = check_model(name, Path(folder) / "image.png", {})
        except ApiError as error:
            return _check(what, "failed", error.detail)
    return _check(what, "ok", summary(report))


def _model_files(name: str, source: str) -> CheckOut:
    """Check that a worker on this machine can find the model's files, and can run the model."""
    from dfusion.model_files import check_files
    from dfusion.sources import HUB_MODELS, find_local

    what = f"here: model {name}"
    folder = find_local(source)
    if folder is not None:
        try:
            files = check_files(folder)
        except ModelNotFoundError as error:
            return _check(what, "failed", f"{error}; set a model that can be run in DFUSION_MODELS")
        return _check(what, "ok", "; ".join([f"{source}: {files.layout}", *files.notes]))

    if source in HUB_MODELS or ("@" in source and source.count("/") == 1):
        return _check(what, "ok", f"{source}, downloaded from the model hub at first use")

    hint = "set a diffusers folder, one of " + ", ".join(HUB_MODELS) + ", or owner/name@revision in DFUSION_MODELS"
    return _check(what, "failed", f"folder {source} does not exist: {hint}")
