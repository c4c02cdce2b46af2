"""API keys: what is kept of them says nothing, and comparing says nothing either."""

import statistics
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from titans_server.errors import StateCorrupted
from titans_server.tenants import keys
from titans_server.tenants.keys import Key
from titans_server.tenants.quotas import Quotas


def test_a_key_opens_its_own_record_and_no_other() -> None:
    one, text = keys.make("one", 1.0)
    other, _ = keys.make("other", 1.0)
    parts = keys.split(text)
    assert parts is not None and parts[0] == one.id
    assert keys.is_open(one, parts[1])
    assert not keys.is_open(other, parts[1])
    assert not keys.is_open(None, parts[1])
    assert not keys.is_open(replace(one, revoked_at=2.0), parts[1])


def test_what_is_kept_does_not_have_the_secret_and_differs_for_the_same_secret() -> None:
    key, text = keys.make("one", 1.0)
    parts = keys.split(text)
    assert parts is not None
    assert parts[1] not in key.to_json()
    assert key.digest not in repr(key), "not even that is logged by mistake"
    salted = {keys._digest(parts[1], salt) for salt in (key.salt, "ff" * 16)}
    assert len(salted) == 2 and key.digest in salted


def test_records_survive_being_written_down() -> None:
    key, _ = keys.make("Ü", 1.5, Quotas(sessions=3, tokens_per_minute=0), owner="someone")
    assert Key.from_json(key.to_json()) == key
    assert key.to_json().isascii()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"id": 1}', '{"quotas": {"a": 1}}', '{"quotas": 3}'])
def test_a_record_that_nobody_wrote_is_no_key(text: str) -> None:
    with pytest.raises(StateCorrupted):
        Key.from_json(text)


@given(st.text())
def test_any_text_is_a_key_of_the_form_or_none(text: str) -> None:
    assert keys.split(text) is None
    assert keys.same(text, text)
    assert not keys.same(text, text + "x")


def test_a_key_with_anything_more_is_none() -> None:
    _, text = keys.make("one", 1.0)
    for other in (text + "\n", " " + text, text[:-1], text.upper(), text.replace("titans-", "titans_")):
        assert keys.split(other) is None


def test_comparing_takes_as_long_for_unknown_keys_and_for_nearly_right_ones() -> None:
    key, text = keys.make("one", 1.0)
    parts = keys.split(text)
    assert parts is not None
    secret = parts[1]
    guesses: dict[str, tuple[Key | None, str]] = {
        "right": (key, secret),
        "wrong from the start": (key, "A" * 43),
        "wrong at the end": (key, secret[:-1] + ("A" if secret[-1] != "A" else "B")),
        "unknown": (None, secret),
        "revoked": (replace(key, revoked_at=1.0), secret),
    }
    taken: dict[str, list[int]] = {name: [] for name in guesses}
    for _ in range(3_000):
        for name, guess in guesses.items():
            started = time.perf_counter_ns()
            keys.is_open(*guess)
            taken[name].append(time.perf_counter_ns() - started)
    medians = [statistics.median(times) for times in taken.values()]
    assert max(medians) < 1.5 * min(medians), dict(zip(taken, medians, strict=True))
