"""The documentation names what there is: settings, endpoints, fields, error codes, events, files."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic.fields import FieldInfo
from titans_client._errors import BY_CODE
from titans_client._settings import DEFAULT_BASE_URL
from titans_server import errors
from titans_server.api.openai.responses.schemas import CreateResponse
from titans_server.api.openai.schemas import CreateChatCompletion
from titans_server.api.openai.schemas import CreateCompletion as CreateCompletionOfOpenAI
from titans_server.api.schemas import CreateCompletion
from titans_server.app import create_app
from titans_server.errors import TitansError
from titans_server.settings import Settings
from titans_server.telemetry.metrics import Metrics, Residents

ROOT = Path(__file__).parents[1]
API = (ROOT / "docs/api.md").read_text(encoding="utf-8")
OPERATIONS = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").glob("*.md"))]


class Idle:
    """A server with nothing to do, for the metrics to look at."""

    num_running = num_waiting = num_ingesting = 0

    def residents(self) -> list[Residents]:
        return []


def section(text: str, title: str) -> str:
    """What stands under a heading of the second level."""
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """The rows of its tables, without their heads."""
    found = [re.split(r"\s+\|\s+", line.strip("| ")) for line in text.splitlines() if line.startswith("| ")]
    return [row for row in found if "`" in row[0] or "`" in row[1]]


def trees(package: str) -> Iterator[ast.AST]:
    for path in sorted((ROOT / package).rglob("*.py")):
        yield ast.parse(path.read_text(encoding="utf-8"))


def calls(package: str) -> Iterator[ast.Call]:
    for tree in trees(package):
        yield from (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def keyword(call: ast.Call, name: str) -> str | None:
    """A call's keyword argument, where it is a string that is written there."""
    for argument in call.keywords:
        if argument.arg == name and isinstance(argument.value, ast.Constant) and isinstance(argument.value.value, str):
            return argument.value.value
    return None


def error_codes() -> dict[str, int]:
    """Every code that the server sends, and its status."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, TitansError)]
    codes = {kind.default_code: kind.status for kind in kinds}
    by_name = {kind.__name__: kind for kind in kinds}
    for call in calls("server"):
        code, callee = keyword(call, "code"), call.func
        if code is not None and isinstance(callee, ast.Name) and callee.id in by_name:
            codes[code] = by_name[callee.id].status
    return codes


def documented_codes() -> dict[str, int]:
    return {
        code: int(status) for status, names, _ in rows(section(API, "Errors")) for code in re.findall(r"`(\w+)`", names)
    }


def default_of(value: object) -> str:
    return "unset" if value in (None, "") else f"`{value}`"


def test_every_setting_is_documented_with_its_default() -> None:
    text = section((ROOT / "docs/settings.md").read_text(encoding="utf-8"), "Server")
    expected = {
        f"`TITANS_{name.upper()}`": default_of(field.get_default()) for name, field in Settings.model_fields.items()
    }
    assert {name: default for name, default, _ in rows(text)} == expected
    assert all(meaning for _, _, meaning in rows(text))


def test_every_setting_of_the_client_is_documented_with_its_default() -> None:
    text = section((ROOT / "docs/settings.md").read_text(encoding="utf-8"), "Client")
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "clients").rglob("*.py"))
    read = {f"`{name}`" for name in re.findall(r"environ\S*?[\"'](TITANS_\w+)", source)}
    documented = {name: default for name, default, _ in rows(text)}
    assert documented.keys() == read
    assert documented == {"`TITANS_BASE_URL`": f"`{DEFAULT_BASE_URL}`", "`TITANS_API_KEY`": "unset"}


def test_every_endpoint_is_documented() -> None:
    routes = {
        f"{method.upper()} {path.replace('{session_id}', '{id}').replace('{ingestion_id}', '{id}')}"
        for path, methods in create_app(Settings()).openapi()["paths"].items()
        for method in methods
    }
    assert set(re.findall(r"`((?:GET|HEAD|POST|PUT|PATCH|DELETE) /[^\s`?]*)[^`]*`", API)) == routes


def test_every_field_of_a_completion_is_documented_with_its_default() -> None:
    documented = {name.strip("`"): default for name, default, *_ in rows(section(API, "Completions"))}
    assert documented.keys() == CreateCompletion.model_fields.keys()
    for name, field in CreateCompletion.model_fields.items():
        default = "none" if field.default is None else str(field.default)
        expected = "required" if field.is_required() else default.lower()
        assert documented[name].strip('`"') == expected, name


def test_every_field_of_openais_api_is_documented_with_its_default() -> None:
    completions, _, responses = section(API, "OpenAI's API").partition("\n### Responses")
    assert_documented(completions, CreateChatCompletion.model_fields | CreateCompletionOfOpenAI.model_fields)
    (shared,) = re.findall(r"^((?:`\w+`(?:, | and\s|,\s|\s))+)are as above", responses, re.MULTILINE)
    as_above = set(re.findall(r"\w+", shared)) - {"and"}
    own = {name: field for name, field in CreateResponse.model_fields.items() if name not in as_above}
    assert as_above <= CreateResponse.model_fields.keys() & CreateChatCompletion.model_fields.keys()
    assert_documented(responses, own)


def assert_documented(text: str, fields: dict[str, FieldInfo]) -> None:
    documented = {name.strip("`"): default for name, default, *_ in rows(text)}
    assert documented.keys() == fields.keys()
    for name, field in fields.items():
        default = str(field.default).lower() if field.default or field.default in (0, False) else "none"
        assert documented[name].strip('`"') == ("required" if field.is_required() else default), name


def test_every_error_code_is_documented_with_its_status() -> None:
    assert documented_codes() == error_codes()


def test_the_client_knows_every_error_code() -> None:
    assert {code: status for code, (status, _) in BY_CODE.items()} == documented_codes()


def test_every_event_of_a_stream_is_documented() -> None:
    sent = {name for call in calls("server/titans_server/api") if (name := keyword(call, "name")) is not None}
    for tree in trees("server/titans_server/api"):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name == "_name":
                returned = [x.value for x in ast.walk(node) if isinstance(x, ast.Return)]
                sent |= {str(x.value) for x in returned if isinstance(x, ast.Constant) and x.value is not None}
    assert sent, "the events' names are found"
    assert set(re.findall(r"^event: (\w+)$", API, re.MULTILINE)) | set(re.findall(r"event `(\w+)`", API)) == sent


def test_every_metric_is_documented_with_its_kind() -> None:
    metrics = Metrics()
    metrics.serve(Idle(), model_name="", fingerprint="", device="")
    kinds = {
        metric.name + ("_total" if metric.type == "counter" else ""): metric.type
        for metric in metrics.registry.collect()
    }
    documented = {name.strip("`"): kind for name, kind, _ in rows(section(OPERATIONS, "Metrics"))}
    assert documented == kinds


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_that_are_there(page: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(\s*<?([^)\s>]+)", prose) + re.findall(r"^\[[^\]]+\]:\s*(\S+)", prose, re.MULTILINE)
    links += re.findall(r"(?:src|href|srcset)=\"([^\"]+)\"", prose)
    relative = [link.partition("#")[0] for link in links if not re.match(r"[a-z+]+:", link)]
    assert [link for link in relative if link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("number", [0, 1])
def test_the_examples_of_the_models_run(number: int) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/models.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    exec(blocks[number], {})
