"""The client is light: the base install carries it, and torch never slows it down."""

import ast
import subprocess
import sys
from pathlib import Path

import titans_client

PACKAGE = Path(titans_client.__file__).parent
ALLOWED = {"httpx", "httpx_sse", "pydantic", "tqdm", "titans_client"}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").partition(".")[0])
    return names


def test_only_the_base_installs_packages_are_imported() -> None:
    names = set().union(*(imported(path) for path in PACKAGE.rglob("*.py")))
    assert names - set(sys.stdlib_module_names) <= ALLOWED


def test_the_command_line_loads_nothing_heavy() -> None:
    program = "import sys, titans_client.cli; print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert {"torch", "numpy", "fastapi", "titans", "titans_server"}.isdisjoint(output.split())


def test_it_says_that_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").exists()
