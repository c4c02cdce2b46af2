"""The examples of OpenAI's API that the documentation has."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from support.servers import LiveServer

API = Path(__file__).parents[3] / "docs/api.md"
ADDRESS = "http://127.0.0.1:8000"


@pytest.mark.parametrize("heading", ["## OpenAI's API", "### Responses and conversations"])
def test_the_example_of_the_documentation_runs(
    heading: str, server: LiveServer, capsys: pytest.CaptureFixture[str]
) -> None:
    section = API.read_text(encoding="utf-8").partition(f"\n{heading}\n")[2].partition("\n##")[0]
    (example,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert ADDRESS in example
    run: Callable[..., None] = exec
    run(example.replace(ADDRESS, server.url), {})
    assert capsys.readouterr().out.strip()
