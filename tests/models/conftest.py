import pytest
from support.models import TinyCheckpoint, make_tiny, write_tiny_checkpoint
from support.training import CONFIG, TEXT, WINDOW, load_tiny
from titans.backbone import Backbone, find_default_body, load_backbone
from titans.evaluation.haystack import Haystack
from titans.evaluation.suite import make_tasks
from titans.evaluation.task import Task
from titans.model import TitansModel
from titans.tokenizer import Tokenizer
from titans.training.pool import Pool, load_pool, save_pool
from titans.training.states import cache_states

DEEP = {"rule": "chunk", "depth": 2, "expansion": 2, "momentum": True}
FORMS: dict[str, dict[str, object]] = {
    "linear": {},
    "momentum": {"momentum": True},
    "products": {"products": 2, "conv_width": 7, "gate_width": 3, "momentum": True},
    "protecting": {"products": 2, "protected_keys": 5, "write_threshold": 0.4},
    "deep": DEEP,
    "readout": {"readout": True},
    "two memories, readout": {"memory_layers": (1, 3), "readout": True, **DEEP},
    "lmm": {"architecture": "lmm", "memory_layers": (0, 1, 2, 3), **DEEP},
    "lmm, linear, in the middle": {"architecture": "lmm", "memory_layers": (1,)},
    "mag": {"architecture": "mag", "memory_layers": (0, 2), **DEEP},
    "mac": {"architecture": "mac", "memory_layers": (0, 1, 2, 3), **DEEP},
    "mac, linear": {"architecture": "mac", "memory_layers": (1, 2)},
}


@pytest.fixture(params=list(FORMS.values()), ids=list(FORMS))
def model(request: pytest.FixtureRequest) -> TitansModel:
    """A tiny one, of each architecture, with each kind of memory."""
    return make_tiny(**request.param)


@pytest.fixture(scope="session")
def body() -> Backbone:
    """The real body, SmolLM2-135M-Instruct."""
    return load_backbone(find_default_body())


@pytest.fixture(scope="session")
def tokenizer(body: Backbone) -> Tokenizer:
    """The real body's."""
    return body.tokenizer


@pytest.fixture(scope="session")
def book(tokenizer: Tokenizer) -> Haystack:
    """What the documents of the tasks are cut from."""
    return Haystack(TEXT.read_text(encoding="utf-8"), lambda text: len(tokenizer.encode(text)))


@pytest.fixture(scope="session")
def tasks(book: Haystack) -> dict[str, Task]:
    """All tasks by name, on that book."""
    return make_tasks(book)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    """One to train, whose window has room for a question and its answer."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), window=WINDOW)


@pytest.fixture(scope="session")
def pool(tiny: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    """What it is trained on."""
    path = tmp_path_factory.mktemp("pool") / "pool.pt"
    save_pool(cache_states(load_tiny(tiny), load_backbone(tiny.body).tokenizer, [TEXT, TEXT], CONFIG), path)
    return load_pool(path)
