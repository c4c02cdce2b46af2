"""What the tests of OpenAI's API ask with."""

import inspect
from typing import Any

import openai
from openai import AsyncOpenAI, OpenAI

STORY = "a rather long story about a lighthouse. " * 20
EOS = 2
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 20}
CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "what now"}]
MODEL = "tiny-0"


class Driver:
    """Either client: what it returns is awaited where that is needed."""

    def __init__(self, client: OpenAI | AsyncOpenAI) -> None:
        self.client: Any = client

    async def text(self, prompt: Any, **options: Any) -> Any:
        return await self.settle(self.client.completions.create(model=MODEL, prompt=prompt, **GREEDY | options))

    async def chat(self, messages: Any = CHAT, **options: Any) -> Any:
        return await self.settle(
            self.client.chat.completions.create(model=MODEL, messages=messages, **GREEDY | options)
        )

    async def respond(self, text: Any = "what now", **options: Any) -> Any:
        asked = {"model": MODEL, "input": text, "temperature": 0, "max_output_tokens": 20} | options
        return await self.settle(self.client.responses.create(**asked))

    async def converse(self, **options: Any) -> Any:
        return await self.settle(self.client.conversations.create(**options))

    async def models(self) -> Any:
        return await self.settle(self.client.models.list())

    async def model(self, name: str) -> Any:
        return await self.settle(self.client.models.retrieve(name))

    async def settle(self, result: Any) -> Any:
        """What is awaited where that is needed; of a stream, all that comes."""
        result = await result if inspect.isawaitable(result) else result
        if isinstance(result, openai.AsyncStream):
            return [chunk async for chunk in result]
        return list(result) if isinstance(result, openai.Stream) else result
