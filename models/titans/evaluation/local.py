"""A reader in this process, and the same body with full attention."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from titans.checkpoint import Loaded
from titans.evaluation.generate import generate
from titans.evaluation.reader import Report
from titans.model import TitansModel
from titans.state import Stream
from titans.tokenizer import Tokenizer

_WINDOWS = 4  # read at once
_BLOCK = 256  # tokens that attend to all before them at once
_ROOM = 512  # tokens of a question and its answer
_STEP = 1_024  # whole chunks of a memory, as a MAC's segment is
_MANY, _FEW = 16, 1  # answers made together; with full attention each has keys and values of the whole document


@dataclass(frozen=True)
class LocalReading:
    """See `Reading`."""

    model: TitansModel
    tokenizer: Tokenizer
    num_tokens: int
    open: Callable[[bool], Stream]  # memory or not
    batch: int

    def answer(self, prompts: Sequence[str], *, memory: bool, max_tokens: int, stop: str) -> list[str]:
        """See `Reading`."""
        stream, answers = self.open(memory), list[str]()
        for i in range(0, len(prompts), self.batch):
            part = prompts[i : i + self.batch]
            answers += generate(self.model, self.tokenizer, stream, part, max_tokens=max_tokens, stop=stop)
        return answers


class LocalReader:
    """A model that has been loaded here. Batches the questions about a document."""

    def __init__(self, loaded: Loaded) -> None:
        self.model, self.fingerprint = loaded.name, loaded.fingerprint
        self.titans, self.tokenizer = loaded.model, loaded.tokenizer

    def count(self, text: str) -> int:
        """See `Reader`."""
        return len(self.tokenizer.encode(text))

    @contextmanager
    def read(self, document: str, report: Report) -> Iterator[LocalReading]:
        """See `Reader`."""
        tokens_1T, done = self._encode(document), 0
        state = self.titans.new_state()
        for part_1T in tokens_1T.split(_WINDOWS * self.titans.config.window, dim=1):
            state = self.titans.ingest(part_1T, state)
            report(done := done + part_1T.shape[1])
        yield LocalReading(
            self.titans, self.tokenizer, done, lambda memory: self.titans.open(state, recall=memory), _MANY
        )

    @contextmanager
    def read_in_full(self, document: str) -> Iterator[LocalReading]:
        """The document, read with attention to all of it and no memory."""
        tokens_1T = self._encode(document)
        wide = widen(self.titans, window_for(tokens_1T.shape[1]))
        stream = wide.open(wide.new_state(), recall=False)
        with torch.no_grad():
            for part_1T in tokens_1T.split(_BLOCK, dim=1):
                _, stream = wide(part_1T, stream)
        yield LocalReading(wide, self.tokenizer, tokens_1T.shape[1], lambda memory: stream, _FEW)

    def _encode(self, text: str) -> torch.Tensor:
        return torch.tensor([self.tokenizer.encode(text)], device=self.titans.device)


@functools.lru_cache(maxsize=1)  # the documents of a cell are about as long as each other
def widen(model: TitansModel, window: int) -> TitansModel:
    """The same weights, shared, with another window. The modules are shared: those that are packed hold no weights."""
    with torch.device("meta"):
        wide = TitansModel(replace(model.config, window=window))
    for ours, theirs in ((wide, model), *zip(_layers(wide), _layers(model), strict=True)):
        for name, child in theirs.named_children():
            if not isinstance(child, nn.ModuleList | nn.ModuleDict):
                setattr(ours, name, child)
    return wide.eval()


def _layers(model: TitansModel) -> list[nn.Module]:
    return [*model.layers, *model.memory_layers.values()]


def window_for(num_tokens: int) -> int:
    """A window that holds a text of so many tokens, and a question and its answer."""
    return (num_tokens + _ROOM) // _STEP * _STEP + _STEP
