"""The sparkline of a run: which score it shows, and where its points are."""

from api.pages.sparklines import sparkline
from service.db.tables import Metric


def metric(round_number: int, mean: float, split: str = "train", scorer: str = "clip") -> Metric:
    return Metric(round=round_number, mean=mean, split=split, scorer=scorer)


def test_the_line_goes_from_the_lowest_to_the_highest_value() -> None:
    line = sparkline([metric(0, 0.25), metric(1, 0.5), metric(2, 0.75)], "clip")
    assert line is not None
    assert line.points == "3.0,25.0 48.0,14.0 93.0,3.0"  # 96 x 28 with margins of 3
    assert line.label == "clip, training prompts: from 0.250 to 0.750 in 3 rounds"


def test_held_out_images_and_the_reward_come_first() -> None:
    rows = [metric(0, 0.1), metric(0, 0.2, "held_out", "judge"), metric(0, 0.3, "held_out", "clip")]
    line = sparkline(rows, "clip")
    assert line is not None
    assert (line.last, line.name, line.points) == (0.3, "clip, held out", "")
    other = sparkline(rows, None)
    assert other is not None and other.name == "clip, held out"


def test_without_metrics_there_is_no_line() -> None:
    assert sparkline([], "clip") is None
