"""URLs name stores; nothing is touched until they are opened."""

from pathlib import Path

import pytest
from titans_server.sessions.memory import MemoryStore
from titans_server.sessions.open import open_store
from titans_server.sessions.redis import RedisStore
from titans_server.sessions.sqlite import SqliteStore


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("memory://", MemoryStore),
        ("sqlite:///sessions.db", SqliteStore),
        ("sqlite:////var/lib/titans/sessions.db", SqliteStore),
        ("redis://localhost:6379/3", RedisStore),
        ("rediss://user:secret@redis.example:6380", RedisStore),
        ("redis+sentinel://:secret@one.example:26379,two.example/titans/2?socket_timeout=3", RedisStore),
        ("rediss+sentinel://one.example/titans", RedisStore),
        ("redis+sentinel://one.example/titans?wait_replicas=1", RedisStore),
        ("redis+cluster://redis.example:7000", RedisStore),
    ],
)
def test_a_url_names_a_store_and_touches_nothing(
    url: str, kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert isinstance(open_store(url), kind)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "url",
    [
        "",
        "memory",
        "memory://x",
        "sqlite://",
        "sqlite://relative.db",
        "sqlite:///",
        "sqlite:///:memory:",
        "sqlite:///folder/",
        "postgres://user:secret@host/db",
        "REDIS+tls://user:secret@host",
    ],
)
def test_another_url_is_refused_with_the_known_ones_and_no_password(url: str) -> None:
    with pytest.raises(ValueError, match=r"memory://.*sqlite:///.*redis://.*rediss://") as error:
        open_store(url)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("scheme", ["redis", "rediss", "redis+sentinel", "redis+cluster"])
@pytest.mark.parametrize("password", ["secret/more", "secret#more", "secret?more", "more[secret]"])
def test_a_password_that_is_not_quoted_is_not_shown(scheme: str, password: str) -> None:
    with pytest.raises(ValueError, match="%2F") as error:
        open_store(f"{scheme}://:{password}@one.example:6379/titans")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("url", ["redis://one.example?wait_replicas=-1", "redis+cluster://one.example?wait_replicas=1"])
def test_replicas_that_cannot_be_waited_for_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="wait_replicas"):
        open_store(url)


async def test_a_relative_path_is_taken_from_where_the_process_stood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store("sqlite:///made/sessions.db")
    monkeypatch.chdir("/")
    await store.open()
    await store.close()
    assert (tmp_path / "made" / "sessions.db").is_file()


@pytest.mark.parametrize(
    "url",
    [
        "redis://one.example/prod",
        "redis://one.example/1x",
        "redis://one.example/1/2",
        "redis+sentinel://one.example:26379/titans/prod",
        "redis+cluster://one.example/prod",
        "redis://secret/more@one.example",
    ],
)
def test_a_redis_database_that_is_no_number_is_not_taken_for_the_first_one(url: str) -> None:
    with pytest.raises(ValueError, match="database") as error:
        open_store(url)
    assert "more" not in str(error.value)


@pytest.mark.parametrize("place", ["redis://one.example/0", "redis+sentinel://one.example/titans/0"])
@pytest.mark.parametrize("option", ["wait_replica=1", "ssl_ca_cert=x", "db=x"])
def test_an_option_that_a_redis_connection_does_not_have_is_refused_before_it_connects(place: str, option: str) -> None:
    with pytest.raises(ValueError, match=option.partition("=")[0]):
        open_store(f"{place}?{option}")
