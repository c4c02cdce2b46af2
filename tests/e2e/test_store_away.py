"""What an operator sees of a server whose store is away."""

import asyncio
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from support.keys import new_key, put
from support.models import TinyCheckpoint
from support.redis_server import RedisServer
from support.servers import ServerProcess


@pytest.mark.parametrize("is_hung", [False, True])
def test_who_saw_the_metrics_still_does_while_the_store_is_away(
    checkpoint: TinyCheckpoint, tmp_path: Path, start_redis: Callable[[], RedisServer], is_hung: bool
) -> None:
    redis = start_redis()
    (_, scraper), (_, stranger), (revoked, former) = (new_key(redis.url) for _ in range(3))
    with ServerProcess(redis.url, tmp_path / "log", checkpoint.environment) as server:

        def looks(header: dict[str, str], path: str = "/metrics") -> httpx.Response:
            return server.http.get(path, headers=header)

        assert [looks(header).status_code for header in (scraper, former)] == [200, 200]
        asyncio.run(put(redis.url, replace(revoked, revoked_at=time.time())))
        time.sleep(1.1)
        assert looks(former).status_code == 401
        time.sleep(1.1)
        if is_hung:
            os.kill(redis.pid, signal.SIGSTOP)
        else:
            redis.kill()
        assert looks({}, "/health/ready").status_code == 503
        counted = looks(scraper)
        assert counted.status_code == 200 and counted.elapsed.total_seconds() < 5
        assert 'titans_errors_total{code="store_unavailable"} 1.0' in counted.text
        if not is_hung:  # where the others would wait for long
            assert looks(scraper, "/v1/models").json()["error"]["code"] == "store_unavailable"
            assert [looks(header).status_code for header in (stranger, former, {})] == [503, 503, 503]
