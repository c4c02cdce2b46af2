"""What the proofs share."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from support.launcher import Launcher
from support.life import Outcome
from support.models import TinyCheckpoint, write_tiny_checkpoint
from support.servers import ServerProcess
from support.sweep import Sweep
from support.table import Table
from support.world import StoreKind, World

TABLE = pytest.StashKey[Table]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLE] = Table()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if lines := config.stash[TABLE].lines():
        terminalreporter.section("what was done to it, and what came of it")
        terminalreporter.write_line("\n".join(lines))


@pytest.fixture(scope="session")
def table(request: pytest.FixtureRequest) -> Table:
    return request.config.stash[TABLE]


@pytest.fixture(scope="session")
def sweep(table: Table, uninterrupted: list[Outcome]) -> Sweep:
    return Sweep(uninterrupted, table)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def environment(checkpoint: TinyCheckpoint) -> dict[str, str]:
    return checkpoint.environment | {"TITANS_RESIDENT_BYTES": "0"}  # the session used last stays in memory, no other


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    launcher = Launcher()
    yield launcher
    launcher.close()


@pytest.fixture(scope="session")
def make_world(
    launcher: Launcher, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[StoreKind], World]]:
    """The world of each kind of store, made when it is first asked for."""
    with ExitStack() as stack:
        worlds: dict[StoreKind, World] = {}

        def make(kind: StoreKind) -> World:
            if kind not in worlds:
                folder = tmp_path_factory.mktemp(kind)
                worlds[kind] = stack.enter_context(World(kind, folder, environment, launcher))
            worlds[kind].recover()
            return worlds[kind]

        yield make


@pytest.fixture
def sqlite(make_world: Callable[[StoreKind], World]) -> World:
    """A server on SQLite, running; a test may kill it."""
    return make_world("sqlite")


@pytest.fixture
def redis(make_world: Callable[[StoreKind], World]) -> World:
    """A server on Redis, both running; a test may kill either."""
    return make_world("redis")


@pytest.fixture
def world(request: pytest.FixtureRequest, make_world: Callable[[StoreKind], World]) -> World:
    """Either of them, by the parameter."""
    return make_world(request.param)


@pytest.fixture
def twin(world: World) -> Iterator[ServerProcess]:
    """A second server on the world's store."""
    with world.new_server() as twin:
        yield twin


@pytest.fixture(scope="session")
def uninterrupted(make_world: Callable[[StoreKind], World]) -> list[Outcome]:
    """How a life goes to which nothing happens."""
    world = make_world("sqlite")
    return world.new_life().run()


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TITANS_BASE_URL", raising=False)
    monkeypatch.delenv("TITANS_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
