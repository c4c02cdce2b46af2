"""Whom a request is from, by what it shows; and that the store is asked once a second, not once a request."""

import asyncio
from dataclasses import replace

import pytest
from titans_server.errors import InvalidAPIKey, StoreUnavailable
from titans_server.tenants import gatekeeper, keys
from titans_server.tenants.gatekeeper import Caller, Gatekeeper
from titans_server.tenants.keys import Key
from titans_server.tenants.quotas import Quotas
from titans_server.tenants.store import MemoryKeys

STATIC = "a-static-key-of-the-operator"
DEFAULTS = Quotas(sessions=5)
ANYONE = Caller("", DEFAULTS)


class Counting(MemoryKeys):
    """Counts how often it is asked, and may be broken."""

    num_asked = 0
    broken = False

    async def get(self, key_id: str) -> Key | None:
        self.num_asked += 1
        await asyncio.sleep(0.01)
        if self.broken:
            raise StoreUnavailable("gone")
        return await super().get(key_id)


def make(
    store: MemoryKeys | None = None, *, static_key: str | None = None, needs_key: bool | None = None
) -> Gatekeeper:
    return Gatekeeper(store or MemoryKeys(), static_key=static_key, needs_key=needs_key, quotas=DEFAULTS)


async def test_without_any_key_everybody_comes_in() -> None:
    gate = make()
    for shown in (None, "", "Bearer", "Bearer none", "Basic dTpw", "nonsense"):
        assert await gate.admit(shown) == ANYONE


async def test_a_stranger_is_not_let_in_for_being_asked_for_on_this_machine() -> None:
    for shown in (None, "Bearer none"):
        with pytest.raises(InvalidAPIKey, match=r"evil\.example"):
            await make().admit(shown, "evil.example")
        assert await make(needs_key=False).admit(shown, "evil.example") == ANYONE, "as its operator wants it"
    store = MemoryKeys()
    key, text = keys.make("one", 1.0)
    await store.put(key)
    for gate in (make(store), make(store, needs_key=True)):
        assert (await gate.admit(f"Bearer {text}", "titans.example")).owner == key.id, "who has a key is none"


async def test_the_first_key_closes_the_door() -> None:
    store = MemoryKeys()
    key, text = keys.make("one", 1.0, Quotas(bytes=7))
    await store.put(key)
    gate = make(store)
    assert await gate.admit(f"Bearer {text}") == Caller(key.id, Quotas(sessions=5, bytes=7))
    assert await gate.admit(f"bearer  {text} ") == Caller(key.id, Quotas(sessions=5, bytes=7))
    for shown in (None, "Bearer none", "Basic dTpw", f"Bearer {text[:-1]}", f"Bearer {text[:-1]}?", text):
        with pytest.raises(InvalidAPIKey):
            await gate.admit(shown)


async def test_revoking_the_last_key_does_not_open_it_again() -> None:
    store = MemoryKeys()
    key, text = keys.make("one", 1.0)
    await store.put(replace(key, revoked_at=2.0))
    for shown in (None, f"Bearer {text}"):
        with pytest.raises(InvalidAPIKey):
            await make(store).admit(shown)


async def test_the_static_key_is_the_operators() -> None:
    gate = make(static_key=STATIC)
    assert await gate.admit(f"Bearer {STATIC}") == Caller("", Quotas())
    for shown in (None, f"Bearer {STATIC}x", f"Bearer {STATIC[:-1]}"):
        with pytest.raises(InvalidAPIKey):
            await gate.admit(shown)


async def test_a_second_key_for_an_owner_gets_at_the_same_sessions() -> None:
    store = MemoryKeys()
    first, _ = keys.make("one", 1.0)
    second, text = keys.make("one, renewed", 1.0, owner=first.owner)
    await store.put(second)
    assert (await make(store).admit(f"Bearer {text}")).owner == first.id


async def test_where_a_key_is_needed_nobody_comes_in_without_one_even_if_all_are_lost() -> None:
    for shown in (None, "Bearer none"):
        with pytest.raises(InvalidAPIKey):
            await make(needs_key=True).admit(shown)


async def test_where_anybody_may_come_a_wrong_key_still_does_not_pass_for_none() -> None:
    store = MemoryKeys()
    await store.put(keys.make("one", 1.0)[0])
    gate = make(store, needs_key=False)
    assert await gate.admit(None) == ANYONE
    with pytest.raises(InvalidAPIKey):
        await gate.admit("Bearer none")


async def test_the_store_is_asked_once_a_second_however_many_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gatekeeper, "_FRESH_SECONDS", 0.2)
    store = Counting()
    key, text = keys.make("one", 1.0)
    await store.put(key)
    gate = make(store)
    await asyncio.gather(*(gate.admit(f"Bearer {text}") for _ in range(100)))
    assert store.num_asked == 1
    await store.put(replace(key, revoked_at=1.0))
    assert await gate.admit(f"Bearer {text}")
    await asyncio.sleep(0.25)
    with pytest.raises(InvalidAPIKey):
        await gate.admit(f"Bearer {text}")
    assert store.num_asked == 2


async def test_a_store_that_fails_lets_nobody_in_and_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Counting()
    key, text = keys.make("one", 1.0)
    await store.put(key)
    gate, store.broken = make(store), True
    outcomes = await asyncio.gather(*(gate.admit(f"Bearer {text}") for _ in range(3)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [StoreUnavailable] * 3
    store.broken = False
    assert (await gate.admit(f"Bearer {text}")).owner == key.id


async def test_one_that_leaves_takes_nobody_elses_answer_along() -> None:
    store = Counting()
    key, text = keys.make("one", 1.0)
    await store.put(key)
    gate = make(store)
    leaving, staying = (asyncio.create_task(gate.admit(f"Bearer {text}")) for _ in range(2))
    await asyncio.sleep(0)
    leaving.cancel()
    assert (await staying).owner == key.id


async def test_made_up_ids_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gatekeeper, "_MAX_LOOKUPS", 10)
    gate = make(needs_key=True)
    for i in range(50):
        with pytest.raises(InvalidAPIKey):
            await gate.admit(f"Bearer titans-{i:016x}-{'A' * 43}")
    assert len(gate._records._asked) <= 10
