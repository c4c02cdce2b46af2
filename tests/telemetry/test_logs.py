"""What a server logs: which request a line is about, and never what a user wrote."""

import json
import logging
import time

import httpx
import pytest
from support.servers import ServerProcess
from titans_server.errors import Overloaded
from titans_server.telemetry import request
from titans_server.telemetry.logs import JSONFormatter, TextFormatter

MARKER = "xylophone-of-the-drowned-mayor"
PLAIN = {"Content-Type": "text/plain"}


def lines(server: ServerProcess) -> list[dict[str, object]]:
    whole = server.log.rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def logged(server: ServerProcess, request_id: str) -> list[dict[str, object]]:
    """The lines about a request; the last is written after the answer has gone."""
    for _ in range(100):
        if found := [line for line in lines(server) if line.get("request_id") == request_id]:
            return found
        time.sleep(0.05)
    raise AssertionError(f"nothing about {request_id}")


def test_every_line_of_a_server_is_an_object(server: ServerProcess, http: httpx.Client) -> None:
    http.post("/v1/sessions")
    for line in lines(server):
        assert line.keys() >= {"time", "level", "logger", "message"}


def test_a_sane_request_id_is_kept_in_the_answer_and_in_the_log(server: ServerProcess, http: httpx.Client) -> None:
    response = http.get("/v1/sessions/none", headers={"X-Request-ID": "trace:4711/a+b=c.d_e-f"})
    assert response.headers.get_list("x-request-id") == ["trace:4711/a+b=c.d_e-f"]
    (line,) = logged(server, "trace:4711/a+b=c.d_e-f")
    fields = ("logger", "method", "path", "status", "code")
    assert [line[name] for name in fields] == [
        "titans_server.access",
        "GET",
        "/v1/sessions/none",
        404,
        "session_not_found",
    ]


def test_a_path_begins_no_line_and_adds_no_field(server: ServerProcess, http: httpx.Client) -> None:
    http.get("/v1/sessions/a%0Aall is well%20status=200", headers={"X-Request-ID": "a-path-with-lines"})
    (line,) = logged(server, "a-path-with-lines")
    (text,) = TextFormatter().format(record(path=line["path"])).splitlines()[1:]  # the first is the record's own
    assert text.endswith("path=/v1/sessions/a%0Aall%20is%20well%20status%3D200")


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, 'a"b', "é", "a;b", "a\tb"])
def test_another_request_id_is_replaced(http: httpx.Client, given: str) -> None:
    made = http.get("/health/live", headers={b"X-Request-ID": given.encode()}).headers["x-request-id"]
    assert made != given
    assert made.startswith("req_")


def test_every_answer_has_an_id_of_its_own(http: httpx.Client) -> None:
    paths = ["/health/live", "/nowhere", "/v1/sessions", "/metrics"]
    assert len({http.get(path).headers["x-request-id"] for path in paths}) == len(paths)


def test_no_line_has_what_a_user_wrote(server: ServerProcess, http: httpx.Client) -> None:
    session = http.post("/v1/sessions", json={"metadata": {"note": MARKER}}).json()["id"]
    path = f"/v1/sessions/{session}"
    model = http.get("/v1/models").json()["data"][0]["id"]
    chat = {"model": model, "messages": [{"role": "user", "content": MARKER}], "max_tokens": 4, "session": session}
    for accept in ({}, {"Accept": "text/event-stream"}):
        assert http.post(f"{path}/documents", content=f"{MARKER} " * 9, headers=PLAIN | accept).status_code == 200
        http.post(f"{path}/documents", content=MARKER.encode() + b"\xff", headers=PLAIN | accept)
        http.post(f"{path}/documents", content=f'{{"text": "{MARKER}\n', headers={"Content-Type": "application/json"})
    for stream in (False, True):
        ask = {"prompt": MARKER, "max_tokens": 4, "stream": stream}
        assert http.post(f"{path}/completions", json=ask | {"memory": "write"}).status_code == 200
        assert http.post("/v1/chat/completions", json=chat | {"stream": stream}).status_code == 200
    assert http.post(f"{path}/completions", json={"prompt": MARKER * 2_000}).status_code == 422
    assert http.post(f"{path}/completions", json={"prompt": MARKER, MARKER: MARKER, "top_p": 7}).status_code == 422
    assert http.post(f"{path}/completions", content=f'{{"prompt": "{MARKER}').status_code == 422
    assert http.post("/v1/completions", json={"model": model, "prompt": [MARKER, 7]}).status_code == 400
    http.get(f"/v1/sessions?{MARKER}")
    answer = {"prompt": "what", "max_tokens": 40, "temperature": 0}
    said = http.post(f"{path}/completions", json=answer).json()["text"]
    assert http.post(f"{path}/completions", json=answer | {"stream": True}).status_code == 200
    assert not [piece for piece in said.split() if len(piece) > 5 and piece in server.log]
    assert '"text"' not in server.log and "delta" not in server.log
    assert len(server.log) > 1_000
    assert MARKER not in server.log


def record(**extra: object) -> logging.LogRecord:
    made = logging.LogRecord("who", logging.WARNING, __file__, 1, "it is %s", ("so\nand so",), None)
    vars(made).update(extra)
    return made


def test_json_stays_on_one_line() -> None:
    line = JSONFormatter().format(record(request_id="r", session_id=None, status=200))
    assert "\n" not in line
    fields = json.loads(line)
    assert fields.pop("time").endswith("+00:00")
    assert fields == {
        "level": "warning",
        "logger": "who",
        "message": "it is so\nand so",
        "request_id": "r",
        "status": 200,
    }


def test_text_says_the_same_to_people() -> None:
    assert (
        TextFormatter()
        .format(record(request_id="r", session_id="s"))
        .endswith("WARNING who: it is so\nand so request_id=r session_id=s")
    )


def test_a_traceback_is_in_the_object() -> None:
    try:
        raise OSError("no")
    except OSError as error:
        failed = record(exc_info=(type(error), error, error.__traceback__))
    assert "OSError: no" in json.loads(JSONFormatter().format(failed))["exception"]


def test_outside_of_a_request_nothing_is_told() -> None:
    assert request.current() is None
    request.failed(Overloaded("busy"))
    request.about_session("ses_1")
    assert request.current() is None
