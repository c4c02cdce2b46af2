"""Where an answer stops: tokens to text, cut at the first stop string."""

from collections.abc import Sequence

from titans.tokenizer import StreamDecoder, Tokenizer


class AnswerText:
    """The text of an answer as it grows; a part that may become a stop string is held back until it is sure."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._stops = stops
        self._held = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """Text that is certain now. Once `stopped`, the answer is complete."""
        return self._release(self._decoder.feed(token), last=False)

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        return "" if self.stopped else self._release(self._decoder.finish(), last=True)

    def _release(self, text: str, *, last: bool) -> str:
        text = self._held + text
        cuts = [cut for stop in self._stops if (cut := text.find(stop)) >= 0]
        if cuts:
            self.stopped = True
            return text[: min(cuts)]
        keep = 0 if last else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
