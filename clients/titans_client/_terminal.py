"""What the command line shows on stderr while it works."""

import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import BinaryIO

from tqdm import tqdm

from ._documents import PIECE, read_some
from ._models import Document, IngestEvent


class IngestBar:
    """A document's way in bytes: sent, then learnt.

    Two phases, for the server may hold back the body until it has learnt what it has: then sending is the long part.
    """

    def __init__(self, size: int | None) -> None:
        self._bar = tqdm(total=size, desc="sending", unit="B", unit_scale=True, unit_divisor=1024)
        self._is_sending = True

    def __enter__(self) -> "IngestBar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def sending(self, file: BinaryIO) -> Iterator[bytes]:
        """The file's bytes, counted as they leave."""
        while piece := read_some(file, PIECE):
            yield piece
            self._bar.update(len(piece))

    def show(self, event: IngestEvent) -> None:
        """Move to where the server is."""
        if self._is_sending:
            self._is_sending = False
            self._bar.reset(total=self._bar.total or self._bar.n)  # all has been sent: the size is known by now
            self._bar.set_description("learning", refresh=False)
        self._bar.set_postfix_str(f"{tokens_per_second(event):,.0f} tokens/s", refresh=False)
        self._bar.update(event.bytes - self._bar.n)
        if isinstance(event, Document):
            self._bar.refresh()


def tokens_per_second(event: IngestEvent) -> float:
    """How fast the document is learnt, or was."""
    return event.tokens / event.seconds if event.seconds > 0 else 0.0


class Waiting:
    """A small sign of life, if stderr is a terminal; `stop` wipes it away.

    A thread of its own draws it; it ends with `stop`, at the latest with the `with` block.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._draw, daemon=True) if sys.stderr.isatty() else None

    def __enter__(self) -> "Waiting":
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Return when nothing more will be drawn. Twice is as good as once."""
        if self._thread is not None and not self._stopped.is_set():
            self._stopped.set()
            self._thread.join()

    def _draw(self) -> None:
        started = time.monotonic()
        frame = 0
        while not self._stopped.wait(0.1):
            sign = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"[frame % 10]
            _write(f"\r{sign} {self._what} {time.monotonic() - started:.0f} s")
            frame += 1
        if frame:
            _write("\r\033[K")


def _write(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
