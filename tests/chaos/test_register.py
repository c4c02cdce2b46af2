"""Clients do to sessions what Hypothesis thinks of, through kills, and a model of versioned registers says the same."""

import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar
from uuid import uuid4

import httpx
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, precondition, rule, run_state_machine_as_test
from support.extent import WHOLE, whole_or
from support.life import ASK, LostError
from support.register import Answers, Register
from support.table import Table
from support.world import StoreKind, World

TEXTS = ["Short. ", "Some forty bytes of a text to be learnt. ", "And one that goes past a window, then another. " * 4]
texts = st.sampled_from(TEXTS)
back = st.integers(0, 3)  # versions
SECONDS = 60.0  # within which a client that tries again is served


class Clients(RuleBasedStateMachine):
    """What clients do, one rule at a time; `storm` lets several do it at once."""

    sessions = Bundle[str]("sessions")
    world: ClassVar[World]
    answers: ClassVar[Answers]

    def __init__(self) -> None:
        super().__init__()
        self._registers: dict[str, Register] = {}
        self.world.recover()

    @rule(target=sessions)
    def create(self) -> str:
        session = str(self._ask("POST", "")["id"])
        self._registers[session] = Register()
        return session

    @rule(session=sessions, text=texts)
    def learn(self, session: str, text: str) -> None:
        answer = self._ask("POST", f"/{session}/documents", json={"text": text})
        self._registers[session].write(answer["version"], text)

    @rule(session=sessions, text=texts, key=st.sampled_from(["a", "b"]))
    def learn_under_a_key(self, session: str, text: str, key: str) -> None:
        register = self._registers[session]
        response = self._learn(session, text, key)
        used = register.keys.get(key)
        if used is None:
            register.write(response.raise_for_status().json()["version"], text)
            register.keys[key] = (text, register.version)
        elif used[0] == text:
            assert response.raise_for_status().json()["version"] == used[1]
        else:
            assert (response.status_code, response.json()["error"]["code"]) == (422, "idempotency_key_reused")

    @rule(session=sessions)
    def look(self, session: str) -> None:
        self._check(session, self._registers[session])

    @rule(session=sessions)
    def answer_and_learn(self, session: str) -> None:
        answer = self._ask("POST", f"/{session}/completions", json=ASK | {"memory": "write"})
        self._registers[session].write(answer["version"], f"? {ASK['prompt']}")

    @rule(target=sessions, session=sessions, back=back)
    def fork(self, session: str, back: int) -> str:
        version = self._before(session, back)
        shown = self._ask("POST", f"/{session}/fork", json={"version": version})
        self._registers[shown["id"]] = self._registers[session].fork(version)
        return str(shown["id"])

    @rule(session=sessions, back=back)
    def restore(self, session: str, back: int) -> None:
        version = self._before(session, back)
        shown = self._ask("POST", f"/{session}/restore", json={"version": version})
        self._registers[session].restore(shown["version"], version)

    @rule(session=sessions, text=texts, back=back)
    def learn_if_it_is_at_a_version(self, session: str, text: str, back: int) -> None:
        version, register = self._before(session, back), self._registers[session]
        headers = {"If-Match": f'"{version}"'}
        response = self._request("POST", f"/{session}/documents", json={"text": text}, headers=headers)
        if version == register.version:
            register.write(response.raise_for_status().json()["version"], text)
        else:
            assert (response.status_code, response.json()["error"]["code"]) == (412, "version_conflict")

    @rule(session=consumes(sessions))
    def delete(self, session: str) -> None:
        assert self._request("DELETE", f"/{session}").status_code == 204
        assert self._request("GET", f"/{session}").status_code == 404
        del self._registers[session]

    @rule()
    def kill_the_server(self) -> None:
        self.world.kill_server()
        self.world.recover()

    @precondition(lambda self: self.world.kind == "redis")
    @rule()
    def kill_redis(self) -> None:
        self.world.kill_redis()
        self.world.recover()

    @rule(
        plan=st.lists(st.tuples(sessions, texts), min_size=2, max_size=5),
        kill_after=st.none() | st.floats(0.0, 0.15),
    )
    def storm(self, plan: list[tuple[str, str]], kill_after: float | None) -> None:
        """Clients write at once, and the server may be killed meanwhile. Each tries again until it is acknowledged."""
        with ThreadPoolExecutor(len(plan)) as pool:
            under_way = [pool.submit(self._learn, session, text, uuid4().hex) for session, text in plan]
            if kill_after is not None:
                time.sleep(kill_after)
                self.world.kill_server()
                self.world.recover()
            versions = [task.result().raise_for_status().json()["version"] for task in under_way]
        written: dict[str, list[tuple[int, str]]] = defaultdict(list)
        for (session, text), version in zip(plan, versions, strict=True):
            written[session].append((version, text))
        for session, writes in written.items():
            for version, text in sorted(writes):
                self._registers[session].write(version, text)

    def teardown(self) -> None:
        """All sessions are what they should be, and what one is that reads the same now and in peace."""
        self.world.recover()
        for session, register in self._registers.items():
            self._check(session, register)
        for reading in {register.reading for register in self._registers.values()}:
            alone = self._ask("POST", "")["id"]
            for what in reading:
                if what.startswith("? "):
                    self._ask("POST", f"/{alone}/completions", json=ASK | {"memory": "write"})
                else:
                    self._ask("POST", f"/{alone}/documents", json={"text": what})
            self._check(alone, Register({len(reading): reading}))

    def _check(self, session: str, register: Register) -> None:
        shown = self._ask("GET", f"/{session}")
        answer = self._ask("POST", f"/{session}/completions", json=ASK)
        if not shown["version"] == answer["version"] == register.version:
            raise LostError(f"{session} is at version {shown['version']}, not at {register.version}")
        self.answers.check(register.reading, shown["tokens_seen"], answer["text"])

    def _before(self, session: str, back: int) -> int:
        """A version that is kept: the newest, or up to `back` ones before."""
        versions = self._registers[session].versions
        return max(self._registers[session].version - back, min(versions))

    def _learn(self, session: str, text: str, key: str) -> httpx.Response:
        return self._request("POST", f"/{session}/documents", json={"text": text}, headers={"Idempotency-Key": key})

    def _ask(self, method: str, path: str, **content: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self._request(method, path, **content).raise_for_status().json()
        return answer

    def _request(self, method: str, path: str, **content: Any) -> httpx.Response:
        """An answer that is not "later". What is asked for again is asked for under a key, or changes nothing."""
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                response = self.world.server.http.request(method, f"/v1/sessions{path}", **content)
                if response.status_code == 500:
                    raise LostError(f"{method} {path}: {response.text}")
                if response.status_code not in {429, 503} and not is_in_flight(response):
                    return response
                refusal = response.text
            except httpx.TransportError as error:
                refusal = repr(error)
            assert time.monotonic() < deadline, refusal
            time.sleep(0.05)


def is_in_flight(response: httpx.Response) -> bool:
    return response.status_code == 409 and response.json()["error"]["code"] == "ingestion_in_flight"


@pytest.fixture(scope="module")
def answers() -> Answers:
    return Answers()


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_sessions_are_versioned_registers(
    make_world: Callable[[StoreKind], World], kind: StoreKind, answers: Answers, table: Table
) -> None:
    class Here(Clients):
        world = make_world(kind)

    Here.answers = answers
    bounds = settings(
        max_examples=whole_or(2, 40),
        stateful_step_count=whole_or(25, 50),
        derandomize=not WHOLE,
        database=None,
        deadline=None,
        phases=(Phase.generate,),  # an order of events that fails need not fail twice
        suppress_health_check=list(HealthCheck),
    )

    with table.attempt(kind, "any order of events", "through kills, to a model"):
        run_state_machine_as_test(Here, settings=bounds)
