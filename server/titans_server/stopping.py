"""Where an answer stops: tokens to text, cut at the first stop string."""

from collections.abc import Sequence

from titans.sampling import Drawn
from titans.tokenizer import StreamDecoder, Tokenizer

from titans_server.events import AnswerToken, TokenScore


class AnswerText:
    """The text of an answer as it grows; a part that may become a stop string is held back until it is sure."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], *, with_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer)
        self._stops = stops
        self._held = ""
        self._with_tokens = with_tokens
        self._num_released = 0  # characters
        self._tokens: list[AnswerToken] = []
        self.stopped = False

    def feed(self, drawn: Drawn) -> str:
        """Text that is certain now. Once `stopped`, the answer is complete."""
        self._tell(drawn)
        return self._release(self._decoder.feed(drawn.token), last=False)

    def echo(self, drawn: Drawn) -> str:
        """The same of a token of the prompt, which no stop string ends."""
        self._tell(drawn)
        text = self._decoder.feed(drawn.token)
        self._num_released += len(text)
        return text

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        return "" if self.stopped else self._release(self._decoder.finish(), last=True)

    def take_tokens(self, *, last: bool = False) -> tuple[AnswerToken, ...]:
        """Tokens whose text has begun to be certain, each once; at last all but a stop's. None without logprobs."""
        ready = [t for t in self._tokens if t.offset < self._num_released or (last and not self.stopped)]
        self._tokens = self._tokens[len(ready) :]
        return tuple(ready)

    def _tell(self, drawn: Drawn) -> None:
        if self._with_tokens:
            top = tuple(self._score(token, logprob) for token, logprob in drawn.top)
            offset = self._num_released + len(self._held)
            self._tokens.append(AnswerToken(self._score(drawn.token, drawn.logprob), top, offset))

    def _score(self, token: int, logprob: float | None) -> TokenScore:
        return TokenScore(self._tokenizer.token_bytes(token), logprob)

    def _release(self, text: str, *, last: bool) -> str:
        text = self._held + text
        cuts = [cut for stop in self._stops if (cut := text.find(stop)) >= 0]
        if cuts:
            self.stopped = True
            keep = len(text) - min(cuts)
        else:
            keep = 0 if last else max((_overlap(text, stop) for stop in self._stops), default=0)
        released, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self._num_released += len(released)
        return released


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
