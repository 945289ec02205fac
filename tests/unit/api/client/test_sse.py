"""Server-sent events out of bytes."""

from api.client.sse import ServerEvent, parse

STREAM = b': still here\n\nid: 1\nevent: job.created\ndata: {"a": 1}\n\ndata: x\ndata:  y\n\nid: 3\ndata: cut of'
EVENTS = [ServerEvent("job.created", '{"a": 1}'), ServerEvent("message", "x\n y")]


def test_events_are_whole_or_not_there() -> None:
    assert list(parse([STREAM])) == EVENTS


def test_it_does_not_matter_where_pieces_end() -> None:
    for ending in (b"\n", b"\r\n", b"\r"):
        stream = STREAM.replace(b"\n", ending)
        assert list(parse(stream[i : i + 1] for i in range(len(stream)))) == EVENTS
        for cut in range(len(stream)):
            assert list(parse([stream[:cut], stream[cut:]])) == EVENTS


def test_a_line_does_not_end_where_only_python_thinks_so() -> None:
    text = "a\u2028b\x85c\x0bd é"
    assert list(parse([f"data: {text}\n\n".encode()])) == [ServerEvent("message", text)]
