"""Every error leaves as one shape: {"error": {"message", "type", "param", "code"}}."""

import json
import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from titans_server.api.head import with_head
from titans_server.errors import InvalidRequest, TitansError
from titans_server.telemetry import request as request_info

log = logging.getLogger(__name__)


def add_handlers(app: FastAPI) -> None:
    """Answer for everything that a route may raise."""
    app.add_exception_handler(TitansError, _titans_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(ClientDisconnect, _client_left)


def answer(error: TitansError, status: int | None = None) -> Response:
    """The response that an error leaves as, with its own status unless another is given."""
    request_info.failed(error)
    headers = dict(error.headers)
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    body = json.dumps(error.body())  # in ASCII: what is quoted in it may be no text
    return Response(body, status or error.status, headers, "application/json")


async def _titans_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, TitansError)
    return answer(error)


def unreadable(error: HTTPException) -> InvalidRequest | None:
    """FastAPI's 400 for a body that it cannot read, as an error of ours; None where it is another one."""
    if error.status_code != 400 or not isinstance(error.__cause__, ValueError | RecursionError):
        return None
    is_deep = isinstance(error.__cause__, RecursionError)
    message = "the body is nested too deep" if is_deep else "the body is not JSON in UTF-8"
    return InvalidRequest(message, code="invalid_json")


def invalid_request(error: RequestValidationError) -> InvalidRequest:
    """The first thing that is wrong with a request's body, its query or its headers."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:])  # the first part is which of these it is
    if first["type"] == "json_invalid":
        return InvalidRequest(f"the body is not JSON: {first['ctx']['error']}", code="invalid_json")
    if not where and isinstance(first.get("input"), bytes):  # FastAPI reads no other body, and says nothing of that
        return InvalidRequest("the body is not said to be JSON: send it with Content-Type: application/json")
    return InvalidRequest(f"{where or 'the body'}: {first['msg']}", param=where or None)


async def _validation_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return answer(invalid_request(error))


async def _http_exception(request: Request, error: Exception) -> Response:
    """The router's own: no such path (404), no such method (405)."""
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, TitansError):  # FastAPI's way to say that the body could not be read
        return answer(error.__cause__)
    if isinstance(error.__cause__, ClientDisconnect):
        return await _client_left(request, error.__cause__)
    if (refused := unreadable(error)) is not None:
        return answer(refused)
    response = answer(InvalidRequest(error.detail, code=f"http_{error.status_code}"), error.status_code)
    response.headers.update(error.headers or {})
    if error.status_code == 405:
        response.headers["Allow"] = ", ".join(sorted(_methods(request))) or response.headers["Allow"]
    return response


def _methods(request: Request) -> list[str]:
    """Of all the routes with the request's path: each of them knows its own alone."""
    path = getattr(request.scope.get("route"), "path", "")
    return with_head([method.upper() for method in request.app.openapi()["paths"].get(path, {})], path)


async def _client_left(_: Request, error: Exception) -> Response:
    log.info("the client left before it was answered")
    return Response(status_code=499)  # which nobody reads, but whoever counts
