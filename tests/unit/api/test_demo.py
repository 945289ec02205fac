"""What the demo shows, from what the service answers."""

from PIL import Image

from api.demo import before_and_after, contact_sheet, html_report, triptychs


def metric(round_number, split, scorer, mean):
    return {"round": round_number, "split": split, "scorer": scorer, "mean": mean}


METRICS = [
    metric(0, "train", "clip", 0.2),
    metric(1, "train", "clip", 0.9),
    metric(2, "train", "clip", 0.5),
    metric(0, "held_out", "clip", 0.3),
    metric(2, "held_out", "clip", 0.25),
    metric(1, "rollout", "clip", 0.1),
]
PAIR = {
    "prompt": "a <b>red</b> star",
    "base": {"score": 0.1},
    "reference": {"score": 0.3},
    "target": {"score": 0.2},
}


def test_before_is_the_first_round_and_after_the_last():
    assert before_and_after(METRICS) == [("train", "clip", 0.2, 0.5), ("held_out", "clip", 0.3, 0.25)]


def test_sheet_shows_every_picture_where_its_heading_says():
    colours = ["red", "lime", "blue", "white"]
    row = {"pair": PAIR, "pictures": [Image.new("RGB", (128, 128), colour) for colour in colours]}
    sheet = contact_sheet([row, row])
    for x, expected in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255)]):
        assert sheet.getpixel((8 + x * 136 + 64, 34 + 64)) == expected
        assert sheet.getpixel((8 + x * 136 + 64, 34 + 162 + 64)) == expected


def test_report_needs_no_other_file_and_escapes_prompts():
    row = {"pair": PAIR, "pictures": [Image.new("RGB", (8, 8))] * 4}
    page = html_report([("train", "clip", 0.2, 0.5)], [row], {"id": "job_x", "pairs": 80, "adopted": 62})
    assert "The 1 targets that gained most" in page and "Of 80 pairs the targets of 62 were adopted" in page
    assert "a &lt;b&gt;red&lt;/b&gt; star" in page
    assert page.count("data:image/png;base64,") == 4
    assert "+0.3000" in page and "http" not in page


def test_pairs_are_those_that_gained_most(live):
    with live.client() as client:
        adopted = list(client.pairs(job=live.done_job, adopted=True))
        chosen = triptychs(client, live.done_job, 2)
        rows = before_and_after([metric.model_dump() for metric in client.metrics(live.done_job).data])
    gains = sorted((pair.target.score - pair.base.score for pair in adopted), reverse=True)
    assert [row["pair"]["target"]["score"] - row["pair"]["base"]["score"] for row in chosen] == gains[:2] != []
    assert all([picture.size for picture in row["pictures"]] == [(128, 128)] * 4 for row in chosen)
    assert [row[:2] for row in rows] == [("train", "brightness")]
    assert contact_sheet(chosen).height == 34 + 2 * 162
