"""Each architecture beside its equations: the model in float32, the naive reference in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.reference_model import read_document
from titans.config import Architecture, tiny
from titans.model import TitansModel
from torch import Tensor

DEEP = {"rule": "chunk", "depth": 2, "expansion": 2, "momentum": True, "output_norm": True}
FORMS: dict[str, dict[str, Any]] = {
    "linear": {},
    "products": {"products": 3, "conv_width": 6, "gate_width": 4, "momentum": True},
    "protecting": {"products": 3, "conv_width": 6, "protected_keys": 5},
    "deep": DEEP,
    "camera-ready": DEEP | {"expansion": 4, "residual": True},
}
ARCHITECTURES: tuple[Architecture, ...] = ("mac", "mag", "mal", "lmm")
LENGTHS = (1, 37, 50)  # windows of 16, chunks of 8: no document ends where one of them does
TOLERANCE = 2e-4  # the model computes in float32; logits have a standard deviation of 7 and were within 6e-5


def make_model(architecture: Architecture, layers: tuple[int, ...], num_persistent: int, **form: Any) -> TitansModel:
    """A tiny one in which no weight is where it starts, so that none can be left out unseen."""
    torch.manual_seed(0)
    config = replace(tiny(architecture, layers, **form), num_persistent=num_persistent)
    model = TitansModel(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    for memory in model.memories:
        memory.gates.bias.normal_(mean=-2.0)  # forgetting: 0.12 a token, where it starts with 0.0001
        memory.out_gate.bias.normal_()
    return model


def read(model: TitansModel, tokens_T: Tensor) -> Tensor:
    """The same as the model reads it: logits [T, N]."""
    h_BTD, _ = model(tokens_T[None], model.open(model.new_state(), write=True))
    return model.logits(h_BTD)[0].double()


@pytest.fixture
def tokens_T() -> Tensor:
    return torch.randint(259, (max(LENGTHS),), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("layers", "num_persistent"), [((0, 2), 3), ((3,), 1)])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_document_is_read_as_the_equations_say_but_for_float32(
    architecture: Architecture, form: dict[str, Any], layers: tuple[int, ...], num_persistent: int, tokens_T: Tensor
) -> None:
    model = make_model(architecture, layers, num_persistent, **form)
    check(model, tokens_T)


@pytest.mark.parametrize("layers", [(0, 2), (3,)])
def test_a_readout_is_added_to_what_the_head_is_given(layers: tuple[int, ...], tokens_T: Tensor) -> None:
    check(make_model("mal", layers, 1, readout=True), tokens_T)


def check(model: TitansModel, tokens_T: Tensor) -> None:
    expected = read_document(model, tokens_T)
    for length in LENGTHS:
        for grad in (False, True):  # attention in one pass, and as it is written
            with torch.set_grad_enabled(grad):
                logits = read(model, tokens_T[:length])
            torch.testing.assert_close(logits, expected[:length], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("architecture", "readout"), [("mal", True), *((name, False) for name in ARCHITECTURES)])
@torch.no_grad()
def test_no_weight_could_be_left_out_unseen(architecture: Architecture, readout: bool, tokens_T: Tensor) -> None:
    model, tokens_T = make_model(architecture, (0, 2), 3, readout=readout, **DEEP), tokens_T[:21]
    expected = read_document(model, tokens_T)
    for name, parameter in model.named_parameters():
        weight = parameter.clone()
        parameter.zero_()
        assert (read(model, tokens_T) - expected).abs().max() > 100 * TOLERANCE, name
        parameter.copy_(weight)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_equations_too_hear_a_memory_fall_silent(architecture: Architecture, tokens_T: Tensor) -> None:
    model = make_model(architecture, (0, 2), 3, **DEEP)
    before = read_document(model, tokens_T)
    model.memories[-1].out.weight.zero_()
    after = read_document(model, tokens_T)
    assert (after - before).abs().max() > 100 * TOLERANCE
    torch.testing.assert_close(read(model, tokens_T), after, rtol=0, atol=TOLERANCE)
