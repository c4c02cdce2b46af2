"""The composition root: the one place where parts meet."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import fields
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch
from fastapi import FastAPI
from titans import checkpoint
from titans.backbone import BackboneError

from titans_server.api import ingestions, versions
from titans_server.api.deps import AppContext
from titans_server.api.gate import Gate, RequestLimits
from titans_server.api.handlers import add_handlers
from titans_server.api.head import HeadAsGet
from titans_server.api.lingering import Lingering
from titans_server.api.observed import Observed
from titans_server.api.openai.responses.routes import router as responses_router
from titans_server.api.openai.routes import router as openai_router
from titans_server.api.openapi import describe
from titans_server.api.operations import LIVE, METRICS, READY, health_router, metrics_router
from titans_server.api.routes import router
from titans_server.api.streams.registry import StreamLimits, Streams
from titans_server.api.streams.routes import router as streams_router
from titans_server.engine import Engine
from titans_server.engine.runner import Runner
from titans_server.errors import TitansError
from titans_server.lifecycle import CannotStart, Lifecycle
from titans_server.observer import Observers
from titans_server.service import Limits, ServedModel, SessionService
from titans_server.sessions.cache import StateCache
from titans_server.sessions.open import open_store
from titans_server.sessions.store import SessionStore
from titans_server.settings import Settings
from titans_server.states import SnapshotPolicy
from titans_server.telemetry.metrics import Metrics, Residents
from titans_server.tenants.gatekeeper import Gatekeeper
from titans_server.tenants.limiter import Meter
from titans_server.tenants.quotas import Quotas
from titans_server.tenants.store import KeyStore, open_keys

if TYPE_CHECKING:  # needs an extra
    from titans_server.telemetry.traces import Tracing

log = logging.getLogger(__name__)

_VERSION = version("titans-server")

_NO_KEY = (
    "other machines may reach this server, and it has no API key: set TITANS_API_KEY, or make one with `titans keys "
    "create`; or set TITANS_ALLOW_ANONYMOUS=true where something in front of it asks people who they are"
)


def create_app(
    settings: Settings, lifecycle: Lifecycle[AppContext] | None = None, tracing: "Tracing | None" = None
) -> FastAPI:
    """The service; nothing is loaded before its lifespan begins. Its model is loaded while it already answers."""
    life = lifecycle or Lifecycle[AppContext]()
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, object]]:
        async with AsyncExitStack() as stack:
            if tracing is not None:
                stack.push_async_callback(asyncio.to_thread, tracing.close)
            store = open_store(settings.store)
            stack.push_async_callback(store.close)
            keys = open_keys(settings.store)
            stack.push_async_callback(keys.close)
            gatekeeper = await _open(store, keys, settings)
            load = partial(_serve, settings, store=store, metrics=metrics, tracing=tracing, life=life, stack=stack)
            async with life.loading(load):
                yield {"lifecycle": life, "gatekeeper": gatekeeper, "stall_seconds": settings.stream_stall_seconds}

    app = FastAPI(title="titans-server", version=_VERSION, lifespan=lifespan, redirect_slashes=False)
    routers = (router, ingestions.router, versions.router, openai_router, responses_router, streams_router)
    for each in (*routers, health_router(life)):
        app.include_router(each)
    if settings.metrics != "off":
        app.include_router(metrics_router(metrics))
    describe(app, of_openai=(openai_router, responses_router))
    add_handlers(app)
    app.add_middleware(HeadAsGet)
    app.add_middleware(
        Gate,
        lifecycle=life,
        limits=RequestLimits(settings.max_header_bytes, settings.max_body_bytes, settings.upload_idle_seconds),
        always=frozenset({LIVE, READY, METRICS}),
        everybody=frozenset({LIVE, READY, METRICS} if settings.metrics == "open" else {LIVE, READY}),
    )
    app.add_middleware(Observed, metrics=metrics, tracing=tracing)
    app.add_middleware(Lingering)
    return app


async def _serve(
    settings: Settings,
    *,
    store: SessionStore,
    metrics: Metrics,
    tracing: "Tracing | None",
    life: Lifecycle[AppContext],
    stack: AsyncExitStack,
) -> None:
    """Load the model and put the service together; what has to be closed goes on the stack."""
    observer = Observers([metrics, Meter(), *([] if tracing is None else [tracing])])
    loaded, *others = [await asyncio.to_thread(_load, settings, device) for device in settings.devices]
    runners = [Runner(each.model) for each in (loaded, *others)]
    engine = Engine(
        runners,
        ends=loaded.tokenizer.ends,
        max_running=settings.max_running,
        max_requests=settings.max_requests,
        portion_seconds=settings.portion_seconds,
        observer=observer,
    )
    for runner in runners:
        await asyncio.to_thread(runner.warm_up)
    stack.push_async_callback(engine.close)
    engine.start()
    model = ServedModel(loaded.name, loaded.fingerprint, loaded.tokenizer, int(time.time()))
    limits = Limits(settings.max_prompt_tokens, settings.max_waiting_writers, settings.kept_versions)
    policy = SnapshotPolicy(settings.snapshot_tokens_on(loaded.model.device.type), settings.snapshot_idle_seconds)
    cache = StateCache(settings.resident_bytes)
    service = SessionService(engine, store, model, cache, limits=limits, policy=policy, observer=observer)
    stack.push_async_callback(service.close)
    service.start()
    streams = Streams(_stream_limits(settings))
    stack.push_async_callback(streams.close)
    device = ",".join(str(runner.device) for runner in runners)
    metrics.serve(_Gauged(engine, cache), model_name=model.name, fingerprint=model.fingerprint, device=device)
    if tracing is not None:
        tracing.serve(model.name)
    context = AppContext(service, streams, settings, device, store.name)
    life.ready(context, engine, num_streams=lambda: streams.num_under_way, retire=service.retire)
    log.info("ready: %s (%s) on %s, sessions in %s", model.name, model.fingerprint, device, store.name)


async def _open(store: SessionStore, keys: KeyStore, settings: Settings) -> Gatekeeper:
    """What the server begins with. Raises CannotStart where the store cannot be used, or a stranger could come in."""
    try:
        await store.open()
        return await _gatekeeper(keys, settings)
    except TitansError as error:
        cause = error.__cause__
        more = "" if cause is None or str(cause) in str(error) else f": {cause}"
        raise CannotStart(f"{error}{more}") from error


async def _gatekeeper(keys: KeyStore, settings: Settings) -> Gatekeeper:
    """Raises CannotStart where a stranger could come in."""
    exposed = settings.is_reachable_from_elsewhere
    gatekeeper = Gatekeeper(
        keys,
        static_key=None if settings.api_key is None else settings.api_key.get_secret_value(),
        needs_key=False if settings.allow_anonymous else exposed or None,
        quotas=Quotas(**{quota.name: getattr(settings, f"quota_{quota.name}") for quota in fields(Quotas)}),
    )
    if exposed and not settings.allow_anonymous and not await gatekeeper.has_keys():
        raise CannotStart(_NO_KEY)
    return gatekeeper


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


def _stream_limits(settings: Settings) -> StreamLimits:
    return StreamLimits(
        max_streams=settings.max_streams,
        max_bytes=settings.stream_bytes,
        keep_seconds=settings.stream_keep_seconds,
        ping_seconds=settings.stream_ping_seconds,
        stall_seconds=settings.stream_stall_seconds,
    )


def _load(settings: Settings, name: str) -> checkpoint.Loaded:
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    dtype = None if settings.dtype == "auto" else getattr(torch, settings.dtype)
    try:
        return checkpoint.load(settings.body, settings.memory, device=_device(name), dtype=dtype)
    except (BackboneError, checkpoint.CheckpointError) as error:
        raise CannotStart(str(error)) from error


def _device(name: str) -> torch.device | None:
    """None: whichever there is. Raises CannotStart for one that there is not."""
    if name == "auto":
        return None
    device, num_gpus = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= num_gpus:
        raise CannotStart(f"TITANS_DEVICE has {name}, and PyTorch {torch.__version__} finds {num_gpus} CUDA devices")
    return device
