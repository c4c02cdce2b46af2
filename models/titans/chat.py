"""Conversations as text: a body's own chat template, in Jinja2 as Hugging Face means it."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NoReturn

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment


class ChatError(ValueError):
    """A conversation that cannot be put into the body's form: it has none, or the template refuses the messages."""


def render(template: str, messages: Sequence[Mapping[str, str]], names: Mapping[str, str]) -> str:
    """The text of a conversation, up to where the assistant speaks next. `names` are the template's other variables.

    A template comes with a body and may be anybody's: it runs in a sandbox. Raises ChatError, whatever goes wrong.
    """
    try:
        return _compiled(template).render(messages=list(messages), add_generation_prompt=True, **names)
    except Exception as error:  # what it does to a value may raise anything
        said = str(error) or type(error).__name__
        raise ChatError(f"the model's chat template does not take these messages: {said}") from error


@lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(template)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
