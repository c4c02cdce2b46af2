"""`titans keys`: make, list and revoke API keys, beside the sessions. Servers that run notice within a second."""

import argparse
import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import fields, replace
from datetime import UTC, datetime

from titans_server.errors import TitansError
from titans_server.sessions.open import open_store
from titans_server.settings import Settings, told
from titans_server.tenants import keys
from titans_server.tenants.quotas import Quotas
from titans_server.tenants.store import KeyStore, open_keys

Action = Callable[[KeyStore, argparse.Namespace], Awaitable[int]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `titans keys` takes."""
    store = argparse.ArgumentParser(add_help=False)
    store.add_argument("--store", help="where sessions and keys are kept (TITANS_STORE)")
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    create = actions.add_parser("create", parents=[store], help="make a key and print it, this once")
    create.add_argument("name", type=_line, help="for people: who it is for")
    create.add_argument("--owner", metavar="ID", type=_line, help="a key's id: the new one gets at the same sessions")
    for quota in fields(Quotas):
        flag = "--" + quota.name.replace("_", "-")
        number = _number if quota.name in {"sessions", "bytes"} else _number_above_0  # as in the settings
        create.add_argument(flag, type=number, metavar="N", help=f"(default: TITANS_QUOTA_{quota.name.upper()})")
    create.set_defaults(action=_create)

    listing = actions.add_parser("list", parents=[store], help="print all keys, without their secrets")
    listing.set_defaults(action=_list)

    revoke = actions.add_parser("revoke", parents=[store], help="have a key let nobody in any more")
    revoke.add_argument("id", metavar="ID", type=_line)
    revoke.set_defaults(action=_revoke)


def run(args: argparse.Namespace) -> int:
    """Do it. Exit status: 0; 1 after an error, told in one line; 2 for settings that make no sense."""
    try:
        url = args.store or Settings().store
        open_store(url)  # touches nothing: it says which URLs are known
    except ValueError as error:  # pydantic's ValidationError is one
        return _fail(told(error), status=2)
    if url.startswith("memory:"):
        return _fail("memory:// is a server's own memory: keys cannot be put there. Set TITANS_STORE", status=2)
    try:
        return asyncio.run(_with_store(url, args))
    except TitansError as error:
        return _fail(error)


async def _with_store(url: str, args: argparse.Namespace) -> int:
    store = open_keys(url)
    try:
        action: Action = args.action
        return await action(store, args)
    finally:
        await store.close()


async def _create(store: KeyStore, args: argparse.Namespace) -> int:
    owner = None
    if args.owner is not None:
        other = await store.get(args.owner)
        if other is None:
            return _fail(f"there is no key {args.owner}")
        owner = other.owner
    quotas = Quotas(**{quota.name: getattr(args, quota.name) for quota in fields(Quotas)})
    key, secret = keys.make(args.name, time.time(), quotas, owner)
    await store.put(key)
    try:
        sys.stdout.write(f"{secret}\n")
        sys.stdout.flush()
    except OSError:  # nobody has it, or ever will
        await store.put(replace(key, revoked_at=time.time()))
        raise
    sys.stderr.write("this is the only time that the key is shown\n")
    return 0


async def _list(store: KeyStore, _: argparse.Namespace) -> int:
    for key in await store.list():
        state = "active" if key.revoked_at is None else f"revoked {_date(key.revoked_at)}"
        quotas = [f"{q.name}={value}" for q in fields(Quotas) if (value := getattr(key.quotas, q.name)) is not None]
        owner = [] if key.owner == key.id else [f"owner={key.owner}"]
        sys.stdout.write("\t".join([key.id, _date(key.created_at), state, key.name, *owner, *quotas]) + "\n")
    return 0


async def _revoke(store: KeyStore, args: argparse.Namespace) -> int:
    key = await store.get(args.id)
    if key is None:
        return _fail(f"there is no key {args.id}")
    if key.revoked_at is None:
        await store.put(replace(key, revoked_at=time.time()))
    sys.stdout.write(f"revoked {key.id}\n")
    return 0


def command() -> tuple[str, object, object]:
    """The subcommand for `titans`: its help, its arguments, its action."""
    return "make, list and revoke API keys", add_arguments, run


def _line(text: str) -> str:
    """What stays one field of one line where keys are listed."""
    if not text.isprintable():
        raise argparse.ArgumentTypeError(f"not all of it can be printed: {text!r}")
    return text


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"not a number: {text!r}")
    return int(text)


def _number_above_0(text: str) -> int:
    """Of a rate: none at all is what revoking a key is for, and is never there again."""
    if (number := _number(text)) == 0:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _fail(reason: object, status: int = 1) -> int:
    sys.stderr.write(f"titans: {reason}\n")
    return status
