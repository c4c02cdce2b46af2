"""The kernels of matrices and of whole layers against torch: the same numbers, whatever the rows and threads."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.models import make_tiny
from support.weights import on_a_grid, weight_of
from titans.checkpoint import load
from titans.config import tiny
from titans.grid import eight_bits, four_bits
from titans.model import TitansModel
from titans.native import build
from titans.native.matrix import NativeMatrix, Team
from titans.packed import PackedLinear, is_native, pack, pack_memories
from titans.state import Stream
from torch.nn import functional as F

pytestmark = pytest.mark.skipif(build.library() is None, reason="no kernels for this machine, or no compiler")

# tokens a row, and how many of them count in each
_RUNS: list[tuple[int, list[int]]] = [
    (7, [7, 3, 0]),
    (1, [0, 1, 1]),
    (40, [40, 1, 23]),
    (16, [2, 16, 16]),
    (1, [1, 1, 1]),
]


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("num_outputs", [16, 176, 4_112])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_products_are_exact_but_for_their_own_rounding(bits: int, num_outputs: int, num_threads: int) -> None:
    weight, team = weight_of(bits, num_outputs, 96), Team(num_threads)
    matrix = NativeMatrix.pack(weight, team)
    assert matrix is not None and matrix.kind == bits
    x = torch.randn(11, 96).bfloat16()
    expected = F.linear(x.double(), weight.double())
    for rows in (1, 2, 3, 4, 7, 11):
        y = matrix(x[:rows].view(rows, 1, 96))
        assert y.shape == (rows, 1, num_outputs)
        assert (y[:, 0] - expected[:rows]).norm() < 0.0025 * expected[:rows].norm()
        alone = torch.stack([matrix(row) for row in x[:rows]])
        assert torch.equal(y[:, 0], alone), "a row's product depends on that row alone"
        wide = matrix(x[:rows].view(rows, 1, 96), torch.float32)
        assert wide.dtype == torch.float32 and torch.equal(wide.bfloat16(), y), "before it is rounded"


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_products_of_what_is_large_small_zero_or_no_number(bits: int) -> None:
    weight = weight_of(bits, 32, 96)
    matrix = NativeMatrix.pack(weight, Team(1))
    assert matrix is not None
    x = torch.randn(9, 96).bfloat16()
    x[0, 7] = 1000.0  # one input far above all others
    x[1] *= 1e30
    x[2] *= 1e-30
    x[3] = 0.0
    for row, value in ((4, math.inf), (5, -math.inf), (6, math.nan)):
        x[row, 40] = value
    x[7] = 3.0
    x[8] *= 1e-37
    y, expected = matrix(x), F.linear(x.double(), weight.double())
    for row in (0, 1, 2, 7):
        assert (y[row] - expected[row]).norm() < 0.0025 * expected[row].norm()
    assert torch.equal(y[3], torch.zeros(32).bfloat16())
    assert y[8].abs().max() < 1e-30
    assert not y[4:7].isfinite().any(), "it is not hidden"


def test_weights_off_the_grid_are_not_put_on_one() -> None:
    for bits, find in ((4, four_bits), (8, eight_bits)):
        weight = on_a_grid(bits, 64, 96)
        assert find(weight) is not None
        weight[5, 40] += 0.3 * weight[5, 32:64].abs().max() / 127
        assert find(weight) is None
        assert find(torch.randn(64, 96)) is None


@pytest.mark.parametrize("size", [1e-8, 1e-4, 1.0, 100.0, 1e8])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_grid_too_fine_or_too_coarse_for_half_precision_costs_no_precision(bits: int, size: float) -> None:
    weight, x = on_a_grid(bits, 64, 96) * size, torch.randn(3, 96).bfloat16()
    packed = PackedLinear(weight, Team(1), torch.float32)
    assert packed.native is not None and packed.native.has_codes == (1 <= size <= 100)
    expected = x.double() @ weight.double().T
    assert (packed(x) - expected).norm() < 0.004 * expected.norm()


def test_a_matrix_of_nothing_has_codes() -> None:
    packed = PackedLinear(torch.zeros(16, 32), Team(1), torch.float32)
    assert packed.native is not None and packed.native.has_codes
    assert not packed(torch.randn(2, 32).bfloat16()).any()


def aligned(**form: object) -> TitansModel:
    """`make_tiny`, its widths such as the kernels take, in bfloat16."""
    config = tiny(**form)  # type: ignore[arg-type]
    body = replace(config.backbone, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=32, intermediate_size=96)
    torch.manual_seed(0)
    model = TitansModel(replace(config, backbone=body)).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    model.bfloat16()
    for memory in model.memories:
        memory.float()
        memory.reset()
        memory.out_gate.bias.fill_(3.0)
    model.set_sinks()
    return model


def opened(model: TitansModel, num_read: int) -> Stream:
    tokens = torch.randint(3, 259, (1, num_read), generator=torch.Generator().manual_seed(num_read))
    return model.open(model.ingest(tokens, model.new_state()))


def rows_of(streams: list[Stream]) -> Stream:
    parts: list[dict[str, torch.Tensor]] = [{} for _ in streams]
    for stream, found in zip(streams, parts, strict=True):
        stream.map(found.setdefault)
    return streams[0].map(lambda name, _: torch.cat([found[name] for found in parts]))


@pytest.mark.parametrize("memory_layers", [(2,), (0,), (1, 3)])
@pytest.mark.parametrize("readout", [False, True])
@torch.inference_mode()
def test_tokens_one_by_one_are_what_torch_makes_of_them(memory_layers: tuple[int, ...], readout: bool) -> None:
    """Before a window is full, where it wraps, and long after; rows at places of their own."""
    model, exact = (aligned(memory_layers=memory_layers, readout=readout) for _ in range(2))
    pack(model, {})
    exact.float()
    assert model.walks is not None
    walks, model.walks = model.walks, None
    ours, torchs, theirs = (rows_of([opened(m, n) for n in (1, 12, 300)]) for m in (model, model, exact))
    errors = {"ours": 0.0, "torch's": 0.0}
    for step in range(20):
        tokens = torch.tensor([[step + 3], [step + 40], [step + 90]])
        model.walks = None
        h, torchs = model(tokens, torchs)
        model.walks = walks
        y, ours = model(tokens, ours)
        expected, theirs = exact(tokens, theirs)
        assert torch.equal(ours.state.position, theirs.state.position)
        for name, x in (("ours", y), ("torch's", h)):
            errors[name] += float((x - expected).norm() / expected.norm()) / 20
    assert errors["ours"] < 1.1 * errors["torch's"] < 0.03


@torch.inference_mode()
def test_runs_of_tokens_are_what_torch_makes_of_them() -> None:
    """Of any length, past a window's end and longer than one, each row with as many as it has; and so are openings."""
    model, exact = aligned(), aligned()
    pack(model, {})
    exact.float()
    walks, outcomes = model.walks, {}
    generator = torch.Generator().manual_seed(1)
    runs = [(torch.randint(3, 259, (3, n), generator=generator), lengths) for n, lengths in _RUNS]
    for name, each, theirs in (("ours", model, walks), ("torch's", model, None), ("exact", exact, None)):
        each.walks = theirs
        state = each.ingest(torch.arange(120).view(3, 40), each.new_state(3), [3, 40, 21])
        stream, said = each.open(state), []
        for tokens, lengths in runs:
            h, stream = each(tokens, stream, lengths)
            said += [row[:length].float() for row, length in zip(h, lengths, strict=True)]
        weights = [x for x_name, x in state.parts().items() if x_name.endswith("weights")]
        outcomes[name] = torch.cat(said), torch.cat(weights)
    for ours, torchs, expected in zip(*outcomes.values(), strict=True):
        assert (ours - expected).norm() < 1.1 * (torchs - expected).norm() < 0.03 * expected.norm()


@torch.inference_mode()
def test_windows_do_not_depend_on_where_a_document_is_cut() -> None:
    model = aligned()
    pack(model, {})
    tokens = torch.randint(3, 259, (1, 90), generator=torch.Generator().manual_seed(1))
    at_once, in_pieces = model.ingest(tokens, model.new_state()).parts(), model.new_state()
    for piece in tokens.split([1, 30, 4, 16, 39], dim=1):
        in_pieces = model.ingest(piece, in_pieces)
    for name, x in in_pieces.parts().items():
        if name.endswith(("keys", "values", "tail")):
            assert torch.equal(x, at_once[name]), name


@torch.inference_mode()
def test_a_row_is_as_alone_to_the_last_bit_whatever_the_threads() -> None:
    outcomes = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        model = aligned()
        pack(model, {})
        torch.set_num_threads(1)
        streams = [opened(model, n) for n in (5, 40, 17, 90, 33)]
        together, said, lengths = rows_of(streams), [], [3, 20, 1, 9, 5]
        prompts = torch.arange(100).view(5, 20)
        h, together = model(prompts, together, lengths)
        for row, length in enumerate(lengths):
            alone, streams[row] = model(prompts[row : row + 1, :length], streams[row])
            assert torch.equal(h[row, :length], alone[0])
        for step in range(6):
            tokens = torch.tensor([[step + 3 + row] for row in range(5)])
            h, together = model(tokens, together)
            for row, stream in enumerate(streams):
                alone, streams[row] = model(tokens[row : row + 1], stream)
                assert torch.equal(h[row], alone[0])
            said.append(h)
        outcomes.append(torch.stack(said))
    assert torch.equal(*outcomes)


@pytest.mark.parametrize("form", [{"architecture": "mag"}, {"architecture": "lmm", "memory_layers": (0, 1, 2, 3)}, {}])
def test_models_that_the_kernels_do_not_know_stay_with_torch(form: dict[str, object]) -> None:
    model = aligned(**form) if form else make_tiny().bfloat16()
    pack(model, {})
    assert model.walks is None


def test_where_torch_has_a_large_part_its_threads_are_left_to_it() -> None:
    model = aligned()
    assert not is_native(model)
    pack(model, {})
    assert model.walks is not None and not is_native(model), "a head whose shape the kernels cannot take"
    loaded = load(device=torch.device("cpu"), dtype=torch.bfloat16).model
    assert is_native(loaded)
    loaded.add_module("head", PackedLinear(weight_of(16, 64, 96), Team(1), torch.float32))
    assert is_native(loaded), "a head off the grid"
    loaded.memories[0].kernels = None
    assert not is_native(loaded), "a memory that the kernels do not know"


@torch.inference_mode()
def test_the_shipped_model_says_what_it_said() -> None:
    loaded = load(device=torch.device("cpu"), dtype=torch.bfloat16)
    model, text = loaded.model, (Path(__file__).parents[2] / "examples" / "sherlock-holmes.txt").read_text()
    kinds = [x.native.kind for x in model.modules() if isinstance(x, PackedLinear) and x.native]
    assert sorted(kinds) == [4] * 120 + [8, 16], "the layers, the head (an eight-bit embedding), the readout"
    tokens = torch.tensor([loaded.tokenizer.encode(text[:3000])[:340]])
    state = model.ingest(tokens[:, :300], model.new_state())
    assert model.walks is not None and is_native(model)
    walks, (ours, torchs) = model.walks, (model.open(state) for _ in range(2))
    divergence = 0.0
    for token in tokens[:, 300:].unbind(1):
        model.walks = walks
        h, ours = model(token[:, None], ours)
        model.walks = None
        y, torchs = model(token[:, None], torchs)
        p, q = (model.logits(x).log_softmax(-1) for x in (y, h))
        divergence += float((p.exp() * (p - q)).sum()) / 40
    assert divergence < 0.003


def test_without_kernels_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titans.packed.library", lambda: None)
    model = aligned()
    pack(model, {})
    layers = [x for x in model.modules() if isinstance(x, PackedLinear)]
    assert layers and not any(x.native for x in layers)
    assert model.walks is None


def test_memories_alone_are_left_to_kernels_where_the_layers_are_to_learn() -> None:
    ours, theirs = aligned(), aligned()
    pack_memories(ours)
    assert all(memory.kernels is not None for memory in ours.memories)
    assert ours.walks is None
    assert [*ours.state_dict()] == [*theirs.state_dict()]
    tokens = torch.arange(40)[None]
    logits, expected = (m.logits(m(tokens, m.open(m.ingest(tokens, m.new_state())))[0]) for m in (ours, theirs))
    assert (logits - expected).norm() < 0.02 * expected.norm()
