r"""A Titans model: a body, and memories that stand where its config says (`titans.architecture`).

    tokens -> layers up to the last memory -> layers above it -> logits
              \__ ingest runs these __/   \___ readout, if any ___/

What a memory is written with does not depend on the layers above it, so `ingest` runs neither those nor the head.
Reading (`open`, then `forward`) runs all, and leaves the session's own state alone.

Shapes: B sessions · T tokens · D hidden · N vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from titans.architecture import (
    AttentionLayer,
    Call,
    ContextLayer,
    GatedLayer,
    Layer,
    MemoryAloneLayer,
    MemoryLayer,
    Run,
)
from titans.attention import Placement
from titans.config import TitansConfig
from titans.layers import RMSNorm
from titans.memory.neural import NeuralMemory
from titans.sampling import Pick
from titans.state import Parts, State, Stream

Lengths = Sequence[int] | Tensor

# some of the layers: hidden states [B, T, D] and what the layers carry, to the same
Walk = Callable[[Tensor, Run, Sequence[Parts]], tuple[Tensor, tuple[Parts, ...]]]


class Walks(NamedTuple):
    """A faster way through a model's layers than the layers themselves; rings are written in place."""

    below: Walk  # the last memory
    above: Walk
    each_above: tuple[Walk, ...]  # the same, layer by layer
    finish: Callable[[Tensor, Tensor | None], Tensor]  # `TitansModel.finish`


_WITH_MEMORY: dict[str, type[Layer]] = {
    "mac": ContextLayer,
    "mag": GatedLayer,
    "mal": AttentionLayer,
    "lmm": MemoryAloneLayer,
}


class TitansModel(nn.Module):
    """The body, its memories, and the ways to run them.

    As made, its weights are random and float32: `titans.checkpoint.build` puts a body in, `ready` moves it to where it
    runs and sets its sinks, `load` does all of it.
    """

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        body = config.backbone
        self.config = config
        # True: activations are computed again in the backward pass. Rings move on in place, so its gradients are right
        # for one call on a stream that has read nothing: for whole documents.
        self.checkpointing = False
        self.embedding = nn.Embedding(body.vocab_size, body.hidden_size)
        kinds = [
            _WITH_MEMORY[config.architecture] if i in config.memory_layers else AttentionLayer
            for i in range(body.num_layers)
        ]
        self.layers = cast(Sequence[Layer], nn.ModuleList(kind(config) for kind in kinds))
        in_front = config.memory_layers if config.architecture == "mal" else ()
        self.memory_layers = nn.ModuleDict({str(i): MemoryLayer(config) for i in in_front})
        self.norm = RMSNorm(body.hidden_size, body.norm_eps)
        self.head = nn.Linear(body.hidden_size, body.vocab_size, bias=False)
        if body.tie_embeddings:
            self.head.weight = self.embedding.weight
        steps = tuple(self._steps())
        last = max(i for i, step in enumerate(steps) if step.memories)
        self.lower, self.upper = steps[: last + 1], steps[last + 1 :]
        self.readout = Readout(body.hidden_size) if config.readout else None
        self.walks: Walks | None = None  # where there are any (`titans.packed`)
        self.pick: Pick | None = None  # likewise, in place of `titans.sampling.pick`

    @property
    def dtype(self) -> torch.dtype:
        """What the body computes in, and what a state keeps its windows in; memories' weights are float32."""
        return self.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.embedding.weight.device

    @property
    def memories(self) -> list[NeuralMemory]:
        """In the order in which tokens pass them."""
        return [memory for step in self.lower for memory in step.memories]

    @property
    def has_fixed_steps(self) -> bool:
        """Whether a step is the same operations whatever it is given: any tokens of any rows, as many or not.

        Then nothing in it waits for a device that is not a CPU, and a CUDA graph can hold it. Segments of a MAC, and
        chunks of the chunk rule, end where a row's own do.
        """
        return self.config.architecture != "mac" and not any(memory.rule.bound_to_chunks for memory in self.memories)

    @property
    def adapted(self) -> dict[str, nn.Parameter]:
        """What of the body is trained beside its memories, by name: none, unless the config says so.

        The norms and persistent tokens of the layers above the last memory: a few thousand floats that cost nothing
        more to run with. Float32.
        """
        if not self.config.adapted:
            return {}
        above = tuple(f"layers.{i}." for i in range(len(self.layers) - len(self.upper), len(self.layers)))
        kinds = ("norm.weight", "persistent_keys", "persistent_values")
        return {
            name: x
            for name, x in self.named_parameters()
            if name.startswith((*above, "norm.")) and name.endswith(kinds)
        }

    def new_state(self, batch: int = 1) -> State:
        """Sessions that have read nothing. The memories' weights are views of those that they start from."""
        num_tail = self.config.window if self.upper else 0
        return State(
            position=torch.zeros(batch, dtype=torch.int64, device=self.device),
            layers=tuple(step.new_parts(batch, self.dtype) for step in self.lower),
            tail=torch.zeros(batch, num_tail, self.norm.weight.shape[0], dtype=self.dtype, device=self.device),
        )

    @torch.no_grad()
    def ingest(
        self,
        tokens_BT: Tensor,
        state: State,
        lengths: Lengths | None = None,
        *,
        recall: bool = True,
        at_once: int | None = None,
    ) -> State:
        """The states after reading the first `lengths[b]` tokens of each row (all by default); `state` is not changed.

        Tokens are [B, T], int64 or int32; padding, too, must be in the vocabulary. `lengths`: one a row, 0 to T; as a
        tensor [B] int64, where the model is, nothing waits for the device.
        Runs the layers up to the last memory and writes the memories; any number of tokens, `at_once` of them at a
        time, by default a window: the result is the same. More than a window only where there are no `walks`.
        `recall=False`: the memories answer nothing to the layers above them (the control).
        """
        state, most = state.clone(), self.config.window if at_once is None else at_once
        assert self.walks is None or most <= self.config.window
        for columns_BT, counts_B in self._runs(state, tokens_BT, lengths, most):
            call = self.place(state.position, counts_B, columns_BT.shape[1], write=True, recall=recall)
            state = self._ingest_run(tokens_BT.gather(1, columns_BT), state, call)
        return state

    def _ingest_run(self, tokens_BT: Tensor, state: State, call: Call) -> State:
        below = self.walks.below if self.walks else partial(self._walk, self.lower[:-1])
        h_BTD, layers = below(self.embedding(tokens_BT), call, state.layers[:-1])
        h_BTD, last = self.lower[-1].learn(h_BTD, call, state.layers[-1])
        if self.upper:
            kept_BND, slots_BN1 = call.place.kept(h_BTD), call.place.slots[..., None]
            if call.place.counted is not None:
                kept_BND = kept_BND.where(call.place.counted, state.tail.take_along_dim(slots_BN1, dim=1))
            state.tail.scatter_(1, slots_BN1.expand_as(kept_BND), kept_BND)
        return State(call.after(tokens_BT.shape[1]), (*layers, last), state.tail)

    def open(self, state: State, *, recall: bool = True, write: bool = False) -> Stream:
        """Begin to read from sessions: the layers above the last memory look at the last window.

        `state` comes from `new_state` or `ingest`, not from a stream, and is not changed.
        `write`: the stream learns what it reads. `recall=False`: the memories answer nothing from here on.
        """
        *_, stream = self.opening(state, write=write)
        assert stream is not None
        return Stream(stream.state.clone(), stream.upper, write, recall)

    def opening(self, state: State, *, write: bool = False) -> Iterator[Stream | None]:
        """`open` bit by bit, a layer at a time, for those who have other things to do meanwhile; the stream is last.

        It shares tensors with the state: it is to be copied before it moves on.
        """
        if not write:
            layers = (step.settle(parts, state.position) for step, parts in zip(self.lower, state.layers, strict=True))
            state = State(state.position, tuple(layers), state.tail)
        upper = [step.new_parts(state.batch_size, self.dtype) for step in self.upper]
        length = self.config.window if self.upper else 0
        if length and self.device.type == "cpu":  # elsewhere to look is dearer than to compute what nobody sees
            length = int(state.position.max().clamp(max=length))
        if length:  # oldest first; columns before a session's first token are masked by their position
            start_B = state.position - length
            slots = (start_B[:, None] + torch.arange(length, device=self.device)) % self.config.window
            h_BTD = state.tail.take_along_dim(slots[..., None], dim=1)
            call = self.place(start_B, None, length)
            walks: Sequence[Walk] = (
                self.walks.each_above if self.walks else [partial(self._walk, [step]) for step in self.upper]
            )
            for i, walk in enumerate(walks):
                h_BTD, upper[i : i + 1] = walk(h_BTD, call, upper[i : i + 1])
                yield None
        yield Stream(state, tuple(upper), write, recall=True)

    def forward(self, tokens_BT: Tensor, stream: Stream, lengths: Lengths | None = None) -> tuple[Tensor, Stream]:
        """Hidden states [B, T, D] of tokens that follow a stream, normed, and the stream after them.

        `logits` scores them.

        Each token reads the memories; where the stream writes it is learnt first, and the stream's state is then what
        `ingest` makes of the tokens, but for its tail. Tokens and `lengths` as in `ingest`, T 1 or more; past a row's
        length, hidden states are 0 in a MAC and mean nothing elsewhere. Gradients flow between the tokens of one call
        (in a MAC: of one segment), and through the memories from call to call. The stream given must not be used again:
        its rings have moved on.
        """
        if self.config.architecture != "mac":
            return self._read_run(tokens_BT, stream, None if lengths is None else self._counted(lengths))
        batch, num_tokens = tokens_BT.shape
        h_BTD = torch.zeros(batch, num_tokens, self.norm.weight.shape[0], dtype=self.dtype, device=self.device)
        for columns_BT, counts_B in self._runs(stream.state, tokens_BT, lengths, num_tokens):
            assert counts_B is not None
            run_BTD, stream = self._read_run(tokens_BT.gather(1, columns_BT), stream, counts_B)
            counted_BT = torch.arange(run_BTD.shape[1], device=self.device) < counts_B[:, None]
            rows, columns = counted_BT.nonzero(as_tuple=True)
            h_BTD = h_BTD.index_put((rows, columns_BT[rows, columns]), run_BTD[rows, columns])
        return h_BTD, stream

    def _read_run(self, tokens_BT: Tensor, stream: Stream, lengths_B: Tensor | None) -> tuple[Tensor, Stream]:
        state, upper = stream.state, stream.upper
        if self.walks:
            run, below, above = Run(state.position, lengths_B, stream.write, stream.recall), *self.walks[:2]
        else:
            run = self.place(state.position, lengths_B, tokens_BT.shape[1], write=stream.write, recall=stream.recall)
            below, above = partial(self._walk, self.lower[:-1]), partial(self._walk, self.upper)
        h_BTD, layers = below(self.embedding(tokens_BT), run, state.layers[:-1])
        h_BTD, last, y_BTD = self._consult(h_BTD, run, state.layers[-1])
        h_BTD, upper = above(h_BTD, run, upper)
        state = State(run.after(tokens_BT.shape[1]), (*layers, last), state.tail)
        return self.finish(h_BTD, y_BTD), Stream(state, upper, stream.write, stream.recall)

    def _consult(self, h_BTD: Tensor, call: Run, parts: Parts) -> tuple[Tensor, Parts, Tensor | None]:
        """The layer of the last memory: hidden states, parts and, where there is a readout, what the memory answers."""
        if self.readout is None:
            h_BTD, (last,) = self._walk(self.lower[-1:], h_BTD, call, (parts,))
            return h_BTD, last, None
        y_BTD, last = cast(MemoryLayer, self.lower[-1]).answer(h_BTD, call, parts)
        return h_BTD + y_BTD, last, y_BTD

    def finish(self, h: Tensor, y: Tensor | None = None) -> Tensor:
        """What `logits` scores, from what the last layer leaves and the last memory answers; both are [..., D]."""
        if self.walks:
            return self.walks.finish(h, y)
        h = self.norm(h)
        return h if self.readout is None or y is None else h + self.readout(y)

    def logits(self, h: Tensor) -> Tensor:
        """[..., D] hidden states, as `forward` returns them, to [..., N] scores, float32."""
        return self.head(h).float()  # type: ignore[no-any-return]

    def place(
        self, position_B: Tensor, lengths_B: Tensor | None, num_tokens: int, *, write: bool = False, recall: bool = True
    ) -> Call:
        """Where `num_tokens` columns stand after `position_B` tokens; row b uses its first `lengths_B[b]`, or all.

        Both are [B] int64.
        """
        body = self.config.backbone
        place = Placement.place(
            position_B,
            lengths_B,
            num_tokens,
            window=self.config.window,
            num_kv_heads=body.num_kv_heads,
            head_dim=body.head_dim,
            theta=body.rope_theta,
            segmented=self.config.architecture == "mac",
        )
        return Call(position_B, lengths_B, write, recall, place)

    @torch.no_grad()
    def set_sinks(self) -> None:
        """Run the bos token once: its keys and values are what every later token can always look at.

        Changes the persistent tokens of every layer in place; run it again when the body's weights have changed. Raises
        AssertionError where a layer has more than one, which are trained and not set; where it has none, does nothing.
        """
        if not self.config.num_persistent:
            return
        assert self.config.num_persistent == 1, "a pretrained body has one: its bos token"
        token = torch.tensor([[self.config.backbone.bos_token]], device=self.device)
        h_BTD = self.embedding(token)
        for layer in self.layers:
            if isinstance(layer, AttentionLayer):
                attention = layer.attention
                _, key, value = attention.split(layer.attention_norm(h_BTD))
                attention.persistent_keys.copy_(key[0])
                attention.persistent_values.copy_(value[0])
                alone = value.repeat_interleave(attention.num_heads // attention.num_kv_heads, dim=2)
                h_BTD = h_BTD + attention.out(alone.flatten(2))
                h_BTD = h_BTD + layer.mlp(layer.mlp_norm(h_BTD))

    def _steps(self) -> Iterator[Layer]:
        for i, layer in enumerate(self.layers):
            if str(i) in self.memory_layers:
                yield cast(Layer, self.memory_layers[str(i)])
            yield layer

    def _walk(
        self, steps: Sequence[Layer], h_BTD: Tensor, call: Run, parts: Sequence[Parts]
    ) -> tuple[Tensor, tuple[Parts, ...]]:
        """Hidden states through some of the layers, and what the layers then carry."""
        after = []
        for step, before in zip(steps, parts, strict=True):
            run = partial(checkpoint, step, use_reentrant=False) if self.checkpointing else step
            h_BTD, moved = run(h_BTD, call, before)
            after.append(moved)
        return h_BTD, tuple(after)

    def _counted(self, lengths: Lengths) -> Tensor:
        return torch.as_tensor(lengths, dtype=torch.int64, device=self.device)

    def _runs(
        self, state: State, tokens_BT: Tensor, lengths: Lengths | None, most: int
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Columns [B, T] and counts [B] of one run of tokens after the other, `most` tokens each at most.

        Counts are None where all of a run's columns count. In a MAC no run crosses the end of a row's segment.
        """
        batch, num_tokens = tokens_BT.shape
        if self.config.architecture != "mac":
            lengths_B = None if lengths is None else self._counted(lengths)
            for start in range(0, num_tokens, most):
                columns_T = torch.arange(start, min(start + most, num_tokens), device=self.device)
                counts_B = None if lengths_B is None else (lengths_B - start).clamp(0, len(columns_T))
                yield columns_T.expand(batch, -1), counts_B
            return
        lengths = [num_tokens] * batch if lengths is None else self._counted(lengths).tolist()
        segment, starts, positions = self.config.window, [0] * batch, state.position.tolist()
        while any(start < length for start, length in zip(starts, lengths, strict=True)):
            room = [segment - (p + start) % segment for p, start in zip(positions, starts, strict=True)]
            left = [length - start for start, length in zip(starts, lengths, strict=True)]
            counts = [min(most, *pair) for pair in zip(left, room, strict=True)]
            columns = torch.tensor(starts)[:, None] + torch.arange(max(counts))
            yield columns.clamp(max=max(lengths) - 1).to(self.device), torch.tensor(counts, device=self.device)
            starts = [start + count for start, count in zip(starts, counts, strict=True)]


class Readout(nn.Linear):
    """From a memory's answer to the head, past the layers between, which were never shown an answer of a memory.

    It starts with nothing.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size, size, bias=False)
        nn.init.zeros_(self.weight)

    def forward(self, y: Tensor) -> Tensor:
        """[..., D] to [..., D], in y's dtype."""
        return F.linear(y, self.weight.to(y.dtype))


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats of scores [..., N] and their targets [...], int64 and already shifted by one.

    Targets of -100 do not count; where none counts the mean is NaN.
    """
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=-100)
