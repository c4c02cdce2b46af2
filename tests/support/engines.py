"""The tiny model on an engine, and what a server puts on it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from support.models import make_tiny, tiny_tokenizer
from titans_server.engine import Engine
from titans_server.engine.runner import Runner
from titans_server.observer import Observer
from titans_server.service import Limits, ServedModel, SessionService
from titans_server.sessions.cache import StateCache
from titans_server.sessions.ledger import Ledger
from titans_server.sessions.store import SessionStore
from titans_server.states import SnapshotPolicy, States


@asynccontextmanager
async def running_engine() -> AsyncIterator[Engine]:
    """An engine whose thread runs meanwhile."""
    engine = Engine([Runner(make_tiny())], ends={0})
    engine.start()
    try:
        yield engine
    finally:
        await engine.close()


def states_on(
    store: SessionStore, engine: Engine, *, idle_seconds: float = 1000, observer: Observer | None = None
) -> States:
    """The states of the sessions that `support.records` makes; none is written down unless it is idle or asked for."""
    policy = SnapshotPolicy(tokens=10_000, idle_seconds=idle_seconds)
    return States(engine, Ledger(store), "f" * 32, StateCache(1 << 30), policy=policy, observer=observer or Observer())


def service_on(store: SessionStore, engine: Engine) -> SessionService:
    """The use cases, for the sessions that `support.records` makes; it is not started."""
    model = ServedModel("tiny", "f" * 32, tiny_tokenizer(), loaded_at=0)
    limits = Limits(max_prompt_tokens=100, max_waiting_writers=4, num_kept_versions=8)
    policy = SnapshotPolicy(tokens=10_000, idle_seconds=1000)
    return SessionService(engine, store, model, StateCache(1 << 30), limits=limits, policy=policy)
