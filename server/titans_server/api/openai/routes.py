"""OpenAI's endpoints. docs/api.md says the same to a user, and a test compares the two."""

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from titans_server.api.deps import Context, Reply, Service
from titans_server.api.handlers import answer, invalid_request, unreadable
from titans_server.api.openai.answers import check_model, respond
from titans_server.api.openai.convert import ChatForm, Json, TextForm, model_object
from titans_server.api.openai.schemas import CreateChatCompletion, CreateCompletion
from titans_server.errors import InvalidRequest


class OpenAIRoute(APIRoute):
    """What makes no sense is answered 400, as by OpenAI, where the other endpoints say 422."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Answer as FastAPI wants it."""
        handle = super().get_route_handler()

        async def handle_as_openai(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                return answer(invalid_request(error), 400)
            except InvalidRequest as error:
                return answer(error, 400)
            except HTTPException as error:
                if (refused := unreadable(error)) is not None:
                    return answer(refused, 400)
                raise

        return handle_as_openai


router = APIRouter(route_class=OpenAIRoute)
SessionHeader = Annotated[str | None, Header(alias="X-Session-ID")]


@router.get("/v1/models")
async def list_models(service: Service) -> Json:
    """List the model that is served."""
    return {"object": "list", "data": [model_object(service.model)]}


@router.get("/v1/models/{model}")
async def get_model(model: str, service: Service) -> Json:
    """Show the model that is served."""
    check_model(service, model)
    return model_object(service.model)


@router.post("/v1/completions", response_model=None)
async def create_completion(
    body: CreateCompletion, reply: Reply, context: Context, session: SessionHeader = None
) -> Any:
    """Continue a text, or several."""
    return await respond(TextForm, body, reply, context, session)


@router.post("/v1/chat/completions", response_model=None)
async def create_chat_completion(
    body: CreateChatCompletion, reply: Reply, context: Context, session: SessionHeader = None
) -> Any:
    """Answer a conversation."""
    return await respond(ChatForm, body, reply, context, session)
