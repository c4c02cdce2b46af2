"""Steps as CUDA graphs. Where there is no GPU a step is taken again in place of a graph: buffers, rows and padding."""

import gc
import random
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.models import make_tiny
from titans.memory import neural
from titans.model import TitansModel
from titans_server.engine.graphs import GraphSteps, steps_for
from titans_server.engine.pool import Pool
from titans_server.engine.steps import Steps
from torch import Tensor

FORMS: dict[str, Any] = {
    "mal": {},
    "mal with momentum and readout": {"momentum": True, "readout": True},
    "mal, protecting": {"protected_keys": 5, "products": 2, "write_threshold": 0.4},
    "mag": {"architecture": "mag", "memory_layers": (0, 2)},
    "lmm": {"architecture": "lmm", "memory_layers": (0, 1, 2, 3)},
}
DEEP = {"rule": "chunk", "depth": 2, "expansion": 2}
each_form = pytest.mark.parametrize("form", list(FORMS.values()), ids=list(FORMS))


@each_form
def test_nothing_in_a_step_waits_for_the_device(form: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """On torch's meta device there is nothing to wait for: to look at a number is an error."""
    monkeypatch.setattr(neural, "_as_written", lambda _: nullcontext())  # autocast does not know that device
    monkeypatch.setattr("titans.attention._FUSED_ON", "meta")
    model = make_tiny(**form).to("meta")
    assert model.has_fixed_steps
    window, batch = model.config.window, 3
    state = model.ingest(torch.zeros(batch, window, dtype=torch.int64, device="meta"), model.new_state(batch))
    lengths = torch.zeros(batch, dtype=torch.int64, device="meta")
    for width in (5, window):
        state = model.ingest(torch.zeros(batch, width, dtype=torch.int64, device="meta"), state, lengths)
    wide = torch.zeros(batch, 4 * window, dtype=torch.int64, device="meta")
    for counts in (lengths, None):
        state = model.ingest(wide, state, counts, at_once=4 * window)
    stream = model.open(state)
    hidden, stream = model(torch.zeros(batch, 1, dtype=torch.int64, device="meta"), stream)
    assert model.logits(hidden[:, -1]).shape == (batch, model.config.backbone.vocab_size)
    hidden, _ = model(torch.zeros(batch, 7, dtype=torch.int64, device="meta"), stream, lengths)
    assert hidden.shape[:2] == (batch, 7)


@pytest.mark.parametrize("form", [DEEP, {"architecture": "mac"}, {"architecture": "mac", **DEEP}])
def test_steps_that_depend_on_where_a_row_stands_are_not_fixed(form: dict[str, Any]) -> None:
    assert not make_tiny(**form).has_fixed_steps


@pytest.mark.parametrize("max_running", [1, 2, 5])
@torch.inference_mode()
def test_a_pool_that_is_warmed_up_has_its_graphs_and_nobody_in_it(max_running: int) -> None:
    steps, _, model = _on_this_machine({})
    pool = steps.new_pool(max_running)
    steps.warm_up(pool)
    assert len(pool) == 0 and pool.capacity >= max_running
    assert sorted(steps._tokens[pool]) == [1 << i for i in range(pool.capacity.bit_length())]
    for row in range(max_running):
        assert pool.join(model.open(model.new_state())) == row
    assert steps.decode(pool, [5] * max_running).shape[0] == max_running


@torch.inference_mode()
def test_graphs_are_gone_with_their_pool() -> None:
    steps, _, _ = _on_this_machine({})
    pool = steps.new_pool(2)
    steps.warm_up(pool)
    gone = weakref.ref(pool)
    del pool
    gc.collect()
    assert gone() is None and not steps._tokens


def test_there_are_no_graphs_on_a_cpu() -> None:
    assert type(steps_for(make_tiny())) is Steps


@torch.inference_mode()
def test_a_pool_with_room_never_moves() -> None:
    model, pool = make_tiny(), Pool(4)
    stream = model.open(model.new_state())
    pool.join(stream)
    places = [x.data_ptr() for x in pool.first(4).state.parts().values()]
    for row in (1, 2, 3):
        assert pool.join(stream) == row
    for row in (3, 0, 1, 0):
        pool.leave(row)
    pool.join(stream)
    assert [x.data_ptr() for x in pool.first(4).state.parts().values()] == places


@torch.inference_mode()
def test_an_opened_state_can_be_let_go_of_while_its_stream_is_kept() -> None:
    steps, _, model = _on_this_machine({})
    state = model.new_state()
    streams, gone = list(steps.opening(state)), weakref.ref(state)
    del state
    gc.collect()
    assert gone() is None and streams[-1] is not None


def test_where_there_is_no_memory_for_a_graph_documents_are_read_without() -> None:
    class Full(Again):
        num_tries = 0

        def capture(self, step: Callable[[], Any], rehearsal: Callable[[], object]) -> tuple[Again.Graph, Any]:
            self.num_tries += 1
            raise torch.OutOfMemoryError

    model, recorder = make_tiny(), Full()
    steps, parts = GraphSteps(model, recorder), [_tokens(20, seed) for seed in (1, 2)]
    states = plain = [model.new_state() for _ in parts]
    for _ in range(2):
        states, plain = steps.ingest(parts, states), Steps(model).ingest(parts, plain)
    assert recorder.num_tries == 1
    for ours, theirs in zip(states, plain, strict=True):
        for name, x in ours.parts().items():
            assert torch.equal(x, theirs.parts()[name])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@torch.inference_mode()
def test_graphs_on_a_second_gpu_are_captured_there() -> None:
    models = [make_tiny().to(f"cuda:{i}") for i in range(2)]
    parts = [_tokens(20, seed=1)]
    for model in models:
        steps, plain = GraphSteps(model), Steps(model)
        for _ in range(3):
            (ours,), (theirs,) = (each.ingest(parts, [model.new_state()]) for each in (steps, plain))
            for name, x in ours.parts().items():
                torch.testing.assert_close(x, theirs.parts()[name], rtol=1e-4, atol=2e-5)


class Again:
    """A recorder for a CPU: a replay takes the step again and writes the result where the first one was."""

    class Graph:
        def __init__(self, step: Callable[[], Any], results: Any) -> None:
            self._step, self._results = step, results

        def replay(self) -> None:
            for ours, theirs in zip(_tensors(self._results), _tensors(self._step()), strict=True):
                ours.copy_(theirs)

    def capture(self, step: Callable[[], Any], rehearsal: Callable[[], object]) -> tuple[Graph, Any]:
        rehearsal()
        places = rehearsal()  # a capture computes nothing: what the step would have moved stays as it is
        return self.Graph(step, places), places


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, tuple):
        return [x for each in result for x in _tensors(each)]
    found = dict[str, Tensor]()
    if not isinstance(result, Tensor):
        result.map(found.setdefault)
    return list(found.values()) or [result]


def _on_this_machine(form: dict[str, Any]) -> tuple[GraphSteps, Steps, TitansModel]:
    model = make_tiny(**form)
    if torch.cuda.is_available():
        return GraphSteps(model.cuda()), Steps(model), model
    return GraphSteps(model, Again()), Steps(model), model


def _tokens(count: int, seed: int) -> list[int]:
    return torch.randint(3, 259, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@each_form
def test_windows_through_graphs_are_as_without(form: dict[str, Any]) -> None:
    ours, plain, model = _on_this_machine(form)
    window = model.config.window
    for count in (1, 3, 4, 1):
        given = mine = [model.new_state() for _ in range(count)]
        for turn in range(3):
            parts = [_tokens(window, seed=10 * turn + i) for i in range(count)]
            mine, given = ours.ingest(parts, mine), plain.ingest(parts, given)
        for size in (5, 1, window - 3):
            odd = [_tokens(size + i, seed=i) for i in range(count)]
            mine, given = ours.ingest(odd, mine), plain.ingest(odd, given)
        for some, others in zip(mine, given, strict=True):
            for name, x in some.parts().items():
                torch.testing.assert_close(x, others.parts()[name], rtol=1e-4, atol=2e-5)


@each_form
@pytest.mark.parametrize("fused_on", ["cuda", "cpu"], ids=["as on a CPU", "as on a GPU"])
def test_several_windows_in_one_graph_are_as_window_by_window(
    form: dict[str, Any], fused_on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From anywhere in a window; also where a row's last window reaches before what is new, and rows not in use."""
    monkeypatch.setattr("titans.attention._FUSED_ON", fused_on)
    ours, plain, model = _on_this_machine(form)
    widest = ours.largest_block
    assert widest == 4 * model.config.window == 4 * plain.largest_block
    for sizes in ([widest], [7], [widest, widest], [widest - 1], [20, widest, 3], [17], [widest, 1, 60, 33]):
        given = mine = [model.new_state() for _ in sizes]
        for turn, some in enumerate(([5 * i + 1 for i in range(len(sizes))], sizes, sizes[::-1])):
            parts = [_tokens(size, seed=10 * turn + i) for i, size in enumerate(some)]
            mine, given = ours.ingest(parts, mine), plain.ingest(parts, given)
        for some_state, other in zip(mine, given, strict=True):
            for name, x in some_state.parts().items():
                torch.testing.assert_close(x, other.parts()[name], rtol=1e-4, atol=2e-5)
    assert {rows for rows, width, _ in ours._parts if width == widest} == {1, 2, 4}


@each_form
@pytest.mark.parametrize("num_read", [0, 5, 16, 70])
@torch.inference_mode()
def test_sessions_are_opened_and_prompts_read_the_same_through_graphs(form: dict[str, Any], num_read: int) -> None:
    *both, model = _on_this_machine(form)
    state = model.new_state()
    if num_read:
        (state,) = model.ingest(torch.tensor([_tokens(num_read, seed=num_read)], device=model.device), state).split()
    for seed, sizes in enumerate(([1, 16, 3], [model.config.window, 2])):
        streams = [stream for steps in both for stream in steps.opening(state) if stream is not None]
        streams = [stream.clone() for stream in streams]
        for size in sizes:
            given = [steps.read(_tokens(size, seed), stream) for steps, stream in zip(both, streams, strict=True)]
            torch.testing.assert_close(*(hidden for hidden, _ in given), rtol=1e-4, atol=1e-4)
            streams = [stream for _, stream in given]
    for recall in (True, False):
        said = [
            model.logits(model(torch.tensor([[7]], device=model.device), replace(stream, recall=recall))[0])
            for stream in streams
        ]
        torch.testing.assert_close(*said, rtol=1e-4, atol=1e-4)


@each_form
@torch.inference_mode()
def test_answers_that_come_and_go_are_the_same_through_graphs(form: dict[str, Any]) -> None:
    (*both, model), chance = _on_this_machine(form), random.Random(1)
    pairs: list[tuple[Steps, Pool]] = [(steps, steps.new_pool(5)) for steps in both]
    for steps, pool in pairs:
        steps.warm_up(pool)
    for turn in range(30):
        if len(pairs[0][1]) and (len(pairs[0][1]) == 5 or chance.random() < 0.3):
            row = chance.randrange(len(pairs[0][1]))
            for _, pool in pairs:
                pool.leave(row)
        else:
            (state,) = pairs[1][0].ingest([_tokens(7 * turn + 1, seed=turn)], [model.new_state()])
            for _, pool in pairs:
                pool.join(model.open(state))
        if turn % 5 == 4 and len(pairs[0][1]) > 2:
            prompts = [_tokens(size, seed=turn) for size in (1 + turn % 7, 3, 16)]
            begun = zip(*(steps.begin(pool, prompts) for steps, pool in pairs), strict=True)
            for ours, plain in begun:
                torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
        tokens = [chance.randrange(259) for _ in range(len(pairs[0][1]))]
        if tokens:
            ours, plain = (steps.decode(pool, tokens).clone() for steps, pool in pairs)
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
