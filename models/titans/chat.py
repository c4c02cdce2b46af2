"""Conversations as text: a body's own chat template, in Jinja2 as Hugging Face means it."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_NEITHER = {"tools": None, "documents": None}  # templates ask whether they are none, not whether they are there


class ChatError(ValueError):
    """A conversation that cannot be put into the body's form: it has none, or the template refuses the messages."""


def render(template: str, messages: Sequence[Mapping[str, str]], names: Mapping[str, str]) -> str:
    """The text of a conversation, up to where the assistant speaks next. `names` are the template's other variables.

    A template comes with a body and may be anybody's: it runs in a sandbox. Raises ChatError, whatever goes wrong.
    """
    try:
        return _compiled(template).render(messages=list(messages), add_generation_prompt=True, **_NEITHER, **names)
    except Exception as error:  # what it does to a value may raise anything
        said = str(error) or type(error).__name__
        raise ChatError(f"the model's chat template does not take these messages: {said}") from error


@lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    extensions = [_Generation, loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.filters["tojson"] = _to_json
    return environment.from_string(template)


class _Generation(Extension):
    """A mark around what the assistant says, which is for those who train: what is in it is as it would be without."""

    tags = {"generation"}  # noqa: RUF012 — as its base declares it

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)


def _to_json(x: object, **form: Any) -> str:
    """Jinja's own is for web pages: it writes "<" otherwise."""
    return json.dumps(x, **{"ensure_ascii": False, **form})
