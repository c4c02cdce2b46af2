"""OpenAI's own client, sync and async, beside a session that has read a story."""

import inspect
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
from openai import AsyncOpenAI, OpenAI
from support.openai_client import STORY, Driver
from support.servers import LiveServer
from titans_server.settings import Settings


@pytest.fixture(scope="module")
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"max_prompt_tokens": 1_000, "max_requests": 8, "max_completion_tokens": 4_096})


@pytest.fixture(params=[OpenAI, AsyncOpenAI])
async def ai(request: pytest.FixtureRequest, server: LiveServer) -> AsyncIterator[Driver]:
    client = request.param(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)
    yield Driver(client)
    closed = client.close()
    if inspect.isawaitable(closed):
        await closed


@pytest.fixture
def client(server: LiveServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def told(http: httpx.Client, session: str) -> str:
    """A session that has read the story."""
    headers = {"Content-Type": "text/plain"}
    assert http.post(f"/v1/sessions/{session}/documents", content=STORY, headers=headers).status_code == 200
    return session
