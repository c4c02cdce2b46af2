"""Runs a step on the model. Owned by the compute thread; knows nothing of queues or clients."""

from typing import NamedTuple

import torch
from titans.model import TitansModel
from titans.packed import is_native
from titans.sampling import Drawn, Sampler, draw_each, told
from titans.state import State, Stream

from titans_server.engine.graphs import steps_for
from titans_server.engine.openings import Openings
from titans_server.engine.pool import Pool
from titans_server.engine.request import Generation, Ingestion


class Prefilled(NamedTuple):
    """What came of a portion of a prompt."""

    told: list[Drawn]  # of its tokens, where somebody asks for them
    first: Drawn | None  # of the answer, at the prompt's end


class Runner:
    """The model, and the streams of the answers that are under way."""

    def __init__(self, model: TitansModel) -> None:
        self._model = model
        self._steps = steps_for(model)
        self._openings = Openings(self._steps)
        self._opening: Generation | None = None  # whose session is being opened, of those that may want the same
        self._prefilling: dict[Generation, Stream] = {}
        self._last_hidden: dict[Generation, torch.Tensor] = {}  # [D], of prompts that are told of
        self._samplers: dict[Generation, Sampler] = {}
        self._last_token: dict[Generation, int] = {}
        self._members: dict[bool, list[Generation]] = {True: [], False: []}  # by recall: rows of the pool
        self._pools = dict[bool, Pool]()  # likewise
        self.make_room(1)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._model.device

    @property
    def is_native(self) -> bool:
        """Whether torch is left with what is small."""
        return is_native(self._model)

    @property
    def window(self) -> int:
        """Tokens that the model takes at once."""
        return self._model.config.window

    @property
    def chunk(self) -> int:
        """Tokens that its memories learn together: the least that is worth a call."""
        return min(self._model.config.memory.chunk_size, self.window)

    @property
    def largest_block(self) -> int:
        """Tokens of a document that are read at once, where few documents wait."""
        return self._steps.largest_block

    @property
    def ingest_budget(self) -> int:
        """Tokens after which more at once are no faster: on a CPU one window's keep it busy (measured)."""
        return self.window if self._model.device.type == "cpu" else 16 * self.window

    def new_state(self) -> State:
        """A session that has read nothing."""
        return self._model.new_state()

    def make_room(self, max_running: int) -> None:
        """Get ready for so many answers at once; before the first one."""
        self._pools = {recall: self._steps.new_pool(max_running) for recall in (True, False)}

    def warm_up(self) -> None:
        """Take the first steps, so that no request waits for what is only made once. After `make_room`."""
        self._steps.warm_up(self._pools[True])

    def ingest(self, chunks: list[tuple[Ingestion, int]]) -> None:
        """A portion of each document, all in one batch; each request then holds its new state."""
        for request, _ in chunks:
            if not request.num_done:
                request.before = request.state = request.state.to(self.device)
        parts = [r.tokens[r.num_done : r.num_done + size] for r, size in chunks]
        states = self._steps.ingest(parts, [r.state for r, _ in chunks])
        for (request, size), state in zip(chunks, states, strict=True):
            request.state = state
            request.num_done += size
            if request.num_done == len(request.tokens):
                self._openings.expect(state)

    @property
    def has_spare_work(self) -> bool:
        """Whether there is something to do that nobody waits for."""
        return self._openings.has_expected()

    @torch.inference_mode()
    def prepare(self) -> None:
        """Do a little of it."""
        self._openings.prepare()

    @torch.inference_mode()
    def surprise(self, request: Ingestion) -> float:
        """How far a token moved the memories' weights, on average: |M' - M| over all of them, by the tokens read.

        Eq. 13 moves M by the surprise S, and by forgetting.
        """
        before, after = request.before.parts(), request.state.parts()
        squares = [(after[x] - before[x]).square().sum() for x in after if x.endswith(".weights")]
        return float(torch.stack(squares).sum().sqrt()) / len(request.tokens)

    def is_open(self, request: Generation) -> bool:
        """Whether its prompt can be read."""
        return request in self._prefilling or self._openings.is_open(request.state)

    @torch.inference_mode()
    def open(self, request: Generation, seconds: float) -> None:
        """Go on opening its session, for so many seconds."""
        self._opening = request
        self._openings.open(request.state, seconds)

    @torch.inference_mode()
    def prefill(self, parts: list[tuple[Generation, int]]) -> dict[Generation, Prefilled]:
        """Read so many tokens of prompts whose sessions are open; of several, all that is left of each."""
        (first, size), *others = parts
        if not others and first.num_read + size < len(first.prompt):
            return {first: Prefilled(self._read(first, size), None)}
        prefilled: dict[Generation, Prefilled] = {}
        for recall, pool in self._pools.items():
            beginning = [request for request, _ in parts if request.recall == recall]
            for request in beginning:
                pool.join(self._stream(request))
                self._members[recall].append(request)
            if beginning:
                prefilled |= self._begin(beginning, pool)
        return prefilled

    def _stream(self, request: Generation) -> Stream:
        """As far as its prompt has been read; to be copied, for it may be others', too."""
        reading = self._prefilling.pop(request, None)
        return reading or self._openings.stream(request.state, recall=request.recall)

    def _read(self, request: Generation, size: int) -> list[Drawn]:
        """The next tokens of a prompt, but not its last: what is to be told of them."""
        tokens = request.prompt[request.num_read : request.num_read + size]
        hidden_TD, self._prefilling[request] = self._steps.read(tokens, self._stream(request).clone())
        request.num_read += size
        return self._told(request, tokens, hidden_TD)

    def _begin(self, requests: list[Generation], pool: Pool) -> dict[Generation, Prefilled]:
        """Read what is left of the prompts of those that joined a pool last."""
        rest = [request.prompt[request.num_read :] for request in requests]
        hidden = self._steps.begin(pool, rest)
        prefilled: dict[Generation, list[Drawn]] = {}
        for request, tokens, hidden_TD in zip(requests, rest, hidden, strict=True):
            request.num_read += len(tokens)
            self._samplers[request] = Sampler(request.sampling)
            prefilled[request] = self._told(request, tokens, hidden_TD)
        first = self._sample(requests, self._model.logits(torch.stack([hidden_TD[-1] for hidden_TD in hidden])))
        return {request: Prefilled(told, first[request]) for request, told in prefilled.items()}

    def _told(self, request: Generation, tokens: list[int], hidden_TD: torch.Tensor) -> list[Drawn]:
        """A prompt's tokens, each with its probability after those before it; none where nobody asks for them."""
        if not request.echo:
            return []
        num_top, before_D = request.sampling.num_logprobs, self._last_hidden.pop(request, None)
        if num_top is None:
            return [Drawn(token) for token in tokens]
        self._last_hidden[request] = hidden_TD[-1]
        first = [Drawn(tokens[0])] if before_D is None else []
        rows = hidden_TD[:-1] if before_D is None else torch.cat([before_D[None], hidden_TD[:-1]])
        scored = zip(rows, tokens[len(first) :], strict=True)  # a row at a time: the vocabulary is large
        return first + [told(self._model.logits(row).cpu(), token, num_top) for row, token in scored]

    @torch.inference_mode()
    def decode(self, requests: list[Generation]) -> dict[Generation, Drawn]:
        """The next token of each running answer."""
        assert {r for members in self._members.values() for r in members} == set(requests)
        drawn: dict[Generation, Drawn] = {}
        for recall, members in self._members.items():
            if not members:
                continue
            scores = self._steps.decode(self._pools[recall], [self._last_token[r] for r in members])
            drawn |= self._sample(members, scores)
        return drawn

    @torch.inference_mode()
    def forget(self, request: Generation) -> None:
        """Let go of a request's stream."""
        if request is self._opening:
            self._opening = None
            self._openings.abandon(request.state)
        self._prefilling.pop(request, None)
        self._last_hidden.pop(request, None)
        self._samplers.pop(request, None)
        self._last_token.pop(request, None)
        members = self._members[request.recall]
        if request in members:
            row = members.index(request)
            self._pools[request.recall].leave(row)
            last = members.pop()
            if last is not request:
                members[row] = last

    def _sample(self, requests: list[Generation], scores_BN: torch.Tensor) -> dict[Generation, Drawn]:
        samplers = [self._samplers[request] for request in requests]
        each = draw_each(samplers, scores_BN, self._model.pick)
        drawn = dict(zip(requests, each, strict=True))
        self._last_token |= {request: one.token for request, one in drawn.items()}
        return drawn
