"""The OpenAPI document is true: what it says is what a real server does, to good and to bad input."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.models import write_tiny_checkpoint
from support.servers import LiveServer, tiny_settings
from titans_server.settings import Settings

CONFIG = Path(__file__).parent / "schemathesis.toml"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    checkpoint = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    return tiny_settings(
        checkpoint,
        store="memory://",
        max_completion_tokens=4,
        max_prompt_tokens=200,
        max_document_bytes=2_000,
    )


@pytest.mark.timeout(3_600)
def test_schemathesis_finds_nothing(server: LiveServer, tmp_path: Path) -> None:
    """Every operation with examples, at the bounds of its schema, at random, and one after the other by its links.

    TITANS_TEST_EXAMPLES makes it longer and its input another each time: `make fuzz`.
    """
    num_examples = os.environ.get("TITANS_TEST_EXAMPLES")
    kind = ["--generation-deterministic"] if num_examples is None else []
    command = [str(Path(sys.executable).with_name("st")), "--config-file", str(CONFIG), "--no-color", "run", *kind]
    command += [f"{server.url}/openapi.json", "--max-examples", num_examples or "2", "--checks", "all"]
    command += ["--exclude-checks", "ensure_resource_availability"]  # a session is deleted as a conversation, too
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_document_names_every_status_and_the_shape_of_errors(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    assert "HTTPValidationError" not in str(document)
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            statuses = set(operation["responses"])
            if path == "/metrics":
                assert {"401", "415", "431", "500", "503"} <= statuses and "429" not in statuses
            if not path.startswith("/v1/"):
                continue
            assert {"401", "413", "415", "429", "431", "500", "503"} <= statuses, (method, path)
            has_name = "{" in path or "X-Session-ID" in str(operation.get("parameters"))
            assert path == "/v1/sessions" or ("404" in statuses) == has_name, path
            for status, response in operation["responses"].items():
                if int(status) >= 400:
                    shown = response["content"]["application/json"]["schema"]
                    assert shown == {"$ref": "#/components/schemas/Error"}


def test_the_document_has_the_shape_of_what_is_told_of_a_document_and_of_an_answer(
    http: httpx.Client, session: str
) -> None:
    document, path = http.get("/openapi.json").json(), f"/v1/sessions/{session}"
    learnt = http.post(f"{path}/documents", content="text", headers={"Content-Type": "text/plain"})
    later = http.post(
        f"{path}/documents", content="more", headers={"Content-Type": "text/plain", "Prefer": "respond-async"}
    )
    answer = http.post(f"{path}/completions", json={"prompt": "It was", "max_tokens": 1})
    for told, kind in ((learnt, "documents"), (later, "documents"), (answer, "completions")):
        shown = document["paths"]["/v1/sessions/{session_id}/" + kind]["post"]["responses"][str(told.status_code)]
        reference = shown["content"]["application/json"]["schema"]["$ref"]
        schema = document["components"]["schemas"][reference.rpartition("/")[2]]
        assert told.json().keys() == schema["properties"].keys()


@pytest.mark.parametrize("preference", ["].", "", "handling=lenient; x", "resumable-not, respond-asynchronously"])
@pytest.mark.parametrize(
    ("path", "sent"),
    [
        ("/v1/sessions/{session_id}/completions", {"json": {"prompt": "It was", "max_tokens": 1}}),
        ("/v1/completions", {"json": {"model": "tiny-0", "prompt": "It was", "max_tokens": 1}}),
        ("/v1/sessions/{session_id}/documents", {"content": b"text", "headers": {"Content-Type": "text/plain"}}),
    ],
)
def test_a_preference_that_is_not_known_is_text_and_ignored(
    http: httpx.Client, session: str, path: str, sent: dict[str, Any], preference: str
) -> None:
    """RFC 7240, section 2."""
    parameters = http.get("/openapi.json").json()["paths"][path]["post"]["parameters"]
    assert [x["schema"] for x in parameters if x["name"].lower() == "prefer"] == [{"type": "string"}]
    headers = sent.get("headers", {}) | {"Prefer": preference}
    answer = http.post(path.format(session_id=session), **sent | {"headers": headers})
    assert answer.status_code == 200
    assert "preference-applied" not in answer.headers


def test_a_method_that_is_not_there_is_told_with_those_that_are(http: httpx.Client, session: str) -> None:
    refused = http.put(f"/v1/sessions/{session}")
    assert (refused.status_code, refused.headers["allow"]) == (405, "DELETE, GET, HEAD")
    refused = http.put("/v1/streams/str_none")
    assert (refused.status_code, refused.headers["allow"]) == (405, "DELETE, GET")


@pytest.mark.parametrize(
    ("path", "status"), [("/v1/sessions", 422), ("/v1/completions", 400), ("/v1/conversations", 400)]
)
def test_a_body_that_is_not_utf8_is_no_json(http: httpx.Client, path: str, status: int) -> None:
    refused = http.post(path, content=b'"\xff"', headers={"Content-Type": "application/json"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (status, "invalid_json")


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
@pytest.mark.parametrize(
    ("path", "status"), [("/v1/sessions", 422), ("/v1/completions", 400), ("/v1/conversations", 400)]
)
def test_a_body_nested_too_deep_to_read_is_no_json(http: httpx.Client, path: str, status: int, opening: bytes) -> None:
    refused = http.post(path, content=100_000 * opening, headers={"Content-Type": "application/json"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (status, "invalid_json")


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate, gzip", "zstd", "nonsense"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/sessions/{}/documents"])
def test_a_compressed_body_is_refused_unread(http: httpx.Client, session: str, path: str, encoding: str) -> None:
    headers = {"Content-Encoding": encoding, "Content-Type": "text/plain"}
    refused = http.post(path.format(session), content=b"\x1f\x8b" + b"\0" * 100, headers=headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (415, "unsupported_media_type")
    assert http.get(f"/v1/sessions/{session}").json()["version"] == 0


def test_an_encoding_on_a_second_line_is_one_too(http: httpx.Client, session: str) -> None:
    headers = [("Content-Encoding", "identity"), ("Content-Encoding", "gzip"), ("Content-Type", "text/plain")]
    refused = http.post(f"/v1/sessions/{session}/documents", content=b"text", headers=headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (415, "unsupported_media_type")


def test_a_body_that_says_that_it_is_as_it_is_is_read(http: httpx.Client, session: str) -> None:
    headers = {"Content-Encoding": "identity", "Content-Type": "text/plain"}
    assert http.post(f"/v1/sessions/{session}/documents", content=b"text", headers=headers).status_code == 200
