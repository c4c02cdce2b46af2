"""The steps of a model on a CUDA device, one launch each: CUDA graphs, captured once and replayed in place.

A step of a small model is over a thousand small kernels, and to launch them one by one takes longer than to run them. A
graph is one launch, but always the same kernels on the same memory: so answers keep their rows in a pool that does not
move, documents and prompts pass through buffers, and there are graphs for 1, 2, 4, 8 ... rows and for a few widths;
what is not in use of them computes nothing that is looked at. Owned by the compute thread.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from titans.model import TitansModel
from titans.state import State, Stream
from torch import Tensor

from titans_server.engine.pool import Pool, move_on
from titans_server.engine.steps import Steps, scores_after

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_WIDTHS = 16, 64  # tokens of a row, beside a window's
_WINDOWS_AT_ONCE = 4  # of a document
_capturing = threading.Lock()  # held by the thread that does: torch captures one graph at a time in a process


def steps_for(model: TitansModel) -> Steps:
    """The fastest there are for a model where it is."""
    return GraphSteps(model) if model.device.type == "cuda" and model.has_fixed_steps else Steps(model)


class GraphSteps(Steps):
    """A token of every answer, up to a window of every document and of a prompt, a session's opening.

    Of few documents up to four windows: the layers below the memory take about as many kernels for them as for one.
    """

    def __init__(self, model: TitansModel, recorder: "Recorder | None" = None) -> None:
        super().__init__(model)
        self._recorder = recorder or CUDARecorder(model.device)
        self._tokens = WeakKeyDictionary[Pool, dict[int, TokenGraph]]()
        self._widths = *(x for x in _WIDTHS if x < model.config.window), model.config.window
        self._part_widths = *self._widths, self.largest_block
        self._parts: dict[tuple[int, int, bool], PartGraph | None] = {}  # None: the device has no memory for it
        self._prompts: dict[int, PromptGraph] = {}
        self._opening: OpeningGraph | None = None

    @property
    def largest_block(self) -> int:
        """See Steps."""
        return _WINDOWS_AT_ONCE * self._model.config.window

    def new_pool(self, max_running: int) -> Pool:
        """See Steps."""
        return Pool(_at_least(max(max_running, 2)))  # two come when it is warmed up

    def warm_up(self, pool: Pool) -> None:
        """See Steps: all that answers with the memory may need, and a document by itself."""
        for width in self._part_widths:
            for ragged in (True, False):
                self._part(1, width, ragged)
        with torch.inference_mode():
            for width in self._widths:
                self.read([0] * width, self._open())
        super().warm_up(pool)
        rows = 1
        while rows <= pool.capacity:
            with torch.inference_mode():
                self._token(pool, rows)
            rows *= 2

    def decode(self, pool: Pool, tokens: list[int]) -> Tensor:
        """See Steps."""
        return self._token(pool, _at_least(len(tokens)))(tokens)

    def ingest(self, parts: list[list[int]], states: list[State]) -> list[State]:
        """See Steps."""
        width = _fitting(self._part_widths, max(len(part) for part in parts))
        graph = self._part(_at_least(len(parts)), width, any(len(part) != width for part in parts))
        return graph(parts, states) if graph else super().ingest(parts, states)

    def opening(self, state: State) -> Iterator[Stream | None]:
        """See Steps: all at once."""
        self._opening = self._opening or OpeningGraph(self._model, self._recorder)
        yield self._opening(state.to(self._model.device))

    def read(self, tokens: list[int], stream: Stream) -> tuple[Tensor, Stream]:
        """See Steps."""
        if stream.write or not stream.recall:
            return super().read(tokens, stream)
        width = _fitting(self._widths, len(tokens))
        if width not in self._prompts:
            self._prompts[width] = PromptGraph(self._model, width, stream, self._recorder)
        return self._prompts[width](tokens, stream)

    def begin(self, pool: Pool, prompts: list[list[int]]) -> list[Tensor]:
        """See Steps: one after the other."""
        every = []
        for row, prompt in enumerate(prompts, -len(prompts)):
            place = pool.last(-row).map(lambda _, x: x[:1])
            hidden_TD, after = self.read(prompt, place)
            move_on(place, after)
            every.append(hidden_TD)
        return every

    def _token(self, pool: Pool, rows: int) -> "TokenGraph":
        graphs = self._tokens.setdefault(pool, {})
        if rows not in graphs:
            graphs[rows] = TokenGraph(self._model, pool.first(rows), self._recorder)
        return graphs[rows]

    def _part(self, rows: int, width: int, ragged: bool) -> "PartGraph | None":
        if (key := (rows, width, ragged)) not in self._parts:
            try:
                self._parts[key] = PartGraph(self._model, *key, self._recorder)
            except torch.OutOfMemoryError:
                log.warning(
                    "no memory for a graph of %d documents, %d tokens each: kernel by kernel instead", rows, width
                )
                self._parts[key] = None
        return self._parts[key]


class TokenGraph:
    """One token more of B streams, which move on in their places."""

    def __init__(self, model: TitansModel, stream: Stream, recorder: "Recorder") -> None:
        """`stream`: the places."""
        self._tokens_B1 = torch.zeros(stream.state.batch_size, 1, dtype=torch.int64, device=model.device)
        copy = stream.clone()
        self._graph, self._scores_BN = recorder.capture(
            *(partial(scores_after, model, self._tokens_B1, each) for each in (stream, copy))
        )

    def __call__(self, tokens: list[int]) -> Tensor:
        """The scores of the first rows, [tokens, N], where the next call writes again."""
        self._tokens_B1[: len(tokens)].copy_(torch.tensor(tokens)[:, None])
        self._graph.replay()
        return self._scores_BN[: len(tokens)]


class PartGraph:
    """Parts of documents into B sessions: T tokens each or, where it is ragged, up to T."""

    def __init__(self, model: TitansModel, rows: int, width: int, ragged: bool, recorder: "Recorder") -> None:
        with torch.inference_mode(mode=False), torch.no_grad():
            self._tokens_BT = torch.zeros(rows, width, dtype=torch.int64, device=model.device)
            self._lengths_B = torch.zeros(rows, dtype=torch.int64, device=model.device) if ragged else None
            self._before = model.new_state(rows).clone()

            def step() -> State:
                return model.ingest(self._tokens_BT, self._before, self._lengths_B, at_once=width)

            self._graph, self._after = recorder.capture(step, step)

    @torch.no_grad()
    def __call__(self, parts: list[list[int]], states: list[State]) -> list[State]:
        """The states after their parts; copies."""
        count, every = len(states), [state.parts() for state in states]
        for name, x in self._before.parts().items():
            torch.cat([each[name] for each in every], out=x[:count])
        _fill(self._tokens_BT, self._lengths_B, parts)
        self._graph.replay()
        return self._after.map(lambda _, x: x[:count]).split()


class OpeningGraph:
    """A session's last window through the layers above its memory."""

    def __init__(self, model: TitansModel, recorder: "Recorder") -> None:
        self._before = model.new_state().clone()

        def step() -> Stream:
            *_, stream = model.opening(self._before)
            assert stream is not None
            return stream

        self._graph, self._opened = recorder.capture(step, step)

    def __call__(self, state: State) -> Stream:
        """A stream on a state; it shares with it what `TitansModel.opening` lets them share."""
        self._before.position.copy_(state.position)
        self._before.tail.copy_(state.tail)
        self._graph.replay()
        upper = tuple({name: x.clone() for name, x in parts.items()} for parts in self._opened.upper)
        # not the state itself: whoever keeps the stream would keep from it that nobody needs the state any more
        return Stream(replace(state), upper, write=False, recall=True)


class PromptGraph:
    """Up to T tokens more of a stream."""

    def __init__(self, model: TitansModel, width: int, stream: Stream, recorder: "Recorder") -> None:
        """`stream`: any that reads as all will."""
        self._tokens_1T = torch.zeros(1, width, dtype=torch.int64, device=model.device)
        self._lengths_1 = torch.zeros(1, dtype=torch.int64, device=model.device)
        self._stream = stream.clone()

        def step() -> tuple[Tensor, Stream]:
            hidden_1TD, after = model(self._tokens_1T, self._stream, self._lengths_1)
            return hidden_1TD, after

        self._graph, (self._hidden_1TD, self._after) = recorder.capture(step, step)

    def __call__(self, tokens: list[int], stream: Stream) -> tuple[Tensor, Stream]:
        """Hidden states [tokens, D] and the stream after them: copies."""
        move_on(self._stream, stream)
        _fill(self._tokens_1T, self._lengths_1, [tokens])
        self._graph.replay()
        return self._hidden_1TD[0, : len(tokens)].clone(), self._after.clone()


def _fill(tokens_BT: Tensor, lengths_B: Tensor | None, parts: list[list[int]]) -> None:
    """Put parts in the first rows; the others are empty."""
    width = tokens_BT.shape[1]
    tokens_BT[: len(parts)].copy_(torch.tensor([part + [0] * (width - len(part)) for part in parts]))
    if lengths_B is not None:
        lengths_B.copy_(torch.tensor([len(part) for part in parts] + [0] * (len(lengths_B) - len(parts))))


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


class CUDARecorder:
    """See Recorder. Its graphs share what memory they need, for they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # torch's own for captures is on whichever device comes first

    def capture(self, step: Callable[[], _T], rehearsal: Callable[[], object]) -> tuple[Graph, _T]:
        """See Recorder. Other threads may use the device meanwhile."""
        with _capturing, torch.cuda.device(self._device):
            graph = torch.cuda.CUDAGraph()
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                rehearsal()
            torch.cuda.current_stream().wait_stream(self._stream)
            with torch.cuda.graph(graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"):
                result = step()
        return graph, result


def _fitting(widths: Iterable[int], count: int) -> int:
    """The first that is not below."""
    return next(width for width in widths if width >= count)


def _at_least(count: int) -> int:
    """The first power of two that is not below."""
    return 1 << (count - 1).bit_length()
