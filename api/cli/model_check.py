"""The check of a model on this machine, in another process, so that the command line starts without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from api.cli.screens import sheet, size, yes_or_no
from api.client import ApiError
from service.errors import StartError

_SECONDS = 3600


def check_model(model: str, image: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Run `dfusion.model_report` for a model of this installation, a folder, or a name on the hub.

    Args:
        model: A name of DFUSION_MODELS gives its source, adapter and precision.
        image: The file of the sampled image.
        options: Of `dfusion.model_report.check_model`; None leaves the default.

    Returns:
        The report.

    Raises:
        ApiError: The model cannot be run. The message names the cause.
    """
    given = {name: value for name, value in options.items() if value is not None}
    arguments = {"device": "auto", **_installed(model), **given, "image": str(image)}
    command = [sys.executable, "-m", "dfusion.model_report", json.dumps(arguments)]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
        result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired as error:
        raise ApiError(f"the check of {model} did not finish within {_SECONDS} s", code="model") from error
    except (ValueError, IndexError) as error:
        reason = (process.stderr.strip().splitlines() or ["no message"])[-1]
        raise ApiError(f"the check of {model} exited with code {process.returncode}: {reason}", code="model") from error

    if "error" in result:
        raise ApiError(result["error"]["message"], code="model")
    return result


def _installed(model: str) -> dict[str, Any]:
    """The source, adapter and precision of a model: those of the settings, if it is named there."""
    from service.catalogue import Catalogue
    from service.settings import Settings

    try:
        entry = Catalogue.of(Settings.read()).models.get(model)
    except StartError as error:
        raise ApiError(str(error), code="settings") from error
    if entry is None:
        return {"model": model}
    adapter = None if entry.adapter is None else str(entry.adapter)
    return {"model": entry.source, "adapter": adapter, "dtype": entry.dtype, "vae_dtype": entry.vae_dtype}


def report_sheet(report: Mapping[str, Any]) -> RenderableType:
    """Render a report."""
    parameters = ", ".join(f"{part} {count / 1e6:.1f} M" for part, count in report["parameters"].items())
    precision = f"{report['dtype']}, VAE {report['vae_dtype']}"
    memory = f"{size(report['weights_bytes'])} of weights, {size(report['peak_bytes'])} at most, on {report['device']}"
    pixels = f"{report['height']} x {report['width']} pixels, {report['num_steps']} steps"
    return sheet(
        {
            "model": report["model"],
            "folder": report["folder"],
            "layout": f"{report['layout']} ({report['pipeline']})",
            "predicts": report["prediction_type"],
            "scheduler": f"{report['scheduler']}; sampled by DDIM (Eq. 1)",
            "betas": report["betas"],
            "zero terminal SNR": yes_or_no(report["zero_terminal_snr"]),
            "spacing": report["timestep_spacing"],
            "fused layers": ", ".join(report["fused_layers"]) or "none: it has no layers to fuse",
            "parameters": parameters,
            "adapter": report["adapter"],
            "precision": precision,
            "memory": memory,
            "image": f"{report['image']}: {pixels}, {report['seconds_per_image']:.1f} s",
            "notes": "\n".join(report["notes"]) or None,
        }
    )


def summary(report: Mapping[str, Any]) -> str:
    """A report in one line."""
    return (
        f"{report['layout']}, {report['prediction_type']}, {size(report['peak_bytes'])},"
        f" {report['seconds_per_image']:.1f} s an image on {report['device']}"
    )
