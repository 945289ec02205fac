from api.token_buckets import TokenBuckets, retry_after


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_holds_two_seconds_worth_and_fills_steadily() -> None:
    clock = Clock()
    buckets = TokenBuckets(2, clock)
    assert [buckets.take("a") for _ in range(5)] == [0, 0, 0, 0, 0.5]
    clock.now += 0.25  # half a request
    assert buckets.take("a") == 0.25
    clock.now += 0.25
    assert [buckets.take("a") for _ in range(2)] == [0, 0.5]
    clock.now += 1000
    assert [buckets.take("a") for _ in range(5)] == [0, 0, 0, 0, 0.5]


def test_slow_rates_still_let_one_request_in() -> None:
    clock = Clock()
    buckets = TokenBuckets(0.1, clock)
    assert buckets.take("a") == 0
    assert round(buckets.take("a"), 6) == 10
    clock.now += 10.001
    assert buckets.take("a") == 0


def test_callers_do_not_share_a_bucket() -> None:
    buckets = TokenBuckets(1, Clock())
    assert [buckets.take(caller) for caller in "abab"] == [0, 0, 0, 0]
    assert buckets.take("a") > 0


def test_many_callers_do_not_fill_the_memory_and_the_quiet_are_forgotten_first() -> None:
    buckets = TokenBuckets(1, Clock())
    for _ in range(2):
        buckets.take("first")
    for number in range(9_999):
        buckets.take(str(number))
    assert buckets.take("first") > 0
    for number in range(10_000):
        buckets.take(f"later {number}")
    assert buckets.take("first") == 0
    assert len(buckets._buckets) == 10_000


def test_retry_after_is_whole_seconds_and_never_none() -> None:
    assert [retry_after(seconds) for seconds in (0.001, 1.0, 1.2)] == [1, 1, 2]
