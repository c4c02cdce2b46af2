"""What a minute's worth means: at once or spread out, overdrawn and paid back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from titans_server.errors import RateLimited
from titans_server.observer import Asked
from titans_server.tenants.gatekeeper import Caller
from titans_server.tenants.limiter import Allowance, Limiter, Meter, _duration, hold_place
from titans_server.tenants.quotas import Bucket, Quotas


def test_a_minutes_worth_can_be_had_at_once_and_comes_back_evenly() -> None:
    bucket = Bucket(60, now=0.0)
    for _ in range(60):
        assert bucket.seconds_until(1, 0.0) == 0
        bucket.take(1, 0.0)
    assert bucket.remaining(0.0) == 0
    assert bucket.seconds_until(1, 0.0) == pytest.approx(1.0)
    assert bucket.remaining(30.0) == 30
    assert bucket.remaining(1_000.0) == 60, "and no more than that is saved up"


def test_a_debt_is_paid_back() -> None:
    bucket = Bucket(60, now=0.0)
    bucket.take(180, 0.0)
    assert bucket.remaining(60.0) == 0
    assert bucket.seconds_until(1, 0.0) == pytest.approx(121.0)
    assert bucket.seconds_until_full(0.0) == pytest.approx(180.0)


@given(st.integers(1, 1_000), st.lists(st.tuples(st.floats(0, 30), st.integers(1, 50)), max_size=60))
def test_nobody_gets_more_than_a_minutes_worth_and_what_came_in_since(
    per_minute: int, asked: list[tuple[float, int]]
) -> None:
    bucket, now, had = Bucket(per_minute, 0.0), 0.0, 0
    for wait, amount in asked:
        now += wait
        if bucket.seconds_until(amount, now) == 0:
            bucket.take(amount, now)
            had += amount
        assert had <= per_minute * (1 + now / 60) + 1e-6


def test_a_keys_own_quotas_go_before_the_servers() -> None:
    assert Quotas(sessions=0, bytes=5).over(Quotas(sessions=9, requests_at_once=2)) == Quotas(
        sessions=0, bytes=5, requests_at_once=2
    )


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def admitted(limiter: Limiter, caller: Caller, *, costs_tokens: bool = True) -> Allowance:
    with limiter.admit(caller, costs_tokens=costs_tokens) as allowance:
        return allowance


def test_requests_are_refused_until_there_is_one_again() -> None:
    clock = Clock()
    limiter, caller = Limiter(clock), Caller("a", Quotas(requests_per_minute=2))
    for _ in range(2):
        admitted(limiter, caller)
    with pytest.raises(RateLimited, match="2 requests a minute") as refused:
        admitted(limiter, caller)
    assert refused.value.retry_after == 30
    clock.now = 29.9
    with pytest.raises(RateLimited, match="again in 1 s"):  # as Retry-After says
        admitted(limiter, caller)
    admitted(limiter, Caller("b", caller.quotas))
    clock.now = 30.0
    admitted(limiter, caller)


def test_tokens_are_charged_as_they_are_computed_and_refuse_the_next() -> None:
    clock = Clock()
    limiter, caller = Limiter(clock), Caller("a", Quotas(tokens_per_minute=100))
    meter = Meter()
    with limiter.admit(caller, costs_tokens=True) as allowance:
        with meter.working("ingest", 70), meter.working("commit"):
            pass
        with meter.answering(Asked(20, 8, 1.0, 1.0)) as answer:
            assert allowance.headers()["X-RateLimit-Remaining-Tokens"] == "30"
            answer.read(20)
            answer.drawn()
            answer.drawn()
        assert allowance.headers()["X-RateLimit-Remaining-Tokens"] == "8"
        with meter.working("ingest", 58):
            pass
    with pytest.raises(RateLimited, match="100 tokens a minute") as refused:
        admitted(limiter, caller)
    assert refused.value.retry_after == 31
    admitted(limiter, caller, costs_tokens=False)


def test_a_prompt_is_charged_as_far_as_it_is_read_and_once() -> None:
    limiter, meter = Limiter(Clock()), Meter()
    with limiter.admit(Caller("a", Quotas(tokens_per_minute=100)), costs_tokens=True) as allowance:
        with meter.answering(Asked(20, 0, 1.0, 1.0)) as answer:
            for num_read, left in ((0, "100"), (16, "84"), (16, "84"), (20, "80")):
                answer.read(num_read)
                assert allowance.headers()["X-RateLimit-Remaining-Tokens"] == left
        with meter.answering(Asked(20, 8, 1.0, 1.0)) as answer:
            answer.read(20)
            answer.drawn()
            answer.read(20)
        assert allowance.headers()["X-RateLimit-Remaining-Tokens"] == "59"


def test_work_that_fails_is_not_charged() -> None:
    limiter, meter = Limiter(Clock()), Meter()
    with limiter.admit(Caller("a", Quotas(tokens_per_minute=100)), costs_tokens=True) as allowance:
        with pytest.raises(OSError), meter.working("ingest", 70):
            raise OSError
        assert allowance.headers()["X-RateLimit-Remaining-Tokens"] == "100"


def test_requests_at_once_are_counted_until_they_end() -> None:
    limiter, caller = Limiter(Clock()), Caller("a", Quotas(requests_at_once=1))
    with limiter.admit(caller, costs_tokens=False):
        with pytest.raises(RateLimited, match="under way"):
            admitted(limiter, caller)
        admitted(limiter, Caller("b", caller.quotas))
    admitted(limiter, caller)


def test_what_goes_on_of_a_request_keeps_new_work_out() -> None:
    limiter, caller = Limiter(Clock()), Caller("a", Quotas(requests_at_once=1))
    with limiter.admit(caller, costs_tokens=True):
        let_go = hold_place()
        with limiter.admit(caller, costs_tokens=False, only_ends=True):
            pass
    admitted(limiter, caller, costs_tokens=False)
    with pytest.raises(RateLimited, match="under way"):
        admitted(limiter, caller)
    let_go()
    hold_place()()  # too late: its request has ended, and all that went on of it
    with limiter.admit(caller, costs_tokens=True), pytest.raises(RateLimited, match="under way"):
        admitted(limiter, caller)
    assert not limiter._going_on


def test_without_quotas_there_are_no_headers() -> None:
    assert admitted(Limiter(Clock()), Caller("a", Quotas())).headers() == {}


@pytest.mark.parametrize(("seconds", "text"), [(0, "0s"), (0.02, "0.02s"), (59.5, "59.5s"), (90.25, "1m30.25s")])
def test_durations_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert _duration(seconds) == text
