"""Text to tokens and back: whole, as a stream, and one token at a time."""

import codecs
import re
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence

from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer
from tokenizers.models import BPE

from titans.chat import ChatError, render

_BOUNDARY = re.compile(r"(?<=\S) (?=\S)")  # a lone space: what stands before it is tokenized for good


def _bytes_of_letters() -> dict[str, int]:
    """The letters of a byte-level vocabulary: printable bytes stand for themselves, the others follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTES = _bytes_of_letters()


class Tokenizer:
    """A byte-level BPE. Text is text: `encode` reads the name of a control token as its letters."""

    def __init__(
        self,
        raw: RawTokenizer,
        eos_token: int,
        bos_token: int | None = None,
        chat_template: str | None = None,
        *,
        num_known: int | None = None,
        also_ends: Collection[int] = (),
    ) -> None:
        """`raw` is taken over and changed: it sees no control tokens in text.

        `eos_token`: the id that ends a text. `bos_token`: the one that chat templates may begin with. `num_known`:
        tokens that the body knows, where that may be fewer. `also_ends`: further ids that end what the body says.
        """
        self._raw = raw
        self._bytes: dict[int, bytes] = {}  # of tokens that have been asked for
        self._raw.encode_special_tokens = True
        self._control = {x.content: i for i, x in raw.get_added_tokens_decoder().items() if x.special}
        self._control_ids = {*self._control.values()}
        self._chat_template = chat_template
        ends = {"bos_token": bos_token, "eos_token": eos_token}
        self._names = {name: raw.id_to_token(token) or "" for name, token in ends.items() if token is not None}
        self.eos_token = eos_token
        self.ends = frozenset((eos_token, *also_ends))
        self.vocab_size = min(raw.get_vocab_size(), num_known or raw.get_vocab_size())  # control tokens too
        self.longest = max(map(len, raw.get_vocab()), default=1)  # characters of a text that a token may stand for

    def encode(self, text: str) -> list[int]:
        """The tokens of `text`; no token is added to it. Raises TypeError where it has lone surrogates."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each, on all cores. Other threads go on meanwhile, as the library lets them in a batch alone."""
        return [encoding.ids for encoding in self._raw.encode_batch_fast([*texts], add_special_tokens=False)]

    @property
    def has_chat_template(self) -> bool:
        """Whether `encode_chat` can put a conversation into the body's form."""
        return self._chat_template is not None

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The tokens of a conversation in the body's own form, up to where the assistant speaks next.

        Messages have a "role" and "content". The name of a control token is one where the template writes it, and text
        where a message does. Raises ChatError where there is no template, or it refuses the messages.
        """
        if self._chat_template is None:
            raise ChatError("the model has no chat template")
        if not self._control:
            return self.encode(render(self._chat_template, messages, self._names))
        names = re.compile("|".join(map(re.escape, sorted(self._control, key=len, reverse=True))))
        mark = secrets.token_hex(8)  # within a name that a message says; nobody can guess it, nor JSON escapes it
        quoted = [
            {key: names.sub(lambda name: name[0][:1] + mark + name[0][1:], text) for key, text in message.items()}
            for message in messages
        ]
        text = render(self._chat_template, quoted, self._names)
        parts = re.split(f"({names.pattern})", text)  # every second one is a control token
        return [
            token
            for i, part in enumerate(parts)
            for token in ([self._control[part]] if i % 2 else self.encode(part.replace(mark, "")))
        ]

    def text_bytes(self, token: int) -> bytes:
        """The bytes that a token adds to a text, maybe a part of a character; b"" of a control token."""
        return b"" if token in self._control_ids else self.token_bytes(token)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for, maybe a part of a character; the name of a control token; b"" of none."""
        if token not in self._bytes:
            letters = self._raw.id_to_token(token) or ""
            is_name = letters in self._control or not _BYTES.keys() >= set(letters)
            self._bytes[token] = letters.encode() if is_name else bytes(_BYTES[letter] for letter in letters)
        return self._bytes[token]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, without control tokens and unknown ones; bytes that are not UTF-8 become U+FFFD."""
        return self._raw.decode(list(tokens), skip_special_tokens=True)


def bpe_tokenizer(tokens: Sequence[str], merges: Iterable[str], special: Sequence[str]) -> RawTokenizer:
    """SmolLM2's tokenizer from its vocabulary: digits one by one, GPT-2's words, bytes as letters.

    `tokens` by id; `merges` "left right", the first one first; `special` the control tokens, which are among `tokens`.
    Raises ValueError where a merge is not a pair of these.
    """
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    try:
        raw = RawTokenizer(BPE({token: i for i, token in enumerate(tokens)}, pairs))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"the merges: {error}") from error
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return raw


class StreamEncoder:
    """Tokens of a text that arrives in pieces: the same as of the whole, in bounded memory.

    Text is cut before a lone space only, where no token of SmolLM2's reaches across. A run of more than `limit`
    characters without one is cut where it is: its tokens may differ there, its text does not.
    """

    def __init__(self, tokenizer: Tokenizer, limit: int = 65_536) -> None:
        self._tokenizer = tokenizer
        self._limit = limit
        self._rest = ""

    @property
    def held(self) -> str:
        """The end of the text so far, whose tokens are not certain yet."""
        return self._rest

    def feed(self, text: str) -> list[int]:
        """Tokens that are certain by now."""
        self._rest += text
        cut = self._cut()
        ready, self._rest = self._rest[:cut], self._rest[cut:]
        return self._tokenizer.encode(ready) if ready else []

    def finish(self) -> list[int]:
        """The tokens of what is left; the next text may follow."""
        rest, self._rest = self._rest, ""
        return self._tokenizer.encode(rest) if rest else []

    def _cut(self) -> int:
        reach = 1_024
        while True:  # look at the end first: the last boundary is almost always near
            start = max(0, len(self._rest) - reach)
            cuts = [match.start() for match in _BOUNDARY.finditer(self._rest, start)]
            if cuts:
                return cuts[-1]
            if start == 0:
                return len(self._rest) if len(self._rest) > self._limit else 0
            reach *= 8


class StreamDecoder:
    """Text of tokens that arrive one by one; a character split over tokens is held until it is whole."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The text that this token completes, or ""."""
        return self._decoder.decode(self._tokenizer.text_bytes(token))

    def finish(self) -> str:
        """U+FFFD where a character never became whole."""
        return self._decoder.decode(b"", final=True)
