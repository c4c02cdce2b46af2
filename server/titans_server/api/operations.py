"""The endpoints for whoever runs the server. They answer while it loads and while it drains, too."""

import asyncio

from fastapi import APIRouter, Response

from titans_server.api.deps import AppContext
from titans_server.api.schemas import Health
from titans_server.errors import StoreUnavailable
from titans_server.lifecycle import Lifecycle
from titans_server.telemetry.metrics import CONTENT_TYPE, Metrics

LIVE, READY, METRICS = "/health/live", "/health/ready", "/metrics"
_PING_SECONDS = 3.0  # less than those who ask wait


def health_router(lifecycle: Lifecycle[AppContext]) -> APIRouter:
    """Whether the server lives, and whether it takes work."""
    router = APIRouter()

    @router.get(LIVE)
    async def live() -> dict[str, str]:
        """Answer while the process runs."""
        return {"status": "ok"}

    @router.get(READY)
    async def ready() -> Health:
        """Answer while requests can be served; else say why not."""
        context = lifecycle.check()
        try:
            async with asyncio.timeout(_PING_SECONDS):
                await context.service.check()
        except TimeoutError as error:
            raise StoreUnavailable(f"the store does not answer within {_PING_SECONDS:.0f} s") from error
        model = context.service.model
        return Health(model=model.name, fingerprint=model.fingerprint, device=context.device, store=context.store_name)

    return router


def metrics_router(metrics: Metrics) -> APIRouter:
    """What Prometheus scrapes."""
    router = APIRouter()

    @router.get(METRICS, response_class=Response)
    async def show() -> Response:
        """Show the metrics in Prometheus' text format."""
        return Response(await asyncio.to_thread(metrics.exposition), media_type=CONTENT_TYPE)

    return router
