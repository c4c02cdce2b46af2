"""What a user would run instead, with the same weights: transformers in bfloat16, llama.cpp on the same GGUF."""

import time
from importlib.util import find_spec
from typing import Protocol

import torch
from titans.backbone import find_default_body
from transformers import AutoModelForCausalLM, GgufConfig


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
        self._model = AutoModelForCausalLM.from_pretrained(
            body.parent, gguf_file=body.name, dtype=torch.bfloat16, quantization_config=dense
        )
        self._model.train(mode=False)

    @torch.inference_mode()
    def read(self, tokens: list[int]) -> float:
        """See Peer."""
        started = time.perf_counter()
        read = self._model(torch.tensor([tokens]), logits_to_keep=1, use_cache=True)
        self._cache, self._next = read.past_key_values, read.logits[:, -1:].argmax(-1)
        return time.perf_counter() - started

    @torch.inference_mode()
    def say(self, count: int) -> list[float]:
        """See Peer."""
        times = []
        for _ in range(count):
            started = time.perf_counter()
            said = self._model(self._next, past_key_values=self._cache, use_cache=True)
            self._next = said.logits[:, -1:].argmax(-1)
            times.append(time.perf_counter() - started)
        return times


class LlamaCpp:
    """llama.cpp as built on this machine, as many threads as torch has, flash attention off as is its default."""

    name = "llama.cpp"

    def __init__(self, context: int) -> None:
        from llama_cpp import Llama  # noqa: PLC0415 — it is built from source, which not every machine can

        threads = torch.get_num_threads()
        self._model = Llama(
            str(find_default_body()), n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def read(self, tokens: list[int]) -> float:
        """See Peer."""
        self._model.reset()
        started = time.perf_counter()
        self._model.eval(tokens)
        return time.perf_counter() - started

    def say(self, count: int) -> list[float]:
        """See Peer."""
        times = []
        for _ in range(count):
            started = time.perf_counter()
            self._model.eval([self._model.sample(temp=0.0)])
            times.append(time.perf_counter() - started)
        return times


def peers(context: int) -> list[Peer]:
    """Those that are installed; `context`: the most tokens that they will hold, and where it is 0 none is wanted."""
    if not context:
        return []
    return [Transformers(), *([LlamaCpp(context)] if find_spec("llama_cpp") else [])]
