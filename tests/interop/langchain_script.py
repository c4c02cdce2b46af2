"""LangChain's ChatOpenAI in every way that it asks: run by test_interop.py in an environment of its own."""

import asyncio
import json
import os

from langchain_openai import ChatOpenAI


async def ask() -> dict[str, object]:
    """The same greedy answer, however it is asked for."""
    address = f"{os.environ['TITANS_BASE_URL']}/v1"
    chat, responses = (
        ChatOpenAI(
            base_url=address,
            api_key="none",
            model="tiny-0",
            temperature=0,
            max_tokens=8,
            max_retries=0,
            use_responses_api=use_responses_api,
        )
        for use_responses_api in (False, True)
    )
    return {
        "whole": chat.invoke("what now").content,
        "streamed": "".join(chunk.content for chunk in chat.stream("what now")),
        "async": "".join([chunk.content async for chunk in chat.astream("what now")]),
        "batch": chat.batch(["what now", "what now"])[1].content,
        "responses": responses.invoke("what now").text,
        "responses streamed": "".join(chunk.text for chunk in responses.stream("what now")),
        "tokens": chat.invoke("what now").usage_metadata["output_tokens"],
    }


print(json.dumps(asyncio.run(ask())))
