"""The composition root: the one place where parts meet."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import torch
from fastapi import FastAPI
from titans import checkpoint

from titans_server.api.deps import AppContext
from titans_server.api.handlers import add_handlers
from titans_server.api.observed import Observed
from titans_server.api.openai.routes import router as openai_router
from titans_server.api.routes import router
from titans_server.engine import Engine
from titans_server.engine.runner import Runner
from titans_server.service import Limits, ServedModel, SessionService
from titans_server.sessions.cache import StateCache
from titans_server.sessions.open import open_store
from titans_server.settings import Settings
from titans_server.telemetry.metrics import Metrics, Residents

log = logging.getLogger(__name__)


def create_app(settings: Settings) -> FastAPI:
    """The service; nothing is loaded before its lifespan begins."""
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, AppContext]]:
        async with AsyncExitStack() as stack:
            store = open_store(settings.store)
            stack.push_async_callback(store.close)
            await store.open()
            loaded = await asyncio.to_thread(_load, settings)
            engine = Engine(
                Runner(loaded.model),
                eos_token=loaded.tokenizer.eos_token,
                max_running=settings.max_running,
                max_requests=settings.max_requests,
                observer=metrics,
            )
            stack.push_async_callback(engine.close)
            engine.start()
            model = ServedModel(loaded.name, loaded.fingerprint, loaded.tokenizer, int(time.time()))
            limits = Limits(settings.max_prompt_tokens, settings.max_waiting_writers)
            cache = StateCache(settings.resident_bytes)
            service = SessionService(engine, store, model, cache, limits, observer=metrics)
            device = str(loaded.model.device)
            metrics.serve(_Gauged(engine, cache), model_name=model.name, fingerprint=model.fingerprint, device=device)
            log.info("ready: %s (%s) on %s, sessions in %s", model.name, model.fingerprint, device, store.name)
            yield {"context": AppContext(service, settings, metrics, device, store.name)}

    app = FastAPI(title="titans-server", version="0.1.0", lifespan=lifespan)
    app.include_router(router)
    app.include_router(openai_router)
    add_handlers(app)
    app.add_middleware(Observed, metrics=metrics)
    return app


class _Gauged:
    """What the metrics look at."""

    def __init__(self, engine: Engine, cache: StateCache) -> None:
        self._engine, self._cache = engine, cache

    @property
    def num_running(self) -> int:
        return self._engine.num_running

    @property
    def num_waiting(self) -> int:
        return self._engine.num_waiting

    @property
    def num_ingesting(self) -> int:
        return self._engine.num_ingesting

    def residents(self) -> list[Residents]:
        return [Residents("memory", len(self._cache), self._cache.num_bytes)]


def _load(settings: Settings) -> checkpoint.Loaded:
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = None if settings.device == "auto" else torch.device(settings.device)
    dtype = None if settings.dtype == "auto" else getattr(torch, settings.dtype)
    return checkpoint.load(settings.body, settings.memory, device=device, dtype=dtype)
