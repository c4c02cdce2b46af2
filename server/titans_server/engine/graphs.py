"""The steps of a model on a CUDA device, one launch each: CUDA graphs, captured once and replayed in place.

A step of a small model is over a thousand small kernels, and to launch them one by one takes longer than to run them. A
graph is one launch, but always the same kernels on the same memory: so answers keep their rows in a pool that does not
move, documents pass through buffers, and there is a graph for 1, 2, 4, 8 ... rows, those not in use computing nothing
that is looked at. Owned by the compute thread.
"""

from collections.abc import Callable
from functools import partial
from typing import Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from titans.model import TitansModel
from titans.state import State, Stream
from torch import Tensor

from titans_server.engine.pool import Pool
from titans_server.engine.steps import Steps, scores_after

_T = TypeVar("_T")


def steps_for(model: TitansModel) -> Steps:
    """The fastest there are for a model where it is."""
    return GraphSteps(model) if model.device.type == "cuda" and model.has_fixed_steps else Steps(model)


class GraphSteps(Steps):
    """Steps of one token of every answer, and of a whole window of every document; others as ever."""

    def __init__(self, model: TitansModel, recorder: "Recorder | None" = None) -> None:
        super().__init__(model)
        self._recorder = recorder or CUDARecorder(model.device)
        self._tokens = WeakKeyDictionary[Pool, dict[int, TokenGraph]]()
        self._windows: dict[int, WindowGraph] = {}

    def new_pool(self, max_running: int) -> Pool:
        """See Steps."""
        return Pool(_at_least(max(max_running, 2)))  # two come when it is warmed up

    def warm_up(self, pool: Pool) -> None:
        """See Steps: all that answers with the memory may need, and a document by itself."""
        super().warm_up(pool)
        rows = 1
        while rows <= pool.capacity:
            with torch.inference_mode():
                self._token(pool, rows)
            rows *= 2
        self._window(1)

    def decode(self, pool: Pool, tokens: list[int]) -> Tensor:
        """See Steps."""
        return self._token(pool, _at_least(len(tokens)))(tokens)

    def ingest(self, parts: list[list[int]], states: list[State]) -> list[State]:
        """See Steps."""
        if any(len(part) != self._model.config.window for part in parts):
            return super().ingest(parts, states)
        return self._window(_at_least(len(parts)))(parts, states)

    def _token(self, pool: Pool, rows: int) -> "TokenGraph":
        graphs = self._tokens.setdefault(pool, {})
        if rows not in graphs:
            graphs[rows] = TokenGraph(self._model, pool.first(rows), self._recorder)
        return graphs[rows]

    def _window(self, rows: int) -> "WindowGraph":
        if rows not in self._windows:
            self._windows[rows] = WindowGraph(self._model, rows, self._recorder)
        return self._windows[rows]


class TokenGraph:
    """One token more of B streams, which move on in their places."""

    def __init__(self, model: TitansModel, stream: Stream, recorder: "Recorder") -> None:
        """`stream`: the places."""
        self._recorder = recorder
        self._tokens_B1 = torch.zeros(stream.state.batch_size, 1, dtype=torch.int64, device=model.device)
        copy = stream.map(lambda _, x: x.clone())
        self._graph, self._scores_BN = recorder.capture(
            *(partial(scores_after, model, self._tokens_B1, each) for each in (stream, copy))
        )
        self._told_BN = recorder.host_buffer(self._scores_BN)

    def __call__(self, tokens: list[int]) -> Tensor:
        """The scores of the first rows, [tokens, N], in memory of the host that the next call writes to again."""
        count = len(tokens)
        self._tokens_B1[:count].copy_(torch.tensor(tokens)[:, None])
        self._graph.replay()
        told = self._told_BN[:count].copy_(self._scores_BN[:count], non_blocking=True)
        self._recorder.wait()
        return told


class WindowGraph:
    """A window's tokens into B sessions."""

    def __init__(self, model: TitansModel, rows: int, recorder: "Recorder") -> None:
        with torch.inference_mode(mode=False), torch.no_grad():
            self._tokens_BT = torch.zeros(rows, model.config.window, dtype=torch.int64, device=model.device)
            self._before = model.new_state(rows).clone()

            def step() -> State:
                return model.ingest(self._tokens_BT, self._before)

            self._graph, self._after = recorder.capture(step, step)

    @torch.no_grad()
    def __call__(self, parts: list[list[int]], states: list[State]) -> list[State]:
        """The states after their windows; copies."""
        count, every = len(states), [state.parts() for state in states]
        for name, x in self._before.parts().items():
            torch.cat([each[name] for each in every], out=x[:count])
        self._tokens_BT[:count].copy_(torch.tensor(parts))
        self._graph.replay()
        return self._after.map(lambda _, x: x[:count]).split()


class Graph(Protocol):
    """A step that was recorded."""

    def replay(self) -> None:
        """Take it again."""


class Recorder(Protocol):
    """Makes graphs on one device."""

    def capture(self, step: Callable[[], _T], rehearsal: Callable[[], object]) -> tuple[Graph, _T]:
        """A graph of a step, and what the step returns, which each replay writes again.

        `rehearsal`: the same step on other tensors, for what libraries do only once.
        """

    def host_buffer(self, like: Tensor) -> Tensor:
        """Memory of the host to copy such a tensor to."""

    def wait(self) -> None:
        """Until what has been asked for is done."""


class CUDARecorder:
    """See Recorder. Its graphs share what memory they need, for they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.cuda.graph_pool_handle()

    def capture(self, step: Callable[[], _T], rehearsal: Callable[[], object]) -> tuple[Graph, _T]:
        """See Recorder. Other threads may use the device meanwhile."""
        with torch.cuda.device(self._device):
            aside, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                rehearsal()
            torch.cuda.current_stream().wait_stream(aside)
            with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
                result = step()
        return graph, result

    def host_buffer(self, like: Tensor) -> Tensor:
        """See Recorder: pinned, so that the device writes to it by itself."""
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)

    def wait(self) -> None:
        """See Recorder."""
        torch.cuda.current_stream(self._device).synchronize()


def _at_least(count: int) -> int:
    """The first power of two that is not below."""
    return 1 << (count - 1).bit_length()
