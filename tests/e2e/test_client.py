"""The client and the command line against a real server; and that both sides mean the same by what they send."""

import inspect
import io
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Literal, get_type_hints

import pytest
import titans_client
from pydantic import TypeAdapter
from support.models import TinyCheckpoint
from support.servers import ServerProcess, Upload, free_port
from titans_client import APIStatusError, AsyncClient, Client
from titans_server import events
from titans_server.api import schemas

TEXT = "Der Schlüssel liegt unter dem dritten Stein. 🙂 " * 20
SIZE = len(TEXT.encode())
LIMIT = 5_000


@pytest.fixture(scope="module")
def server(checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("server")
    limits = {"TITANS_MAX_DOCUMENT_BYTES": str(LIMIT), "TITANS_MAX_WAITING_WRITERS": "0"}
    with ServerProcess(f"sqlite:///{folder}/titans.db", folder / "log", checkpoint.environment | limits) as server:
        yield server


class Driver:
    """Either client: what it returns is awaited where that is needed."""

    def __init__(self, client: Client | AsyncClient) -> None:
        self.client: Any = client
        self._defaults = {"temperature": 0, "max_tokens": 32}

    async def create(self, metadata: dict[str, str] | None = None) -> Any:
        return await self.settle(self.client.sessions.create(metadata))

    async def get(self, session: str) -> Any:
        return await self.settle(self.client.sessions.get(session))

    async def delete(self, session: str) -> Any:
        return await self.settle(self.client.sessions.delete(session))

    async def ingest(self, session: str, document: object, **options: Any) -> Any:
        return await self.settle(self.client.ingest(session, document, **options))

    async def ingest_stream(self, session: str, document: object) -> list[Any]:
        return await self.collect(self.client.ingest_stream(session, document))

    async def complete(self, session: str, **options: Any) -> Any:
        return await self.settle(self.client.complete(session, **self._defaults | {"prompt": "wo?"} | options))

    async def stream(self, session: str, **options: Any) -> list[Any]:
        return await self.collect(self.client.stream(session, **self._defaults | {"prompt": "wo?"} | options))

    async def settle(self, result: Any) -> Any:
        return await result if inspect.isawaitable(result) else result

    async def collect(self, stream: Any) -> list[Any]:
        return [item async for item in stream] if hasattr(stream, "__aiter__") else list(stream)


@pytest.fixture(params=[Client, AsyncClient])
async def titans(request: pytest.FixtureRequest, server: ServerProcess) -> AsyncIterator[Driver]:
    driver = Driver(request.param(server.url))
    yield driver
    await driver.settle(driver.client.close())


async def test_a_session_from_birth_to_death(titans: Driver) -> None:
    session = await titans.create({"book": "Ü"})
    assert (session.version, session.tokens_seen, session.metadata) == (0, 0, {"book": "Ü"})
    assert await titans.get(session.id) == session
    learnt = await titans.ingest(session.id, TEXT)
    assert (learnt.session, learnt.version, learnt.bytes) == (session.id, 1, SIZE)
    shown = await titans.get(session.id)
    assert (shown.version, shown.tokens_seen) == (1, learnt.tokens_seen)
    assert shown.state_bytes > 0
    assert await titans.delete(session.id) is None
    with pytest.raises(titans_client.SessionNotFoundError) as caught:
        await titans.get(session.id)
    assert (caught.value.status, caught.value.code) == (404, "session_not_found")


async def test_versions_forks_and_state_files(titans: Driver) -> None:
    sessions, settle = titans.client.sessions, titans.settle
    session = (await titans.create()).id
    for i in range(2):
        await titans.ingest(session, f"{i} {TEXT}", key=f"part-{i}")
    assert (await titans.ingest(session, f"1 {TEXT}", key="part-1")).replayed
    assert [x.version for x in (await settle(sessions.versions(session))).data] == [2, 1, 0]
    fork = await settle(sessions.fork(session, 1, metadata={"a": "fork"}))
    assert (fork.version, fork.parent.session, fork.metadata) == (1, session, {"a": "fork"})
    assert (await settle(sessions.restore(session, 1, if_version=2))).version == 3
    with pytest.raises(titans_client.VersionConflictError):
        await settle(sessions.restore(session, 1, if_version=2))
    with pytest.raises(titans_client.VersionNotFoundError):
        await settle(sessions.fork(session, 9))
    other = await settle(sessions.create(ttl_seconds=1000))
    imported = await settle(sessions.import_state(other.id, await settle(sessions.export_state(session))))
    assert (imported.version, imported.tokens_seen) == (1, fork.tokens_seen)
    with pytest.raises(titans_client.InvalidStateError):
        await settle(sessions.import_state(other.id, b"no state"))
    assert other.id in {x.id for x in (await settle(sessions.list(100))).data}
    later = await settle(titans.client.ingest_later(other.id, TEXT))
    assert (await settle(titans.client.ingestion(later.id))).session == other.id
    assert (await settle(titans.client.cancel_ingestion(later.id))).status in {"cancelled", "done"}
    with pytest.raises(titans_client.IngestionNotFoundError):
        await settle(titans.client.ingestion("ing_none_0"))


def test_the_command_line_forks_rewinds_and_moves_sessions(server: ServerProcess, tmp_path: Path) -> None:
    def run(*words: str) -> str:
        command = [sys.executable, "-m", "titans_client.cli", *words, "--url", server.url]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout.strip()

    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    session = run("sessions", "create")
    ingestion = run("ingest", str(tmp_path / "text"), "--session", session, "--key", "k", "--later")
    shown = {"status": ""}
    while shown["status"] != "done":
        shown = json.loads(run("ingestions", "show", ingestion))
        assert shown["status"] in {"learning", "done"}
    assert run("ingestions", "cancel", ingestion) == f"{ingestion} done"
    assert run("sessions", "versions", session).startswith("1: ")
    fork = run("sessions", "fork", session, "--version", "1")
    assert run("sessions", "restore", fork, "--version", "1") == f"{fork} version 2 is what version 1 was"
    run("sessions", "export", fork, str(tmp_path / "state"))
    assert run("sessions", "import", session, str(tmp_path / "state")).startswith(f"{session} version 2: ")
    assert run("sessions", "list", "--limit", "1").startswith(f"{fork} version 2: ")


def test_a_list_that_is_not_whole_says_how_to_go_on(server: ServerProcess) -> None:
    with Client(server.url) as client:
        for _ in range(2):
            client.sessions.create()

    def listed(*words: str) -> tuple[str, str]:
        command = [sys.executable, "-m", "titans_client.cli", "--url", server.url, "sessions", "list", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout, done.stderr

    shown, told = listed("--limit", "1")
    newest = shown.split()[0]
    assert told == f"there are more: --after {newest}\n"
    rest, told = listed("--limit", "100", "--after", newest)
    assert rest and newest not in rest
    assert not told


async def test_a_document_may_be_given_in_any_form(titans: Driver, tmp_path: Path) -> None:
    data = TEXT.encode()
    path = tmp_path / "book.txt"
    path.write_bytes(data)
    forms: list[object] = [TEXT, data, path, io.BytesIO(data), (data[i : i + 7] for i in range(0, SIZE, 7))]
    if isinstance(titans.client, AsyncClient):

        async def pieces() -> AsyncIterator[bytes]:
            yield data[:501]
            yield data[501:]

        forms.append(pieces())
    answers = set()
    for form in forms:
        session = (await titans.create()).id
        assert (await titans.ingest(session, form)).bytes == SIZE
        answers.add((await titans.complete(session)).text)
    assert len(answers) == 1
    session = (await titans.create()).id
    as_json = json.dumps({"text": TEXT})
    assert (await titans.ingest(session, as_json, content_type="application/json")).bytes == SIZE
    assert (await titans.complete(session)).text in answers


async def test_progress_comes_before_the_document(titans: Driver) -> None:
    session = (await titans.create()).id
    *progress, learnt = await titans.ingest_stream(session, TEXT)
    assert len(progress) > 2
    assert all(type(event) is titans_client.Progress for event in progress)
    assert [event.bytes for event in progress] == sorted(event.bytes for event in progress)
    assert type(learnt) is titans_client.Document
    assert (learnt.version, learnt.bytes) == (1, SIZE)


async def test_an_answer_in_one_piece_and_in_many(titans: Driver) -> None:
    session = (await titans.create()).id
    await titans.ingest(session, TEXT)
    whole = await titans.complete(session)
    assert (whole.session, whole.version, whole.finish_reason) == (session, 1, "length")
    assert whole.usage.completion_tokens == 32
    *chunks, last = await titans.stream(session)
    assert "".join(chunk.text for chunk in [*chunks, last]) == whole.text
    assert {chunk.finish_reason for chunk in chunks} == {None}
    assert (last.finish_reason, last.usage) == (whole.finish_reason, whole.usage)
    stop = whole.text[4:6]
    stopped = await titans.complete(session, stop=[stop, "###"])
    assert (stopped.text, stopped.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
    assert (await titans.complete(session, memory="off")).text != whole.text
    assert (await titans.complete(session, memory="write")).version == 2
    drawn = {"temperature": 1.2, "top_p": 0.9, "top_k": 50, "seed": 7}
    assert (await titans.complete(session, **drawn)).text == (await titans.complete(session, **drawn)).text


async def test_health(titans: Driver) -> None:
    health = await titans.settle(titans.client.health())
    assert (health.status, health.device, health.store) == ("ready", "cpu", "sqlite")


async def test_errors_have_classes(titans: Driver) -> None:
    session = (await titans.create()).id
    refused: list[tuple[Any, type[APIStatusError], str]] = [
        (lambda: titans.ingest(session, ""), titans_client.InvalidRequestError, "empty_document"),
        (lambda: titans.ingest(session, b"ab\xff"), titans_client.InvalidRequestError, "invalid_utf8"),
        (lambda: titans.ingest_stream(session, b"ab\xff"), titans_client.InvalidRequestError, "invalid_utf8"),
        (
            lambda: titans.ingest(session, "{}", content_type="application/json"),
            titans_client.InvalidRequestError,
            "invalid_json",
        ),
        (
            lambda: titans.ingest(session, "%PDF", content_type="application/pdf"),
            titans_client.UnsupportedMediaTypeError,
            "unsupported_media_type",
        ),
        (lambda: titans.ingest(session, "a" * (LIMIT + 1)), titans_client.DocumentTooLargeError, "document_too_large"),
        (
            lambda: titans.ingest(session, iter([b"a" * LIMIT, b"a"])),
            titans_client.DocumentTooLargeError,
            "document_too_large",
        ),
        (lambda: titans.complete(session, prompt="a" * 5_000), titans_client.InvalidRequestError, "prompt_too_long"),
        (lambda: titans.stream(session, prompt="a" * 5_000), titans_client.InvalidRequestError, "prompt_too_long"),
        (lambda: titans.complete(session, top_p=2), titans_client.InvalidRequestError, "invalid_request"),
        (lambda: titans.ingest("ses_nobody", "a"), titans_client.SessionNotFoundError, "session_not_found"),
        (lambda: titans.stream("ses_nobody"), titans_client.SessionNotFoundError, "session_not_found"),
    ]
    for call, error, code in refused:
        with pytest.raises(error) as caught:
            await call()
        assert caught.value.code == code
    with pytest.raises(titans_client.InvalidRequestError) as invalid:
        await titans.complete(session, temperature=5)
    assert invalid.value.param == "temperature"
    assert (await titans.get(session)).version == 0


async def test_a_busy_session_says_when_to_try_again(titans: Driver, server: ServerProcess) -> None:
    session = (await titans.create()).id
    with Upload(server, session) as upload:
        upload.begin(TEXT)
        with pytest.raises(titans_client.SessionBusyError) as caught:
            await titans.ingest(session, "too much")
        assert (caught.value.status, caught.value.retry_after) == (429, 1.0)
        assert upload.finish()[0] == "done"
    assert (await titans.ingest(session, "and on")).version == 2


async def test_nobody_at_the_address() -> None:
    with Client(f"http://127.0.0.1:{free_port()}", max_retries=0) as client:
        with pytest.raises(titans_client.APIConnectionError):
            client.sessions.create()
        with pytest.raises(titans_client.APIConnectionError):
            client.ingest("ses_any", TEXT)


def run(server: ServerProcess | None, *words: str, stdin: bytes = b"") -> tuple[int, str, str]:
    """The command line: its exit status, what it prints, and what it prints about errors."""
    url = f"http://127.0.0.1:{free_port()}" if server is None else server.url
    environment = os.environ | {"TITANS_BASE_URL": url}
    titans = Path(sys.executable).with_name("titans")
    done = subprocess.run([titans, *words], input=stdin, capture_output=True, env=environment, timeout=120, check=False)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_the_command_line_from_birth_to_death(server: ServerProcess, tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text(TEXT, encoding="utf-8")
    status, out, _ = run(server, "sessions", "create")
    session = out.strip()
    assert (status, session.startswith("ses_"), out.count("\n")) == (0, True, 1)

    status, out, progress = run(server, "ingest", str(path), "--session", session)
    assert (status, out.startswith(f"{session} version 1: "), f"({SIZE:,} bytes)" in out) == (0, True, True)
    assert "learning" in progress
    status, out, _ = run(server, "ingest", "-", "--session", session, stdin=TEXT.encode())
    assert (status, out.startswith(f"{session} version 2: ")) == (0, True)

    status, out, err = run(server, "ask", session, "Wo ist er?", "--max-tokens", "16")
    with Client(server.url) as client:
        prompt = "\n\nQuestion: Wo ist er?\nAnswer:"
        answer = client.complete(session, prompt, temperature=0, stop="\n", max_tokens=16)
        shown = client.sessions.get(session)
    assert (status, out, err) == (0, answer.text.lstrip() + "\n", "")

    status, out, _ = run(server, "sessions", "show", session)
    assert (status, json.loads(out)) == (0, shown.model_dump())
    assert run(server, "sessions", "delete", session) == (0, f"deleted {session}\n", "")
    status, out, err = run(server, "sessions", "show", session)
    assert (status, out, "session_not_found" in err, err.count("\n")) == (1, "", True, 1)


def test_the_command_line_makes_a_session_for_a_file(server: ServerProcess, tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text(TEXT, encoding="utf-8")
    status, out, _ = run(server, "ingest", str(path))
    session, learnt = out.splitlines()
    assert status == 0
    assert learnt.startswith(f"{session} version 1: ")


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["ingest", "no such file.txt"], 1, "no such file.txt"),
        (["ask", "ses_nobody", "who?"], 1, "session_not_found"),
        (["sessions"], 2, "usage"),
        (["no-such-command"], 2, "no-such-command"),
        (["serve", "--store", "mysql://x"], 2, "known are memory://"),
    ],
)
def test_the_command_line_says_what_is_wrong(server: ServerProcess, words: list[str], status: int, says: str) -> None:
    found, out, err = run(server, *words)
    assert (found, out, says in err, "Traceback" in err) == (status, "", True, False)


def test_the_command_line_without_a_server() -> None:
    status, out, err = run(None, "sessions", "create")
    assert (status, out, "titans serve" in err, err.count("\n")) == (1, "", True, 1)


def test_the_command_line_lists_what_is_installed() -> None:
    status, out, _ = run(None, "--help")
    listed = [line.split()[0] for line in out.splitlines() if line.startswith("    ")]
    assert status == 0
    assert {"sessions", "ingest", "ask", "health", "serve", "train"} <= set(listed)
    status, out, _ = run(None, "serve", "--help")
    assert (status, "TITANS_PORT" in out) == (0, True)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (schemas.Session, titans_client.Session),
        (schemas.Completion, titans_client.Completion),
        (schemas.Health, titans_client.Health),
        (events.DocumentLearnt, titans_client.Document),
        (events.IngestionStatus, titans_client.Ingestion),
        (schemas.KeptVersion, titans_client.Version),
        (events.Progress, titans_client.Progress),
        (events.CompletionChunk, titans_client.CompletionChunk),
        (events.Usage, titans_client.Usage),
    ],
)
def test_client_and_server_mean_the_same_by_an_answer(theirs: Any, ours: Any) -> None:
    sent, read = fields(theirs), fields(ours)
    assert read.keys() == sent.keys()
    for name, kinds in read.items():
        is_wider = kinds == {"string"} and all(kind.startswith('"') for kind in sent[name])
        assert kinds == sent[name] or is_wider, name


def test_client_and_server_mean_the_same_by_an_answers_options() -> None:
    taken = fields(schemas.CreateCompletion, "validation")
    del taken["prompt"], taken["stream"]  # an argument of its own; the choice of the method
    hints = get_type_hints(titans_client.CompletionOptions)
    assert hints.keys() == taken.keys()
    for name, hint in hints.items():
        assert kinds_of(TypeAdapter(hint).json_schema()) == taken[name] | {"null"}, name


def fields(model: Any, mode: Literal["validation", "serialization"] = "serialization") -> dict[str, set[str]]:
    """Names, and which JSON each may hold: when it is read, or when it is written."""
    properties = TypeAdapter(model).json_schema(mode=mode)["properties"]
    return {name: kinds_of(schema) for name, schema in properties.items()}


def kinds_of(schema: dict[str, Any]) -> set[str]:
    """Types and choices; no limits, titles or defaults."""
    if "anyOf" in schema:
        return set().union(*map(kinds_of, schema["anyOf"]))
    if choices := schema.get("enum", [schema["const"]] if "const" in schema else []):
        return {json.dumps(choice) for choice in choices}
    if "$ref" in schema:
        return {schema["$ref"]}
    inner = schema.get("items") or schema.get("additionalProperties")
    return {" of ".join([schema["type"], *sorted(kinds_of(inner) if inner else [])])}
