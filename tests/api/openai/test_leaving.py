"""Answers by OpenAI's API that nobody waits for are stopped, and others come in their place."""

import asyncio
import re
import socket
import time
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from support.openai_client import CHAT, EOS, MODEL
from support.servers import LiveServer


def endless(n: int) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "a", "max_tokens": 4_096, "n": n, "logit_bias": {str(EOS): -100}}


def wait_until_there_is_room(client: OpenAI) -> None:
    deadline = time.monotonic() + 5
    while True:
        try:
            client.completions.create(model=MODEL, prompt="a", max_tokens=1)
            return
        except openai.InternalServerError as error:
            assert error.status_code == 503
            assert error.response.headers["retry-after"] == "1"
            assert time.monotonic() < deadline, "the answers that nobody reads go on"
            time.sleep(0.05)


def test_an_answer_that_nobody_reads_is_stopped(client: OpenAI) -> None:
    with client.completions.create(**endless(8), stream=True) as stream:
        next(iter(stream))
        with pytest.raises(openai.InternalServerError):
            client.completions.create(model=MODEL, prompt="a")
    wait_until_there_is_room(client)


async def test_an_answer_that_nobody_waits_for_is_stopped(server: LiveServer, client: OpenAI) -> None:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as waiting:
        with pytest.raises(openai.APITimeoutError):
            await waiting.completions.create(**endless(8), timeout=0.5)
    await asyncio.to_thread(wait_until_there_is_room, client)


def num_counted(http: httpx.Client, status: int) -> float:
    """Conversations that were answered so."""
    counted = f'http_requests_total{{method="POST",route="/v1/chat/completions",status="{status}"}} (.*)'
    return sum(map(float, re.findall(counted, http.get("/metrics").text)))


def wait_until_counted_as_gone(http: httpx.Client, before: float) -> None:
    deadline = time.monotonic() + 30
    while num_counted(http, 499) == before:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_client_that_leaves_before_its_answer_is_counted_as_gone(server: LiveServer, http: httpx.Client) -> None:
    before = {status: num_counted(http, status) for status in (200, 499)}
    body = {"model": MODEL, "messages": CHAT, "max_tokens": 4_096, "logit_bias": {str(EOS): -100}}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=0.3)
    wait_until_counted_as_gone(http, before[499])
    assert num_counted(http, 200) == before[200]


def test_a_client_that_leaves_amid_its_request_is_counted_as_gone(server: LiveServer, http: httpx.Client) -> None:
    before = {status: num_counted(http, status) for status in (400, 499)}
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: 99"
        )
        raw.sendall(f'{head}\r\n\r\n{{"model":'.encode())
        time.sleep(0.2)
    wait_until_counted_as_gone(http, before[499])
    assert num_counted(http, 400) == before[400]


def test_more_answers_than_there_is_room_for_fail_as_one(client: OpenAI) -> None:
    for asked in (endless(6), endless(6) | {"stream": True}):
        with client.completions.create(**endless(5), stream=True) as others:
            next(iter(others))
            with pytest.raises(openai.InternalServerError) as refused:
                client.completions.create(**asked)
            assert refused.value.code == "overloaded"
        wait_until_there_is_room(client)
