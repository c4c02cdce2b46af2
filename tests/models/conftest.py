import pytest
from support.models import make_tiny
from titans.backbone import Backbone, find_default_body, load_backbone
from titans.model import TitansModel
from titans.tokenizer import Tokenizer

FORMS: dict[str, dict[str, object]] = {
    "linear": {},
    "momentum": {"momentum": True},
    "deep": {"rule": "chunk", "depth": 2, "expansion": 2, "momentum": True},
}


@pytest.fixture(params=list(FORMS.values()), ids=list(FORMS))
def model(request: pytest.FixtureRequest) -> TitansModel:
    """A tiny one, with each kind of memory."""
    return make_tiny(**request.param)


@pytest.fixture(scope="session")
def body() -> Backbone:
    """The real body, SmolLM2-135M-Instruct."""
    return load_backbone(find_default_body())


@pytest.fixture(scope="session")
def tokenizer(body: Backbone) -> Tokenizer:
    """The real body's."""
    return body.tokenizer
