"""A reader in this process, and the same body with full attention."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from titans.checkpoint import Loaded
from titans.evaluation.generate import generate
from titans.evaluation.reader import Report
from titans.model import TitansModel
from titans.state import Stream
from titans.tokenizer import Tokenizer

_WINDOWS = 4  # of each document, from one report to the next
_TOKENS = 16_384  # of all documents at once: more is no faster there, and takes memory
_BLOCK = 256  # tokens that attend to all before them at once
_ROOM = 512  # tokens of a question and its answer
_STEP = 1_024  # whole chunks of a memory, as a MAC's segment is
_MANY, _FEW = 16, 1  # answers made together; with full attention each has keys and values of the whole document
_AT_ONCE = {"cuda": 64}  # documents: it takes the work of many to keep a GPU busy; elsewhere one


@dataclass(frozen=True)
class LocalReading:
    """See `Reading`."""

    model: TitansModel
    tokenizer: Tokenizer
    num_tokens: list[int]
    open: Callable[[bool], Stream]  # memory or not: a row for each document
    batch: int

    def answer(self, prompts: Sequence[Sequence[str]], *, memory: bool, max_tokens: int, stop: str) -> list[list[str]]:
        """See `Reading`."""
        asked = [(document, prompt) for document, some in enumerate(prompts) for prompt in some]
        stream, answers = self.open(memory), [list[str]() for _ in prompts]
        for start in range(0, len(asked), self.batch):
            rows, texts = zip(*asked[start : start + self.batch], strict=True)
            given = generate(self.model, self.tokenizer, stream.select(rows), texts, max_tokens=max_tokens, stop=stop)
            for row, answer in zip(rows, given, strict=True):
                answers[row].append(answer)
        return answers


class LocalReader:
    """A model that has been loaded here. Batches documents, and the questions about them."""

    def __init__(self, loaded: Loaded) -> None:
        self.model, self.fingerprint = loaded.name, loaded.fingerprint
        self.titans, self.tokenizer = loaded.model, loaded.tokenizer
        self.at_once = _AT_ONCE.get(loaded.model.device.type, 1)

    def count(self, text: str) -> int:
        """See `Reader`."""
        return len(self.tokenizer.encode(text))

    @contextmanager
    def read(self, documents: Sequence[str], report: Report) -> Iterator[LocalReading]:
        """See `Reader`."""
        rows = [torch.tensor(row) for row in self.tokenizer.encode_all(documents)]
        lengths, done = [len(row) for row in rows], 0
        tokens_BT = pad_sequence(rows, batch_first=True).to(self.titans.device)
        state = self.titans.new_state(len(documents))
        window = self.titans.config.window
        at_once = windows_at_once(len(documents), window) * window if tokens_BT.is_cuda else window
        for part_BT in tokens_BT.split(_WINDOWS * window, dim=1):
            counts = [min(max(length - done, 0), part_BT.shape[1]) for length in lengths]
            state, done = self.titans.ingest(part_BT, state, counts, at_once=at_once), done + part_BT.shape[1]
            report(sum(min(length, done) for length in lengths))
        yield LocalReading(
            self.titans,
            self.tokenizer,
            lengths,
            lambda memory: self.titans.open(state, recall=memory),
            max(_MANY, self.at_once),
        )

    @contextmanager
    def read_in_full(self, document: str) -> Iterator[LocalReading]:
        """The document, read with attention to all of it and no memory."""
        tokens_1T = torch.tensor([self.tokenizer.encode(document)], device=self.titans.device)
        wide = widen(self.titans, window_for(tokens_1T.shape[1]))
        stream = wide.open(wide.new_state(), recall=False)
        with torch.no_grad():
            for part_1T in tokens_1T.split(_BLOCK, dim=1):
                _, stream = wide(part_1T, stream)
        yield LocalReading(wide, self.tokenizer, [tokens_1T.shape[1]], lambda memory: stream, _FEW)


def windows_at_once(num_documents: int, window: int) -> int:
    """How many windows of each document a GPU reads at once."""
    return max(1, min(_TOKENS // num_documents // window, _WINDOWS))


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
