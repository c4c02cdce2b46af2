import pytest
from support.models import make_tiny
from titans.backbone import Backbone, find_default_body, load_backbone
from titans.model import TitansModel
from titans.tokenizer import Tokenizer


@pytest.fixture
def model() -> TitansModel:
    return make_tiny()


@pytest.fixture(scope="session")
def body() -> Backbone:
    """The real body, SmolLM2-135M-Instruct."""
    return load_backbone(find_default_body())


@pytest.fixture(scope="session")
def tokenizer(body: Backbone) -> Tokenizer:
    """The real body's."""
    return body.tokenizer
