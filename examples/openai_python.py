"""A conversation that remembers, with OpenAI's own package. TITANS_BASE_URL says where the server is."""

import os

from openai import OpenAI


def main() -> None:
    """Say something, ask for it in another turn, and send nothing twice."""
    url = os.environ.get("TITANS_BASE_URL", "http://127.0.0.1:8000")
    with OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("TITANS_API_KEY", "none")) as ai:
        model = ai.models.list().data[0].id
        conversation = ai.conversations.create()
        told = "The access code of the mossy lighthouse is 4819203."
        ai.conversations.items.create(conversation.id, items=[{"type": "message", "role": "user", "content": told}])
        stream = ai.responses.create(
            model=model,
            conversation=conversation.id,
            input="What is the access code of the mossy lighthouse?",
            max_output_tokens=40,
            temperature=0,
            stream=True,
        )
        for event in stream:
            if event.type == "response.output_text.delta":
                print(event.delta, end="", flush=True)
        print()
        ai.conversations.delete(conversation.id)


if __name__ == "__main__":
    main()
