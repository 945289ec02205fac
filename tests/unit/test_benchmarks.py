"""The benchmarks, on small images and few steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import __main__ as all_benchmarks
from benchmarks import fusion, gpu, item_finding, measuring, pair_metrics, startup, training
from benchmarks.measuring import Cost, Goal, Work
from benchmarks.nets import UNETS
from dfusion._diffusers import UNet2DConditionModel
from dfusion.models import DiffusionModel
from dfusion.pair_metrics import pair_statistics
from tests.nets import tiny_model, tiny_xl_model


@pytest.fixture(autouse=True)
def small_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate of a small matrix product is measured sooner."""
    monkeypatch.setattr(measuring, "_CPU_MATRIX", 32)


def cost(seconds: float, operations: float = 1e9, rate: float = 1e9) -> Cost:
    return Cost(seconds, Work(operations, 10), rate)


def test_the_median_of_runs_that_take_turns() -> None:
    """A noisy run, 9 s, does not count. Each run calls all ways before the next one begins."""
    calls: list[str] = []

    def way(name: str, seconds: float) -> Callable[[], float]:
        def call() -> float:
            calls.append(name)
            return seconds

        return call

    runs = [{"a": way("a", a), "b": way("b", b)} for a, b in ((2, 5), (9, 4), (1, 6))]
    assert measuring.median_seconds(runs) == {"a": 2, "b": 5}
    assert calls == ["a", "b"] * 3


def test_floor_and_share_of_the_matrix_rate() -> None:
    """6e9 operations take 2 s at 3e9 a second, half of the 4 s that were measured. Sums add seconds and operations."""
    measured = Cost(4, Work(6e9, 80), 3e9)
    assert (measured.floor_seconds, measured.share) == (2, 0.5)
    both = measured + Cost(1, Work(9e9, 40), 3e9)
    assert (both.seconds, both.work, both.floor_seconds, both.share) == (5, Work(15e9, 120), 5, 1)
    assert measuring.cost_cells(measured) == ["4.00", "80", "0.006", "2.00", "50%"]


def test_operations_of_products_and_attention() -> None:
    """(3, 4) x (4, 5): 2 x 60. Attention of 6 queries and 6 keys of 2 channels: two products of 2 x 72 for each head,
    and five in its backward pass."""
    unet = torch.nn.Linear(4, 5, bias=False).requires_grad_(False)
    with measuring.counted(unet) as work:
        unet(torch.ones(3, 4))
    assert work == Work(2 * 60, 1.5)

    parts = [torch.ones(1, 3, 6, 2, requires_grad=True) for _ in range(3)]
    with measuring.counted(unet) as work:
        output = scaled_dot_product_attention(*parts)
        forward = work.operations
        output.sum().backward()
    assert (forward, work) == (0, Work(3 * 7 * 2 * 72, 0))


def test_ratios_of_the_ways() -> None:
    """Fusing 60 / 15, both (40 + 60) / (25 + 15), and 25 s against the stock pipeline's 20."""
    result = fusion.Compared(
        adapter=True,
        released_sampling=cost(40),
        released_fusing=cost(60),
        sampling=cost(25),
        fusing=cost(15),
        stock=cost(20),
        difference=2e-6,
        stock_difference=3e-5,
    )
    assert (result.sampling_ratio, result.fusion_ratio, result.total_ratio) == (1.6, 4, 2.5)
    assert result.stock_ratio == 1.25
    assert [goal.met for goal in result.goals(float32=True)] == [True, False, False, False]
    assert [goal.met for goal in replace(result, stock_difference=1e-6).goals(float32=True)][-1]
    assert len(result.goals(float32=False)) == 3
    assert "fusing 4.00, both 2.50; targets differ by 2.0e-06" in result.text()
    assert (result.figures()["total_ratio"], result.figures()["fusing"]["seconds"]) == (2.5, 15)


def test_goals_are_met_at_their_limit() -> None:
    assert Goal("ratio", 3.5, 3.5).line() == "ratio: 3.5 (goal >= 3.5, met)\n"
    assert Goal("ratio", 3.4, 3.5).line() == "ratio: 3.4 (goal >= 3.5, not met)\n"
    assert Goal("time", 1.06, 1.05, at_least=False).figures()["met"] is False
    assert Goal("time", 1.05, 1.05, at_least=False).met


def test_the_processor_is_named(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\ncpu family\t: 6\nmodel\t\t: 207\nmodel name\t: Some CPU\nmodel\t: 1\n", "utf-8")
    assert measuring._cpu_name(info) == "Some CPU (family 6, model 207)"
    assert measuring._cpu_name(tmp_path / "missing") != ""


@pytest.mark.slow
def test_all_ways_give_the_same_latents() -> None:
    """Of four samples and two targets, with an adapter: per step, released 4 and 3 x 2 evaluations, ours 4 and, fused,
    a reference and two targets."""
    model = tiny_model()
    work = fusion.counted_work(fusion.Round(model, 3))
    assert {name: way.evaluations for name, way in work.items()} == {
        "released_sampling": 4,
        "sampling": 4,
        "stock": 4,
        "released_fusing": 6,
        "fusing": 3,
    }
    assert all(way.operations > 0 for way in work.values())

    result = fusion.compare(model, steps=4, runs=1, adapter=True)
    assert max(result.difference, result.stock_difference) < 1e-5
    assert result.released_fusing.work.evaluations == 4 * 6
    assert result.fusing.work.evaluations == 2 * 3
    assert fusion.steps_of("fusing", 20) == 18 and fusion.steps_of("stock", 20) == 20


@pytest.mark.slow
def test_plain_training_has_the_same_gradient() -> None:
    """A pair of three steps: plainly four evaluations a row. The trainer evaluates both sides of each row in each of
    the two inner epochs; the first gives the log-probs of the policy before the update."""
    model = tiny_model()
    pairs = training.sampled_pairs(model, count=1, steps=3)
    result = training.compare(model, "tiny", pairs, micro_batch=2, runs=1)
    assert result.difference < 1e-4
    assert (result.plain_rows, result.plain.work.evaluations) == (3, 3 * 4)
    assert (result.trained_rows, result.trained.work.evaluations) == (6, 6 * 2)


def test_the_ratio_of_training_is_of_rows_a_second() -> None:
    """40 rows in 20 s and 80 rows in 10 s: 2 and 8 rows a second."""
    result = training.Compared("shapes", cost(20), 40, cost(10), 80, difference=1e-5)
    assert (result.plain_rate, result.trained_rate, result.ratio) == (2, 8, 4)
    assert [goal.met for goal in result.goals(float32=True)] == [True, True]
    assert [goal.met for goal in replace(result, trained_rows=50).goals(float32=False)] == [False]


def test_hours_of_the_papers_run() -> None:
    """A round at 2 images, 1 target and 64 rows a second: 320 + 320 s, and 320 pairs x 20 steps x 2 epochs / 64 = 200
    s. 40 rounds of 840 s are 9 1/3 hours."""
    assert gpu.paper_hours(2, 1, 64) == pytest.approx(28 / 3)


@pytest.mark.slow
@pytest.mark.parametrize(("new_model", "pairs"), [(tiny_model, 2), (tiny_xl_model, 1)])
def test_the_gpu_benchmark_on_a_cpu(new_model: Callable[[], DiffusionModel], pairs: int) -> None:
    """All its code but the full size: rates, shares and hours are of what was run."""
    sizes = gpu.Sizes(steps=3, images=2 * pairs, pairs=pairs, micro_batch=4, runs=1)
    layout = gpu.measure(new_model(), gpu.PAPER_MODEL, sizes)
    assert (layout.images.count, layout.targets.count, layout.rows.count) == (2 * pairs, pairs, 6 * pairs)
    # sampled: 3 steps; fused: 1 step of a reference and its targets; 3 rows of a pair in two epochs, both sides
    speeds = (layout.images, layout.targets, layout.rows)
    assert [speed.cost.work.evaluations for speed in speeds] == [6 * pairs, 1 + pairs, 12 * pairs]
    assert layout.frugal_rows.count == 6 * pairs
    assert layout.frugal_rows.cost.work.operations > layout.rows.cost.work.operations  # some are repeated

    rates = [speed.rate for speed in speeds]
    assert layout.hours == gpu.paper_hours(*rates, steps=3)
    assert [goal.limit for goal in layout.goals()] == [0.45, 4, 10]
    assert replace(layout, frugal_rows=replace(layout.frugal_rows, peak_bytes=9e9)).goals()[2].value == 9
    assert len(replace(layout, name="sdxl").goals()) == 1
    assert layout.figures()["paper_hours"] == layout.hours
    assert "the paper's run:" in layout.text()


@pytest.mark.parametrize(("name", "parameters"), [("sd-2.1-base", 865_910_724), ("sdxl", 2_567_463_684)])
def test_full_size_layouts_have_the_published_models_parameters(name: str, parameters: int) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[name])
    assert sum(parameter.numel() for parameter in unet.parameters()) == parameters


def test_the_gpu_benchmark_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["gpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="expected a GPU"):
        gpu.main()


def test_a_page_without_the_comments_is_refused() -> None:
    with pytest.raises(ValueError, match="expected the comments <!-- gpu --> and <!-- end of gpu -->"):
        measuring.with_section("<!-- bench -->\n<!-- end of bench -->\n", "gpu", "text")


def test_make_bench_writes_tables_and_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fused = fusion.Compared(False, *[cost(n) for n in (40, 60, 25, 15, 25)], difference=0, stock_difference=0)
    trained = training.Compared("shapes", cost(20), 40, cost(10), 80, difference=0)
    monkeypatch.setattr(fusion, "measure", lambda _: iter([fused]))
    monkeypatch.setattr(training, "measure", lambda arguments: replace(trained, name=arguments.unet))
    file = tmp_path / "bench.json"
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench -->\nold\n<!-- end of bench -->\nafter\n", "utf-8")
    threads = str(torch.get_num_threads())
    monkeypatch.setattr("sys.argv", ["bench", "--json", str(file), "--page", str(page), "--threads", threads])
    monkeypatch.setattr(measuring, "keep_freed_memory", lambda: None)

    output: list[str] = []
    all_benchmarks.main(output.append)
    figures = json.loads(file.read_text("utf-8"))
    text = "".join(output)
    new = f"before\n<!-- bench -->\n\n```text\n{text}```\n\n<!-- end of bench -->\nafter\n"
    assert page.read_text("utf-8") == new
    assert "released code: fusing" in "".join(output) and "training (shapes)" in "".join(output)
    assert (figures["fusion"][0]["fusion_ratio"], figures["training"]["ratio"]) == (4, 4)
    assert figures["machine"]["torch"] == torch.__version__
    assert len(figures["goals"]) == 4 + 2


@pytest.mark.slow
def test_an_update_is_the_same_by_any_micro_batch() -> None:
    model = tiny_model()
    pairs = training.sampled_pairs(model, count=1, steps=2)
    first, second = (training.update(model, pairs, *way) for way in ((1, False), (2, True)))
    assert (second.gradient - first.gradient).norm() / first.gradient.norm() < 1e-4
    assert max(first.off, second.off) < 1e-5


def test_pair_metrics_are_those_of_plain_convolutions() -> None:
    """Images of several tiles. The plain way adds pixels in float32."""
    pairs = pair_metrics.random_pairs(2, side=96)
    for pair, measured in zip(pairs, pair_statistics(pairs), strict=True):
        differences = pair_metrics.largest_difference(pair_metrics.plain_statistics(pair), measured)
        assert differences.pop("psnr") < 1e-5  # in dB
        assert max(differences.values()) < 1e-6


@pytest.mark.parametrize("part", item_finding.PARTS)
def test_nine_of_ten_labelled_prompts_get_exactly_the_right_items(part: str) -> None:
    prompts = [prompt for prompt in item_finding.labelled_prompts() if prompt.part == part]
    assert len(prompts) >= 100
    assert item_finding.exact(prompts, item_finding.found_items) >= 0.9 * len(prompts)


def test_an_exact_result_has_all_items_and_no_others() -> None:
    prompt = item_finding.Labelled(
        "unseen", "a Cat on a mat in a field", frozenset({"cat", "mat"}), frozenset({"field"})
    )
    assert prompt.problems(["Cat", "mat"]) == prompt.problems(["Cat", "mat", "field"]) == ([], [])
    assert prompt.problems(["cat", "field", "sky"]) == (["mat"], ["sky"])
    assert item_finding.exact([prompt], lambda _: ["cat"]) == 0


def test_the_accuracy_table_has_a_row_a_finder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["item_finding", "--errors", "development"])
    output: list[str] = []
    item_finding.main(output.append)
    header, rules, *_ = "".join(output).splitlines()
    assert header.split()[-3:] == list(item_finding.PARTS)
    assert rules.startswith("rules") and rules.count("/") == 3


def test_a_start_has_its_seconds_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["startup", "--runs", "1", "--only", "dfusion --help"])
    output: list[str] = []
    startup.main(output.append)
    [header, row] = "".join(output).splitlines()
    assert header.split() == ["now"] and row.startswith("dfusion --help  ")
    *_, seconds, _, megabytes, _ = row.split()
    assert float(seconds) > 0 and int(megabytes) > 10
