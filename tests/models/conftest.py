import pytest
from support.models import make_tiny
from titans.backbone import Backbone, find_default_body, load_backbone
from titans.model import TitansModel
from titans.tokenizer import Tokenizer

DEEP = {"rule": "chunk", "depth": 2, "expansion": 2, "momentum": True}
FORMS: dict[str, dict[str, object]] = {
    "linear": {},
    "momentum": {"momentum": True},
    "products": {"products": 2, "conv_width": 7, "gate_width": 3, "momentum": True},
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
