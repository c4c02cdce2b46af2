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
from titans_server.api.openai.routes import router as openai_router
from titans_server.api.routes import router
from titans_server.engine import Engine
from titans_server.engine.runner import Runner
from titans_server.service import Limits, ServedModel, SessionService
from titans_server.sessions.cache import StateCache
from titans_server.sessions.open import open_store
from titans_server.settings import Settings

log = logging.getLogger(__name__)


def create_app(settings: Settings) -> FastAPI:
    """The service; nothing is loaded before its lifespan begins."""

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
            )
            stack.push_async_callback(engine.close)
            engine.start()
            model = ServedModel(loaded.name, loaded.fingerprint, loaded.tokenizer, int(time.time()))
            limits = Limits(settings.max_prompt_tokens, settings.max_waiting_writers)
            service = SessionService(engine, store, model, StateCache(settings.resident_bytes), limits)
            device = str(loaded.model.device)
            log.info("ready: %s (%s) on %s, sessions in %s", model.name, model.fingerprint, device, store.name)
            yield {"context": AppContext(service, settings, device, store.name)}

    app = FastAPI(title="titans-server", version="0.1.0", lifespan=lifespan)
    app.include_router(router)
    app.include_router(openai_router)
    add_handlers(app)
    return app


def _load(settings: Settings) -> checkpoint.Loaded:
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = None if settings.device == "auto" else torch.device(settings.device)
    dtype = None if settings.dtype == "auto" else getattr(torch, settings.dtype)
    return checkpoint.load(settings.body, settings.memory, device=device, dtype=dtype)
