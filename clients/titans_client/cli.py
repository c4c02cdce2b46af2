"""The `titans` command line.

stdout carries results, stderr progress and errors. Exit status: 0; 1 after an error, told in one line; 2 for a wrong
usage; 130 after Ctrl-C; 141 when the reader of stdout has gone.
"""

import argparse
import contextlib
import io
import os
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from . import _extensions
from ._calls import check_key
from ._client import Client
from ._errors import (
    APIConnectionError,
    APIStatusError,
    DocumentTooLargeError,
    InvalidRequestError,
    TitansError,
    UnsupportedMediaTypeError,
)
from ._models import CompletionOptions, Document, Wire
from ._terminal import IngestBar, Waiting, tokens_per_second

Command = Callable[[Client, argparse.Namespace], None]


def main(argv: list[str] | None = None) -> int:
    """Run one command line (`sys.argv`'s by default); the exit status. Never raises what a user can cause."""
    with _open_streams():
        return _caught(sys.argv[1:] if argv is None else argv)


def _caught(argv: Sequence[str]) -> int:
    try:
        return _run(argv)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _abandon_stdout()
        return 141
    except TitansError as error:
        return _fail(_describe(error))
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))


def _run(argv: Sequence[str]) -> int:
    try:
        args = _build_parser(argv).parse_args(argv)
        status: int = args.command(args)
    except SystemExit as end:  # argparse's way to end after --help and after a wrong usage
        if isinstance(end.code, str):
            return _fail(end.code)
        status = end.code or 0
    sys.stdout.flush()  # here, where a broken pipe is caught
    return status


def _build_parser(argv: Sequence[str]) -> _extensions.Parser:
    """The parser for this command line: what is installed is only looked up for a command that is not built in."""
    url = _extensions.Parser(add_help=False)
    url.add_argument(
        "--url", default=argparse.SUPPRESS, help="the server (default: TITANS_BASE_URL, http://127.0.0.1:8000)"
    )
    parser = _extensions.Parser(
        prog="titans", description="Sessions whose memory learns what they read.", parents=[url], allow_abbrev=False
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_sessions(commands.add_parser("sessions", help="make, list, fork, rewind, export, delete sessions"), url)
    _add_ingestions(commands.add_parser("ingestions", help="show or cancel a document under way"), url)
    _add_ingest(commands.add_parser("ingest", parents=[url], help="have a session learn a document"))
    _add_ask(commands.add_parser("ask", parents=[url], help="ask a session about what it has learnt"))
    _set_command(commands.add_parser("health", parents=[url], help="whether the server is ready"), _health)
    if _command_name(argv) not in commands.choices:
        for entry_point in _extensions.installed():
            if entry_point.name not in commands.choices:
                summary = _extensions.listed_help(entry_point.name)
                commands.add_parser(entry_point.name, entry_point=entry_point, help=summary)
    return parser


def _command_name(argv: Sequence[str]) -> str | None:
    words = iter(argv)
    for word in words:
        if word == "--url":
            next(words, None)
        elif not word.startswith("-"):
            return word
    return None


def _add_sessions(parser: _extensions.Parser, url: _extensions.Parser) -> None:
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    create = actions.add_parser("create", parents=[url], help="make a session, print its id")
    create.add_argument("--ttl", type=int, metavar="SECONDS", help="forget it so long after its last change")
    _set_command(create, _create)
    listing = actions.add_parser("list", parents=[url], help="print your sessions, newest first")
    listing.add_argument("--limit", type=int, default=20, metavar="N", help="(default: 20)")
    listing.add_argument("--after", metavar="ID", type=_session_id, help="those that come after this one")
    _set_command(listing, _list)
    for name, summary, command in _OF_ONE_SESSION:
        action = actions.add_parser(name, parents=[url], help=summary)
        action.add_argument("session", metavar="ID", type=_session_id)
        if name in {"restore", "fork", "export"}:
            action.add_argument("--version", type=int, metavar="N", required=name == "restore")
        if name in {"export", "import"}:
            action.add_argument("file", metavar="FILE", type=Path)
        _set_command(action, command)


def _add_ingestions(parser: _extensions.Parser, url: _extensions.Parser) -> None:
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    for name, summary, command in (
        ("show", "print how far a document has come, as JSON", _show_ingestion),
        ("cancel", "stop a document before it is learnt", _cancel_ingestion),
    ):
        action = actions.add_parser(name, parents=[url], help=summary)
        action.add_argument("ingestion", metavar="ID")
        _set_command(action, command)


def _add_ingest(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a text in UTF-8; -: standard input")
    parser.add_argument("--session", metavar="ID", type=_session_id, help="(default: a new one; its id is printed)")
    parser.add_argument("--key", type=_key, help="an Idempotency-Key: what is sent again under it is learnt once")
    parser.add_argument("--later", action="store_true", help="return once it is durable; print its ingestion's id")
    _set_command(parser, _ingest)


def _add_ask(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("session", metavar="SESSION", type=_session_id)
    parser.add_argument("question")
    parser.add_argument("--raw", action="store_true", help="send the text as it is, and do not stop at a line's end")
    parser.add_argument("--max-tokens", type=int, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="(default: 0)")
    parser.add_argument("--memory", choices=["read", "off", "write"])
    parser.add_argument("--seed", type=int)
    _set_command(parser, _ask)


def _set_command(parser: argparse.ArgumentParser, command: Command) -> None:
    def run(args: argparse.Namespace) -> int:
        try:
            with Client(getattr(args, "url", None)) as client:
                command(client, args)
        except ValueError as error:  # an address that is none; a text that is not Unicode; a temperature of nan
            return _fail(str(error))
        return 0

    parser.set_defaults(command=run)


def _create(client: Client, args: argparse.Namespace) -> None:
    _print(client.sessions.create(ttl_seconds=args.ttl).id)


def _list(client: Client, args: argparse.Namespace) -> None:
    listed = client.sessions.list(args.limit, args.after)
    for session in listed.data:
        _print(f"{session.id} version {session.version}: {session.tokens_seen:,} tokens")
    if listed.has_more:
        sys.stderr.write(f"there are more: --after {listed.data[-1].id}\n")


def _versions(client: Client, args: argparse.Namespace) -> None:
    for version in client.sessions.versions(args.session).data:
        _print(f"{version.version}: {version.tokens_seen:,} tokens")


def _restore(client: Client, args: argparse.Namespace) -> None:
    session = client.sessions.restore(args.session, args.version)
    _print(f"{session.id} version {session.version} is what version {args.version} was")


def _fork(client: Client, args: argparse.Namespace) -> None:
    _print(client.sessions.fork(args.session, args.version).id)


def _export(client: Client, args: argparse.Namespace) -> None:
    args.file.write_bytes(client.sessions.export_state(args.session, args.version))


def _import(client: Client, args: argparse.Namespace) -> None:
    session = client.sessions.import_state(args.session, args.file)
    _print(f"{session.id} version {session.version}: {session.tokens_seen:,} tokens")


def _show_ingestion(client: Client, args: argparse.Namespace) -> None:
    _print_json(client.ingestion(args.ingestion))


def _cancel_ingestion(client: Client, args: argparse.Namespace) -> None:
    _print(f"{args.ingestion} {client.cancel_ingestion(args.ingestion).status}")


def _show(client: Client, args: argparse.Namespace) -> None:
    _print_json(client.sessions.get(args.session))


def _delete(client: Client, args: argparse.Namespace) -> None:
    client.sessions.delete(args.session)
    _print(f"deleted {args.session}")


def _health(client: Client, args: argparse.Namespace) -> None:
    _print_json(client.health())


def _ingest(client: Client, args: argparse.Namespace) -> None:
    with _open(args.file) as file, _session_to_learn(client, args) as session_id:
        if args.later:
            _print(client.ingest_later(session_id, file, key=args.key).id)
            return
        sent = IngestBar(_size(file))
        with sent as bar, client.ingest_stream(session_id, bar.sending(file), key=args.key) as events:
            for event in events:
                bar.show(event)
    assert isinstance(event, Document), "a stream that ends without its document raises"
    learnt = f"{event.tokens:,} tokens ({event.bytes:,} bytes) in {event.seconds:.1f} s"
    _print(f"{event.session} version {event.version}: {learnt}, {tokens_per_second(event):,.0f} tokens/s")


@contextlib.contextmanager
def _session_to_learn(client: Client, args: argparse.Namespace) -> Iterator[str]:
    """The id of the one that is named, or of a new one, of which nothing is left where its document is refused.

    But where that has a key, under which it may be sent again, mended.
    """
    if args.session is not None:
        yield args.session
        return
    session_id = client.sessions.create().id
    _print(session_id)
    try:
        yield session_id
    except (InvalidRequestError, UnsupportedMediaTypeError, DocumentTooLargeError):
        if args.key is None:
            with contextlib.suppress(TitansError):
                client.sessions.delete(session_id)
        raise


def _ask(client: Client, args: argparse.Namespace) -> None:
    prompt = args.question if args.raw else f"\n\nQuestion: {args.question}\nAnswer:"
    options = CompletionOptions(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        stop=None if args.raw else "\n",
        seed=args.seed,
        memory=args.memory,
    )
    trim = str if args.raw else str.lstrip  # the answer's first word comes with a space before it
    ends_line = False
    with Waiting("remembering") as waiting, client.stream(args.session, prompt, **options) as chunks:
        for chunk in chunks:
            if text := trim(chunk.text):
                trim = str
                waiting.stop()
                sys.stdout.write(text)
                sys.stdout.flush()
                ends_line = text.endswith("\n")
    if not ends_line:
        _print("")


_OF_ONE_SESSION: Sequence[tuple[str, str, Command]] = (
    ("show", "print what the server knows about a session, as JSON", _show),
    ("delete", "forget a session", _delete),
    ("versions", "print the versions that are kept, newest first", _versions),
    ("restore", "make what an older version was the newest", _restore),
    ("fork", "make a session that goes on from another one, print its id", _fork),
    ("export", "write a session's state to a file", _export),
    ("import", "make a state from a file a session's newest version", _import),
)


@contextlib.contextmanager
def _open(name: str) -> Iterator[BinaryIO]:
    if name == "-":
        if sys.stdin is None:
            raise OSError("standard input is closed")
        yield sys.stdin.buffer
        return
    with Path(name).open("rb") as file:
        yield file


def _size(file: BinaryIO) -> int | None:
    """Bytes in a regular file; None for a pipe, which does not say."""
    try:
        info = os.fstat(file.fileno())
    except OSError:
        return None
    return info.st_size if stat.S_ISREG(info.st_mode) else None


def _session_id(text: str) -> str:
    if not text.strip("."):
        raise argparse.ArgumentTypeError(f"not a session's id: {text!r}")
    return text


def _key(text: str) -> str:
    try:
        return check_key(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _describe(error: TitansError) -> str:
    text = str(error)
    if isinstance(error, APIStatusError):
        text += f" ({error.code})" if error.code else ""
        text += f"; try again in {error.retry_after:.0f} s" if error.retry_after else ""
    elif isinstance(error, APIConnectionError) and text.startswith("cannot connect"):
        text += "; is it running? (titans serve)"
    return text


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _print_json(model: Wire) -> None:
    _print(model.model_dump_json(indent=2))


def _fail(message: str) -> int:
    sys.stderr.write(f"titans: {' '.join(message.split())}\n")
    return 1


class _Closed(io.TextIOBase):
    """Stands for a stdout that is not there."""

    def write(self, text: str, /) -> int:
        raise OSError("standard output is closed")


@contextlib.contextmanager
def _open_streams() -> Iterator[None]:
    """What the shell has closed (`2>&-`) is None to Python: nobody is told then, and a result cannot be written."""
    with contextlib.ExitStack() as stack:
        if sys.stderr is None:
            nowhere = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        if sys.stdout is None:
            stack.enter_context(contextlib.redirect_stdout(_Closed()))
        yield


def _abandon_stdout() -> None:
    """So that the interpreter's last flush has nothing to complain about."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
