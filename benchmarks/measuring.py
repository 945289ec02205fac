"""What the benchmarks of the model work share: the machine, its matrix rate, medians, operations, tables."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.nets import SD_LAYOUTS
from worker.allocator import keep_freed_memory

Write = Callable[[str], object]

_CPU_MATRIX = 2048
_GPU_MATRIX = 8192


@dataclass
class Work:
    """Operations of matrix products, convolutions and attention, and U-Net evaluations.

    A multiplication and an addition are two operations. An evaluation is one pass of one sample through the U-Net; both
    halves of classifier-free guidance count as one.
    """

    operations: float = 0.0
    evaluations: float = 0.0

    def times(self, factor: float) -> Work:
        return Work(self.operations * factor, self.evaluations * factor)


@dataclass(frozen=True)
class Cost:
    """The median time of some work.

    seconds      wall time
    work         what was computed
    matrix_rate  operations a second of a large matrix product on this machine, measured in the same run
    """

    seconds: float
    work: Work
    matrix_rate: float

    @property
    def floor_seconds(self) -> float:
        """The time of the same operations at the matrix rate."""
        return self.work.operations / self.matrix_rate

    @property
    def share(self) -> float:
        """Share of the matrix rate."""
        return self.floor_seconds / self.seconds

    def __add__(self, other: Cost) -> Cost:
        work = Work(
            self.work.operations + other.work.operations,
            self.work.evaluations + other.work.evaluations,
        )
        return Cost(self.seconds + other.seconds, work, self.matrix_rate)

    def figures(self) -> dict[str, float]:
        """For JSON."""
        own = {"seconds": self.seconds, "floor_seconds": self.floor_seconds, "share_of_matrix_rate": self.share}
        return own | asdict(self.work)


@dataclass(frozen=True)
class Goal:
    """A measured figure and the least, or the largest, value that it should have."""

    name: str
    value: float
    limit: float
    at_least: bool = True

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def line(self) -> str:
        sign = ">=" if self.at_least else "<="
        return f"{self.name}: {self.value:.3g} (goal {sign} {self.limit:g}, {'met' if self.met else 'not met'})\n"

    def figures(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"met": self.met}


def parser_of(description: str | None, unet: str = "small") -> argparse.ArgumentParser:
    """A parser with the options for the model, the device and the output."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unet", choices=(*SD_LAYOUTS, "shapes"), default=unet, help="random, or the shapes world's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--runs", type=int, default=3, help="runs per variant, interleaved; the median is reported")
    add_output_arguments(parser)
    return parser


def set_up(arguments: argparse.Namespace) -> None:
    """Configure torch as a worker does on a CPU, except for the number of threads."""
    if arguments.runs < 1:
        raise SystemExit(f"--runs: expected at least 1, got {arguments.runs}")
    torch.set_num_threads(arguments.threads)
    if torch.device(arguments.device).type == "cpu":
        keep_freed_memory()


def machine(device: str) -> dict[str, Any]:
    """The machine's description, for JSON."""
    on_gpu = torch.device(device).type == "cuda"
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "torch": torch.__version__,
        "platform": platform.platform(),
    }


def setting(arguments: argparse.Namespace) -> str:
    """A line with the U-Net, its dtype, and the machine."""
    described = machine(arguments.device)
    gpu = "no GPU" if described["gpu"] is None else described["gpu"]
    cpu = f"{described['cpu']}, {described['cores']} cores, {described['threads']} threads"
    return f"{arguments.unet}, {arguments.dtype}; {cpu}; {gpu}; torch {described['torch']}"


def _cpu_name(info: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, with its family and model, since virtual machines often hide the name."""
    fields: dict[str, str] = {}
    if info.is_file():
        for line in info.read_text("utf-8").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    if "model name" not in fields:
        return platform.machine()
    return f"{fields['model name']} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"


def settled(device: torch.device) -> Callable[[], None]:
    """A function that waits until the device has finished all its work."""
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)


def seconds_of(work: Callable[[], object], wait: Callable[[], None]) -> float:
    """Wall time of one call."""
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def median_seconds(runs: Sequence[Mapping[str, Callable[[], float]]]) -> dict[str, float]:
    """The median of each way's times, in seconds. A run calls all ways in turn, so all share the machine's conditions.

    Each way is a function that returns its time.
    """
    times: dict[str, list[float]] = {name: [] for name in runs[0]}
    for run in runs:
        for name, way in run.items():
            times[name].append(way())
    return {name: statistics.median(values) for name, values in times.items()}


def matrix_product(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    """A large matrix product, and its operations."""
    size = _CPU_MATRIX if device.type == "cpu" else _GPU_MATRIX
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn((2, size, size), generator=generator).to(device, dtype)
    return partial(torch.matmul, left, right), 2.0 * size**3


def matrix_rate(device: torch.device, dtype: torch.dtype, repeats: int = 9) -> float:
    """Operations a second of a large matrix product: the median of some calls after a warm-up."""
    product, operations = matrix_product(device, dtype)
    wait = settled(device)
    seconds_of(product, wait)
    return operations / statistics.median([seconds_of(product, wait) for _ in range(repeats)])


def _forward(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
    return int(sdpa_flop_count(query, key, value))


def _backward(out: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
    return int(sdpa_backward_flop_count(out, query, key, value))


_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}
"""Attention on a CPU, which torch's counter does not know."""


@contextmanager
def counted(unet: torch.nn.Module) -> Iterator[Work]:
    """Count operations and evaluations within the context, with guidance enabled."""
    work = Work()

    def count(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        work.evaluations += len(args[0]) / 2

    hook = unet.register_forward_pre_hook(count)
    counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
    try:
        with counter:
            yield work
    finally:
        hook.remove()
        work.operations = float(counter.get_total_flops())


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines with the first column to the left and the others to the right."""
    lines = [columns, *rows]
    widths = [max(len(line[n]) for line in lines) for n in range(len(columns))]
    text = ""
    for first, *others in lines:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        text += "  ".join([first.ljust(widths[0]), *cells]) + "\n"
    return text


COST_COLUMNS = ("seconds", "evaluations", "Tera-operations", "floor, s", "of matrix rate")


def cost_cells(cost: Cost) -> list[str]:
    """A row of `COST_COLUMNS`."""
    return [
        f"{cost.seconds:.2f}",
        f"{cost.work.evaluations:.0f}",
        f"{cost.work.operations / 1e12:.3f}",
        f"{cost.floor_seconds:.2f}",
        f"{cost.share:.0%}",
    ]


class Output:
    """Writes text, and keeps it for a page."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self.text = ""

    def __call__(self, text: str) -> None:
        self._write(text)
        self.text += text


def finish(
    arguments: argparse.Namespace,
    figures: Mapping[str, Any],
    goals: Sequence[Goal],
    output: Output,
    section: str = "bench",
) -> None:
    """Write the goals, then the figures to the JSON file and the output to the page, if the arguments name them."""
    for goal in goals:
        output(goal.line())

    if arguments.json is not None:
        settings = {name: value for name, value in vars(arguments).items() if name not in ("json", "page")}
        about = {"machine": machine(arguments.device), "settings": settings}
        content = about | dict(figures) | {"goals": [goal.figures() for goal in goals]}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if arguments.page is not None:
        page = with_section(arguments.page.read_text("utf-8"), section, output.text)
        arguments.page.write_text(page, encoding="utf-8")


def with_section(page: str, section: str, text: str) -> str:
    """The page with `text` between the comments `<!-- section -->` and `<!-- end of section -->`."""
    start = f"<!-- {section} -->\n"
    end = f"<!-- end of {section} -->"
    if start not in page or end not in page:
        raise ValueError(f"expected the comments {start.strip()} and {end} in the page")
    before, rest = page.split(start, 1)
    return f"{before}{start}\n```text\n{text}```\n\n{end}{rest.split(end, 1)[1]}"


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Options for files with the results."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--page", type=Path, metavar="FILE", help="also write the output into this page of the docs")
