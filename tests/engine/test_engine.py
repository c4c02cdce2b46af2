"""The engine on a tiny model: real thread, real event loop, real arithmetic."""

import asyncio
import gc
import itertools
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import NoReturn

import pytest
import torch
from support.models import make_tiny
from titans.model import TitansModel
from titans.sampling import Drawn, SamplingParams
from titans.state import State, Stream
from titans_server.engine import Engine, Generation, Ingestion, Read, StepFailed, openings
from titans_server.engine.pool import Pool
from titans_server.engine.runner import Prefilled, Runner
from titans_server.errors import Overloaded, ShuttingDown, TitansError
from titans_server.observer import Answering, Computed, Observer

GREEDY = SamplingParams(temperature=0)


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    engine = Engine([Runner(make_tiny())], ends={2}, max_running=4, max_requests=32)
    engine.start()
    yield engine
    await engine.close()


def tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 259, (count,), generator=generator).tolist()


async def answer(
    engine: Engine, state: State, prompt: list[int], *, recall: bool = True, count: int = 12
) -> list[Drawn | str]:
    stream = engine.generate(state, prompt, max_tokens=count, sampling=GREEDY, recall=recall)
    return [token async for token in stream if not isinstance(token, Read)]


def assert_same(ours: State, theirs: State) -> None:
    for name, part in ours.parts().items():
        torch.testing.assert_close(part, theirs.parts()[name], rtol=1e-4, atol=2e-5)


async def test_sessions_at_once_are_each_as_alone(engine: Engine) -> None:
    documents = [tokens(n, seed=n) for n in (100, 3, 57, 16, 31)]
    alone = [await engine.ingest(engine.new_state(), d) for d in documents]
    together = await asyncio.gather(*(engine.ingest(engine.new_state(), d) for d in documents))
    for ours, theirs in zip(together, alone, strict=True):
        assert_same(ours, theirs)

    prompts = [tokens(n, seed=50 + n) for n in (1, 5, 40, 7, 16)]
    pairs = list(zip(alone, prompts, strict=True))
    one_by_one = [await answer(engine, s, p) for s, p in pairs]
    at_once = await asyncio.gather(*(answer(engine, s, p) for s, p in pairs))
    assert at_once == one_by_one
    assert len({tuple(a) for a in at_once}) > 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
async def test_sessions_at_once_on_a_gpu_are_each_as_alone_on_a_cpu(engine: Engine) -> None:
    other = Engine([Runner(make_tiny().cuda())], ends={2}, max_running=4, max_requests=32)
    other.start()
    documents = [tokens(n, seed=n) for n in (100, 3, 57, 16, 31)]
    alone = [await engine.ingest(engine.new_state(), d) for d in documents]
    together = await asyncio.gather(*(other.ingest(other.new_state(), d) for d in documents))
    for ours, theirs in zip(together, alone, strict=True):
        assert_same(ours.map(lambda _, x: x.cpu()), theirs)
    prompts = [tokens(n, seed=50 + n) for n in (1, 5, 40, 7, 16)]
    one_by_one = [await answer(engine, s, p) for s, p in zip(alone, prompts, strict=True)]
    at_once = await asyncio.gather(*(answer(other, s, p) for s, p in zip(together, prompts, strict=True)))
    await other.close()
    assert at_once == one_by_one


async def test_answers_with_and_without_recall_run_at_once(engine: Engine) -> None:
    state = await engine.ingest(engine.new_state(), tokens(100, seed=1))
    prompt = tokens(6, seed=2)
    alone = [await answer(engine, state, prompt, recall=r) for r in (True, False)]
    assert await asyncio.gather(*(answer(engine, state, prompt, recall=r) for r in (True, False))) == alone
    assert alone[0] != alone[1]


class Held(Runner):
    """Waits in a document until it may go on, and remembers how many prompts it has read together."""

    def __init__(self, model: TitansModel) -> None:
        super().__init__(model)
        self.may_go_on = threading.Event()
        self.together: list[int] = []

    def ingest(self, chunks: list[tuple[Ingestion, int]]) -> None:
        assert self.may_go_on.wait(timeout=20)
        super().ingest(chunks)

    def prefill(self, parts: list[tuple[Generation, int]]) -> dict[Generation, Prefilled]:
        self.together.append(len(parts))
        return super().prefill(parts)


async def test_prompts_that_wait_together_are_read_in_one_call_and_told_as_alone() -> None:
    runner = Held(make_tiny())
    engine = Engine([runner], ends={2}, max_running=8)
    engine.start()
    runner.may_go_on.set()
    states = [await engine.ingest(engine.new_state(), tokens(20 * n, seed=n)) for n in range(1, 5)]
    asked = [(states[i % 4], tokens(n, seed=n), i % 3 != 1) for i, n in enumerate((3, 1, 4, 2, 5, 7, 50))]
    params = SamplingParams(temperature=0, num_logprobs=2)

    async def told(state: State, prompt: list[int], recall: bool) -> list[Drawn | Read | str]:
        stream = engine.generate(state, prompt, max_tokens=6, sampling=params, recall=recall, echo=True)
        return [token async for token in stream]

    alone = [await told(*each) for each in asked]
    runner.may_go_on.clear()
    runner.together.clear()
    held = asyncio.create_task(engine.ingest(engine.new_state(), [5]))
    asking = [asyncio.create_task(told(*each)) for each in asked]
    await asyncio.sleep(0)
    runner.may_go_on.set()
    together = await asyncio.gather(*asking)
    await held
    await engine.close()
    assert runner.together[0] == 4, "of sixteen tokens, padding counted"
    for ours, theirs in zip(together, alone, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert_as_likely(one, other)


def assert_as_likely(ours: Drawn | Read | str, theirs: Drawn | Read | str) -> None:
    assert type(ours) is type(theirs)
    if isinstance(ours, str) or isinstance(theirs, str):
        assert ours == theirs
        return
    one, other = (each.drawn if isinstance(each, Read) else each for each in (ours, theirs))
    assert one.token == other.token
    assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


async def test_a_session_that_fails_to_open_takes_nobody_with_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = [await engine.ingest(engine.new_state(), tokens(40, seed=i)) for i in range(3)]
    alone = [await answer(engine, state, [5, 6]) for state in states[1:]]
    states[0] = states[0].clone()  # which nobody has opened ahead
    opening = TitansModel.opening

    def failing(self: TitansModel, state: State) -> Iterator[Stream | None]:
        if state is states[0]:
            raise RuntimeError("out of memory")
        yield from opening(self, state)

    monkeypatch.setattr(TitansModel, "opening", failing)
    lost, *others = await asyncio.gather(*(answer(engine, s, [5, 6]) for s in states), return_exceptions=True)
    assert isinstance(lost, TitansError)
    assert others == alone


async def test_an_answer_that_there_is_no_room_for_takes_nobody_with_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = [await engine.ingest(engine.new_state(), tokens(40, seed=i)) for i in range(3)]
    alone = [await answer(engine, state, [5, 6], recall=False) for state in states]
    copy = Pool._write

    def failing(self: Pool, name: str, row: int, x: torch.Tensor) -> torch.Tensor:
        if name.startswith("upper."):
            raise RuntimeError("out of memory")
        return copy(self, name, row, x)

    with monkeypatch.context() as patched:
        patched.setattr(Pool, "_write", failing)
        with pytest.raises(TitansError):
            await answer(engine, states[0], [5, 6], recall=False)
    assert [await answer(engine, state, [5, 6], recall=False) for state in states] == alone


async def test_who_gives_up_takes_nothing_from_others_who_wait_for_the_same_session(engine: Engine) -> None:
    runner, state = Runner(make_tiny()), await engine.ingest(engine.new_state(), tokens(40, seed=1))
    first, other = (Generation(state, [5], 1, GREEDY, recall=True, emit=lambda _: None) for _ in range(2))
    for _ in range(len(make_tiny().upper) + 1):
        assert not runner.is_open(first)
        runner.open(first, seconds=0.0)
        runner.forget(other)
    assert runner.is_open(first)


async def test_who_asks_a_session_again_does_not_wait_for_its_window_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, opening = list[int](), TitansModel.opening

    def noted(self: TitansModel, state: State) -> Iterator[Stream | None]:
        opened.append(id(state))
        yield from opening(self, state)

    monkeypatch.setattr(TitansModel, "opening", noted)
    monkeypatch.setattr(openings, "_KEPT", 8)
    states = [await engine.ingest(engine.new_state(), tokens(40, seed=i)) for i in range(12)]
    first = [await answer(engine, state, [5, 6]) for state in states[:3]]
    assert [await answer(engine, state, [5, 6]) for state in states[:3]] == first
    assert [opened.count(id(state)) for state in states[:3]] == [1, 1, 1]
    for state in states:
        await answer(engine, state, [5, 6])
    assert await answer(engine, states[0], [5, 6]) == first[0]
    assert opened.count(id(states[0])) == 2, "only the last few are kept"


async def test_a_session_is_opened_before_anybody_asks_where_there_is_nothing_else_to_do(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, prepare = threading.Semaphore(0), Runner.prepare

    def noted(self: Runner) -> None:
        prepare(self)
        if not self.has_spare_work:
            expected.release()

    monkeypatch.setattr(Runner, "prepare", noted)
    unasked = await engine.ingest(engine.new_state(), tokens(100, seed=1))
    assert await asyncio.to_thread(expected.acquire, timeout=20)
    opened = engine._runners[0]._openings._opened
    assert set(opened) == {id(unasked)}

    def failing(*_: object) -> NoReturn:
        raise AssertionError("it is open already")

    monkeypatch.setattr(TitansModel, "opening", failing)
    assert len(await answer(engine, unasked, [5, 6])) > 1
    del unasked
    gc.collect()
    assert not opened, "it is kept as long as its state"


async def test_what_fails_before_anybody_asks_is_said_once_and_harms_nobody(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*_: object) -> NoReturn:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(TitansModel, "opening", failing)
        state = await engine.ingest(engine.new_state(), tokens(100, seed=1))
        await asyncio.sleep(0.3)
        assert caplog.text.count("preparing failed") == 1
    assert len(await answer(engine, state, [5, 6])) > 1


async def test_answering_leaves_the_state_alone(engine: Engine) -> None:
    state = await engine.ingest(engine.new_state(), tokens(20, seed=1))
    copy = state.clone()
    await answer(engine, state, tokens(30, seed=2))
    for name, part in state.parts().items():
        assert torch.equal(part, copy.parts()[name])


async def test_an_answer_ends_at_its_length(engine: Engine) -> None:
    *said, finish = await answer(engine, engine.new_state(), tokens(3, seed=1), count=5)
    assert (len(said), finish) == (5, "length") or (finish == "stop" and len(said) < 5)


async def test_the_least_top_p_that_may_be_asked_for_ends_nobody(engine: Engine) -> None:
    async def asked(params: SamplingParams) -> list[Drawn | Read | str]:
        return [token async for token in engine.generate(engine.new_state(), [5], max_tokens=9, sampling=params)]

    greedy = await asked(GREEDY)
    for said in await asyncio.gather(asked(GREEDY), asked(SamplingParams(top_p=5e-324))):
        assert said == greedy


async def test_a_seed_repeats_its_answer(engine: Engine) -> None:
    async def draw(seed: int | None) -> list[Drawn | str]:
        params = SamplingParams(temperature=1.5, top_p=0.95, top_k=200, seed=seed)
        stream = engine.generate(engine.new_state(), tokens(3, seed=1), max_tokens=20, sampling=params)
        return [token async for token in stream if not isinstance(token, Read)]

    assert await draw(7) == await draw(7)
    assert await draw(7) != await draw(8)


async def test_a_cancelled_document_makes_room(engine: Engine) -> None:
    task = asyncio.create_task(engine.ingest(engine.new_state(), tokens(200_000, seed=1)))
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with asyncio.timeout(20):
        await engine.ingest(engine.new_state(), tokens(20, seed=1))


async def test_a_closed_answer_stops_being_computed(engine: Engine) -> None:
    stream = engine.generate(engine.new_state(), tokens(3, seed=1), max_tokens=10**6, sampling=SamplingParams(seed=1))
    async with aclosing(stream):
        async for _ in stream:
            break
    async with asyncio.timeout(20):
        await answer(engine, engine.new_state(), tokens(3, seed=1))
        while engine.num_requests:  # noqa: ASYNC110 — the compute thread sets no event of asyncio's
            await asyncio.sleep(0.01)


async def test_an_answer_is_made_to_its_end_though_nobody_takes_it_yet(engine: Engine) -> None:
    whole = await answer(engine, engine.new_state(), [5], count=100)
    async with aclosing(engine.generate(engine.new_state(), [5], max_tokens=100, sampling=GREEDY)) as stream:
        first = await anext(stream)
        async with asyncio.timeout(20):
            while engine.num_requests:  # noqa: ASYNC110 — the compute thread sets no event of asyncio's
                await asyncio.sleep(0.01)
        assert [first, *[token async for token in stream]] == whole


async def test_too_many_requests_are_refused() -> None:
    engine = Engine([Runner(make_tiny())], ends={2}, max_requests=2)
    tasks = [asyncio.create_task(engine.ingest(engine.new_state(), tokens(50, seed=i))) for i in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await engine.ingest(engine.new_state(), tokens(5, seed=9))
    engine.start()
    await asyncio.gather(*tasks)
    await engine.ingest(engine.new_state(), tokens(5, seed=9))
    await engine.close()


async def test_what_has_a_place_is_refused_nothing_and_places_are_as_few_as_requests() -> None:
    engine = Engine([Runner(make_tiny())], ends={2}, max_requests=2)
    with engine.admitted(), engine.admitted():
        with pytest.raises(Overloaded), engine.admitted():
            pass
        tasks = [asyncio.create_task(engine.ingest(engine.new_state(), tokens(50, seed=i))) for i in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await engine.ingest(engine.new_state(), tokens(5, seed=9))
        tasks.append(asyncio.create_task(engine.ingest(engine.new_state(), tokens(5, seed=9), admitted=True)))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded), engine.admitted():
        pass
    engine.start()
    await asyncio.gather(*tasks)
    with engine.admitted():
        pass
    await engine.close()


async def test_closing_ends_what_is_left(engine: Engine) -> None:
    ingesting = asyncio.create_task(engine.ingest(engine.new_state(), tokens(100_000, seed=1)))
    answering = asyncio.create_task(answer(engine, engine.new_state(), tokens(3, seed=1), count=10**6))
    await asyncio.sleep(0.2)
    await engine.close()
    for task in (ingesting, answering):
        with pytest.raises(ShuttingDown):
            await task
    with pytest.raises(ShuttingDown):
        await engine.ingest(engine.new_state(), [5])


async def test_a_device_that_is_lost_leaves_nobody_waiting(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def lost(*_: object) -> NoReturn:
        raise RuntimeError("the device is lost")

    answers = [engine.generate(engine.new_state(), [5], max_tokens=10**6, sampling=GREEDY) for _ in range(3)]
    for stream in answers:
        await anext(stream)
    monkeypatch.setattr(Runner, "decode", lost)
    monkeypatch.setattr(Pool, "leave", lost)
    async with asyncio.timeout(20):
        for stream in answers:
            with pytest.raises(TitansError):
                async for _ in stream:
                    pass
        with pytest.raises(ShuttingDown):
            await engine.ingest(engine.new_state(), [5])
        while engine.is_alive():  # noqa: ASYNC110 — the compute thread sets no event of asyncio's
            await asyncio.sleep(0.01)
    assert engine.num_requests == 0
    assert "the device is lost" in caplog.text


class Diary(Observer):
    """What the compute thread did, in order."""

    def __init__(self) -> None:
        self.did: list[Computed] = []

    def computed(self, kind: Computed, seconds: float) -> None:
        self.did.append(kind)


async def test_between_two_tokens_of_an_answer_there_is_no_more_than_a_portion_of_documents() -> None:
    diary = Diary()
    engine = Engine([Runner(make_tiny())], ends={2}, observer=diary)
    engine.start()
    async with aclosing(engine.generate(engine.new_state(), [5], max_tokens=10**6, sampling=GREEDY)) as stream:
        await anext(stream)
        before = len(diary.did)
        sizes = (300, 120, 5, 77, 16)
        documents = [engine.ingest(engine.new_state(), tokens(n, seed=n)) for n in sizes]
        states = await asyncio.gather(*documents)
        during = diary.did[before:]
        assert [int(state.position) for state in states] == list(sizes)
    await engine.close()
    runs = [(kind, len(list(run))) for kind, run in itertools.groupby(during)]
    assert all(count == 1 for kind, count in runs if kind == "ingest")
    assert during.count("ingest") >= sum(sizes) / engine.window


class Far(Answering):
    """How far a prompt was read."""

    num_read = 0

    def read(self, num_tokens: int) -> None:
        assert num_tokens >= self.num_read
        self.num_read = num_tokens


@pytest.mark.parametrize("echo", [True, False])
async def test_of_a_prompt_that_is_left_it_is_told_how_far_it_was_read(echo: bool) -> None:
    diary, far, prompt = Diary(), Far(), tokens(50_000, seed=1)
    engine = Engine([Runner(make_tiny())], ends={2}, observer=diary)
    engine.start()
    stream = engine.generate(engine.new_state(), prompt, max_tokens=1, sampling=GREEDY, echo=echo, telling=far)
    if echo:
        async with aclosing(stream):
            for _ in range(100):
                await anext(stream)
            assert far.num_read >= 100
    else:
        first = asyncio.create_task(anext(stream))
        while len(diary.did) < 50:  # noqa: ASYNC110 — the compute thread sets no event of asyncio's
            await asyncio.sleep(0.01)
        first.cancel()
        await asyncio.wait([first])
        assert first.cancelled()
    assert 0 < far.num_read < len(prompt)
    await engine.close()


async def test_a_fault_ends_its_own_requests_and_not_the_engine(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Runner, "ingest", lambda *_: 1 / 0)
        with pytest.raises(TitansError):
            await engine.ingest(engine.new_state(), [5])
    assert "ZeroDivisionError" in caplog.text
    await engine.ingest(engine.new_state(), [5])


class Surprised(Observer):
    """Remembers what it hears."""

    def __init__(self) -> None:
        self.heard: list[float] = []

    def surprised(self, by: float) -> None:
        self.heard.append(by)


async def test_a_stride_tells_how_far_a_token_moved_the_memories() -> None:
    observer, read = Surprised(), tokens(40, seed=1)
    engine = Engine([Runner(make_tiny())], ends={2}, observer=observer)
    engine.start()
    before = engine.new_state()
    after = await engine.ingest(before, read)
    await engine.close()
    weights = [(before.parts()[name], x) for name, x in after.parts().items() if name.endswith(".weights")]
    assert weights
    moved = sum(float((new - old).double().square().sum()) for old, new in weights) ** 0.5
    assert observer.heard == [pytest.approx(moved / 40, rel=1e-5)]
    assert moved > 0


async def test_what_takes_the_weights_out_of_all_bounds_is_not_learnt_and_fails_nothing_else() -> None:
    """A memory of another training, or of several layers, may get there by itself."""
    observer, read = Surprised(), tokens(40, seed=1)
    engine = Engine([Runner(make_tiny())], ends={2}, observer=observer)
    engine.start()
    sound = engine.new_state()
    far = State.from_parts({k: x + 1e37 if k.endswith(".weights") else x for k, x in sound.parts().items()})
    failed, learnt = await asyncio.gather(engine.ingest(far, read), engine.ingest(sound, read), return_exceptions=True)
    await engine.close()
    assert isinstance(failed, StepFailed) and "out of all bounds" in failed.message
    assert isinstance(learnt, State) and len(observer.heard) == 1


async def test_a_session_is_opened_between_the_tokens_of_others() -> None:
    """A layer a step where no step has time for two; and what is said does not change by it."""
    diary = Diary()
    engine = Engine([Runner(make_tiny())], ends={2}, observer=diary, portion_seconds=1e-6)
    engine.start()
    state = await engine.ingest(engine.new_state(), tokens(60, seed=1))
    other = await engine.ingest(engine.new_state(), tokens(60, seed=1))
    alone = await answer(engine, state, [5, 6])
    async with aclosing(engine.generate(engine.new_state(), [5], max_tokens=10**6, sampling=GREEDY)) as stream:
        await anext(stream)
        await anext(stream)
        before = len(diary.did)
        assert await answer(engine, other, [5, 6]) == alone
        during = diary.did[before:]
    await engine.close()
    runs = [(kind, len(list(run))) for kind, run in itertools.groupby(during)]
    steps = [count for kind, count in runs if kind == "prefill"]
    assert steps == [1] * (len(make_tiny().upper) + 2), "layers, the stream, the prompt"
