"""`titans serve`: run the service until SIGTERM or SIGINT, then finish what is under way."""

import argparse
import logging
import os
import sys
from typing import TYPE_CHECKING

import uvicorn
from sse_starlette.sse import AppStatus

from titans_server import failpoints
from titans_server.api.deps import AppContext
from titans_server.app import create_app
from titans_server.lifecycle import Lifecycle
from titans_server.serving import DrainingServer, PunctualProtocol, SaysWhy
from titans_server.sessions.open import open_store
from titans_server.settings import Settings, not_settings, told
from titans_server.telemetry import logs

if TYPE_CHECKING:
    from titans_server.telemetry.traces import Tracing

log = logging.getLogger("titans_server")  # by its name: this module is also called __main__


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `titans serve` takes; everything else is a TITANS_… variable."""
    parser.add_argument("--host", help="address to listen on (TITANS_HOST)")
    parser.add_argument("--port", type=int, help="port to listen on (TITANS_PORT)")
    parser.add_argument("--store", help="memory://, sqlite:///path or redis://host (TITANS_STORE)")


def run(args: argparse.Namespace) -> int:
    """Serve. Streams under way are finished before the process ends, for TITANS_DRAIN_SECONDS at most."""
    given = {name: getattr(args, name) for name in ("host", "port", "store") if getattr(args, name) is not None}
    try:
        settings = Settings(**given)
        open_store(settings.store)  # touches nothing: it says which URLs are known
        failpoints.arm(settings.failpoints)
    except ValueError as error:
        print(told(error), file=sys.stderr)  # noqa: T201
        return 2
    logs.configure(settings.log_level, settings.log_format)
    for name in not_settings(os.environ):
        log.warning("%s is no setting of this server: it changes nothing", name)
    AppStatus.disable_automatic_graceful_drain()  # a stream ends when it is done, not when the server is asked to
    try:
        tracing = _tracing() if settings.traces else None
    except ImportError as error:
        print(f'TITANS_TRACES needs an extra ({error}): pip install "titans-server[otel]"', file=sys.stderr)  # noqa: T201
        return 2
    lifecycle = Lifecycle[AppContext]()
    config = uvicorn.Config(
        SaysWhy(create_app(settings, lifecycle, tracing)),
        host=settings.host,
        port=settings.port,
        http=PunctualProtocol,
        h11_max_incomplete_event_size=max(1 << 14, 2 * settings.max_header_bytes),  # a little too much, the app refuses
        log_config=None,
        access_log=False,  # our own has the request's id
    )
    server = DrainingServer(config, lifecycle, settings.drain_seconds)
    server.run()
    return 0 if server.started and not lifecycle.has_failed else 1


def _tracing() -> "Tracing":
    from titans_server.telemetry.traces import exporting  # noqa: PLC0415 (an extra)

    return exporting()


def command() -> tuple[str, object, object]:
    """The subcommand for `titans`: its help, its arguments, its action."""
    return "run the server", add_arguments, run


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    raise SystemExit(run(parser.parse_args()))
