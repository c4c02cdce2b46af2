"""What a user would run instead, with the same weights: transformers in bfloat16, llama.cpp on the same GGUF."""

import time
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
import torch
from machine import finished
from titans.backbone import find_default_body
from titans.checkpoint import preferred_device
from transformers import AutoModelForCausalLM, GgufConfig

BATCH = 512  # rows that llama.cpp reads at once


class Peer(Protocol):
    """A model with full attention."""

    name: str

    def read(self, tokens: list[int]) -> float:
        """Seconds to read a prompt from its start, up to the scores of what follows."""

    def say(self, count: int) -> list[float]:
        """Seconds of each of `count` tokens that follow what was read."""


class Transformers:
    """The whole model, full attention, its own cache."""

    name = "transformers"

    def __init__(self) -> None:
        body = find_default_body()
        dense = GgufConfig(dequantize=True)  # plain bfloat16 products: its fastest form on a CPU
        model: Any = AutoModelForCausalLM.from_pretrained(
            body.parent, gguf_file=body.name, dtype=torch.bfloat16, quantization_config=dense
        )
        self._model = model.to(preferred_device()).eval()

    @torch.inference_mode()
    def read(self, tokens: list[int]) -> float:
        """See Peer."""
        started = time.perf_counter()
        read = self._model(torch.tensor([tokens], device=self._model.device), logits_to_keep=1, use_cache=True)
        self._cache, self._next = read.past_key_values, finished(read.logits[:, -1:].argmax(-1))
        return time.perf_counter() - started

    @torch.inference_mode()
    def say(self, count: int) -> list[float]:
        """See Peer."""
        times = []
        for _ in range(count):
            started = time.perf_counter()
            said = self._model(self._next, past_key_values=self._cache, use_cache=True)
            self._next = finished(said.logits[:, -1:].argmax(-1))
            times.append(time.perf_counter() - started)
        return times


class LlamaCpp:
    """llama.cpp with one slot."""

    name = "llama.cpp"

    def __init__(self, context: int, *, flash: bool) -> None:
        self._slots = LlamaCppSlots(1, context, flash=flash)

    def read(self, tokens: list[int]) -> float:
        """See Peer."""
        self._slots.forget()
        started = time.perf_counter()
        self._next = self._slots.read(0, tokens)
        return time.perf_counter() - started

    def say(self, count: int) -> list[float]:
        """See Peer."""
        times = []
        for _ in range(count):
            started = time.perf_counter()
            self._next = self._slots.read(0, [self._next])
            times.append(time.perf_counter() - started)
        return times


class LlamaCppSlots:
    """llama.cpp with so many slots: what its server does for as many clients, in process.

    As built on this machine, with as many threads as torch has.
    """

    def __init__(self, slots: int, context: int, *, flash: bool) -> None:
        """`context`: tokens of each. `flash`: with flash attention, which on CPUs reads sooner and answers later."""
        import llama_cpp  # noqa: PLC0415 — it is built from source, which not every machine can

        self._cpp, threads = llama_cpp, torch.get_num_threads()
        self._model = llama_cpp.Llama(str(find_default_body()), n_ctx=8, verbose=False)  # for its weights
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max, settings.kv_unified = slots * -(-context // 256) * 256, slots, False
        settings.n_batch = settings.n_ubatch = BATCH
        settings.n_threads = settings.n_threads_batch = threads
        kinds = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED, llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        settings.flash_attn_type = kinds[flash]
        self._context = llama_cpp.llama_init_from_model(self._model.model, settings)
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self._places = [0] * slots

    def read(self, slot: int, tokens: list[int]) -> int:
        """What most likely follows these tokens of a slot."""
        return self._run([(slot, token, i == len(tokens)) for i, token in enumerate(tokens, 1)])[slot]

    def say(self, prompt: list[int], count: int) -> float:
        """Seconds for `count` tokens of every slot after the same prompt in each, which is read in them as well."""
        started = time.perf_counter()
        slots = range(len(self._places))
        said = self._run([(slot, token, i == len(prompt)) for slot in slots for i, token in enumerate(prompt, 1)])
        for _ in range(count - 1):
            said = self._run([(slot, token, True) for slot, token in said.items()])
        return time.perf_counter() - started

    def forget(self) -> None:
        """Begin every slot anew."""
        self._cpp.llama_memory_clear(self._cpp.llama_get_memory(self._context), False)
        self._places = [0] * len(self._places)

    def close(self) -> None:
        """Let go of its keys and values."""
        self._cpp.llama_batch_free(self._batch)
        self._cpp.llama_free(self._context)

    def _run(self, rows: list[tuple[int, int, bool]]) -> dict[int, int]:
        """Read tokens, each with its slot and whether it is scored. By slot, what most likely follows what is."""
        said = dict[int, int]()
        for start in range(0, len(rows), BATCH):
            said |= self._run_batch(rows[start : start + BATCH])
        return said

    def _run_batch(self, rows: list[tuple[int, int, bool]]) -> dict[int, int]:
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (slot, token, is_scored) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, self._places[slot], 1
            batch.seq_id[i][0], batch.logits[i] = slot, is_scored
            self._places[slot] += 1
        if self._cpp.llama_decode(self._context, batch):
            raise RuntimeError("llama.cpp could not decode a batch")
        return {slot: self._likeliest(i) for i, (slot, _, is_scored) in enumerate(rows) if is_scored}

    def _likeliest(self, row: int) -> int:
        scores = self._cpp.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(scores, (self._model.n_vocab(),)).argmax())


def has_llama_cpp() -> bool:
    """Whether it is installed."""
    return find_spec("llama_cpp") is not None


def peers(context: int, *, answering: bool) -> list[Peer]:
    """Those that are installed, each as is best for it where it answers, or reads.

    `context`: the most tokens that they will hold, and where it is 0 none is wanted.
    """
    if not context:
        return []
    return [Transformers(), *([LlamaCpp(context, flash=not answering)] if has_llama_cpp() else [])]
