"""The project's own kernels against torch: the same numbers, however many rows and threads there are."""

import math
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.models import make_tiny
from support.weights import on_a_grid, weight_of
from titans.checkpoint import load
from titans.config import tiny
from titans.grid import eight_bits, four_bits
from titans.memory.neural import MemoryState, NeuralMemory
from titans.memory.reference import absorb_tokens
from titans.model import TitansModel
from titans.native import build
from titans.native.matrix import NativeMatrix, Team
from titans.native.memory import NativeMemory
from titans.packed import PackedLinear, pack
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


def test_kept_kernels_that_cannot_be_loaded_are_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    kept = tmp_path / ".cache" / "titans" / build._name()
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"of another machine")
    assert build._kept().titans_layers
    assert "compiling the kernels again" in caplog.text
    assert build._kept().titans_layers
    assert caplog.text.count("compiling the kernels again") == 1


def test_where_a_home_runs_nothing_kernels_are_not_compiled_at_each_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str) -> None:
        raise OSError(f"{path}: failed to map segment from shared object")

    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr("ctypes.CDLL", refuse)
    monkeypatch.setattr(build, "compile_into", lambda _: pytest.fail("compiled again"))
    kept = tmp_path / ".cache" / "titans" / build._name()
    kept.parent.mkdir(parents=True)
    kept.touch()
    with pytest.raises(OSError, match="map segment"):
        build._kept()


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
@torch.inference_mode()
def test_tokens_one_by_one_are_what_torch_makes_of_them(memory_layers: tuple[int, ...]) -> None:
    """Before a window is full, where it wraps, and long after; rows at places of their own."""
    model, exact = (aligned(memory_layers=memory_layers) for _ in range(2))
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


_MEMORIES: list[dict[str, Any]] = [
    {},
    {"conv_width": 12, "gate_width": 12, "products": 4, "value_dim": 112, "momentum": True},
    {"conv_width": 1, "products": 1, "num_heads": 1, "value_dim": 32, "forgetting": False},
    {"num_heads": 3, "key_dim": 48, "value_dim": 224, "products": 2, "gate_width": 2, "momentum": True},
    {"gate_width": 2, "momentum": True, "write_threshold": 0.35},
    {"write_threshold": 0.25},
]


class Memories(NamedTuple):
    """One memory three times, and three sessions that it has."""

    native: NativeMemory
    torchs: NeuralMemory
    exact: NeuralMemory  # float32
    state: MemoryState

    @classmethod
    def make(cls, form: dict[str, Any], seed: int) -> "Memories":
        torch.manual_seed(seed)
        config = replace(tiny().memory, **form)
        torchs, exact = (NeuralMemory(config, 64).requires_grad_(False) for _ in range(2))
        for parameter in torchs.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        for linear in (torchs.query, torchs.key, torchs.value, torchs.out_gate, torchs.out):
            linear.weight.copy_(linear.weight.bfloat16())
        exact.load_state_dict(torchs.state_dict())
        assert NativeMemory.knows(torchs)
        torchs.cast_projections(torch.bfloat16)
        weights, momentum = torch.randn(2, 5, config.num_heads, config.num_weights)[:, ::2]  # rows that stand apart
        recent = torch.randn(3, config.num_recent, 64).bfloat16()
        state = MemoryState(torch.arange(3), weights, momentum if config.momentum else momentum[:, :0], recent)
        return cls(NativeMemory(torchs, Team(2)), torchs, exact, state)

    def row(self, b: int) -> MemoryState:
        return MemoryState(*(x[b : b + 1] for x in self.state))


def distance(x: torch.Tensor, expected: torch.Tensor) -> float:
    return float((x.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("form", _MEMORIES)
@pytest.mark.parametrize("num_tokens", [1, 3, 4, 9])
@torch.inference_mode()
def test_a_memory_answers_what_torch_does(form: dict[str, Any], num_tokens: int) -> None:
    memories = Memories.make(form, num_tokens)
    read, (_, weights, _, recent) = memories.native.read, memories.state
    h_BTD, lengths_B = torch.randn(3, num_tokens, 64).bfloat16(), torch.tensor([num_tokens, 0, num_tokens - 1])
    expected, _ = memories.exact.read(h_BTD.float(), weights, recent.float())
    torchs, moved = memories.torchs.read(h_BTD, weights, recent, lengths_B)
    y_BTD, moved_too = read(h_BTD, weights, recent, lengths_B)
    assert torch.equal(moved_too, moved)
    assert distance(y_BTD, expected) < 1.1 * distance(torchs, expected) < 0.03
    for row in range(3):
        alone, moved_row = read(h_BTD[row : row + 1], weights[row : row + 1], recent[row : row + 1])
        assert torch.equal(alone[0], y_BTD[row]), "a row is as alone to the last bit"
        before, one_by_one = recent[row : row + 1], []
        for token in h_BTD[row : row + 1].split(1, dim=1):
            y, before = read(token, weights[row : row + 1], before)
            one_by_one.append(y)
        assert torch.equal(torch.cat(one_by_one, dim=1), alone) and torch.equal(before, moved_row)
    shared, _ = read(h_BTD, weights[:1].expand(3, -1, -1), recent)
    assert torch.equal(shared[0], y_BTD[0]) and not torch.equal(shared[1], y_BTD[1])


@pytest.mark.parametrize("form", _MEMORIES)
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 8, 43])
def test_a_memory_learns_what_torch_does(form: dict[str, Any], num_tokens: int) -> None:
    """From less than a chunk to several, each row as many tokens as it has."""
    memories = Memories.make(form, num_tokens)
    before = [x.clone() for x in memories.state]
    h_BTD = torch.randn(3, num_tokens, 64).bfloat16()
    counts = [num_tokens, num_tokens // 2, 0]
    ours = memories.native.write(h_BTD, memories.state, torch.tensor(counts))
    assert all(map(torch.equal, memories.state, before)), "a state is a value"
    assert ours.position.tolist() == [num_tokens, 1 + num_tokens // 2, 2]
    for row, count in enumerate(counts):
        state, tokens = memories.row(row), h_BTD[row : row + 1, :count]
        alone = memories.native.write(tokens, state)
        assert all(torch.equal(x[0], y[row]) for x, y in zip(alone, ours, strict=True)), "as alone to the last bit"
        torchs = memories.torchs.write(tokens, state)
        assert torch.equal(torchs.recent, alone.recent)
        if not count:
            assert torch.equal(alone.weights, state.weights) and torch.equal(alone.momentum, state.momentum)
            continue
        joined = torch.cat((state.recent, memories.torchs._input(tokens)), dim=1)
        writes = memories.exact._writes(joined.float())
        queries = torch.zeros_like(writes.keys)
        oracle = absorb_tokens(memories.exact.config, writes, state.weights, state.momentum, queries)
        for name in ("weights", "momentum")[: 1 + memories.exact.config.momentum]:
            start, exact = getattr(state, name).double(), getattr(oracle, name)
            learnt = exact - start
            error, torchs_error = ((getattr(x, name) - exact).norm() / learnt.norm() for x in (alone, torchs))
            assert error < 3e-6 and error < torchs_error < 0.1, "as a share of what is learnt"


@pytest.mark.parametrize("momentum", [True, False])
def test_where_no_token_writes_momentum_goes_on_and_the_memory_fades(momentum: bool) -> None:
    memories = Memories.make({"momentum": momentum, "write_threshold": 0.3}, 3)
    h_BTD = torch.randn(3, 43, 64).bfloat16()
    for memory in (memories.torchs, memories.exact):
        memory.gates.bias[: memory.config.num_heads] = -9.0
    native = NativeMemory(memories.torchs, Team(2))
    joined = torch.cat((memories.state.recent, memories.torchs._input(h_BTD)), dim=1)
    writes = memories.exact._writes(joined.float())
    assert not writes.theta.any()
    start = memories.state
    oracle = absorb_tokens(memories.exact.config, writes, start.weights, start.momentum, torch.zeros_like(writes.keys))
    for after in (native.write(h_BTD, start), memories.torchs.write(h_BTD, start)):
        torch.testing.assert_close(after.weights.double(), oracle.weights, rtol=1e-5, atol=1e-5)
        if momentum:
            torch.testing.assert_close(after.momentum.double(), oracle.momentum, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_what_a_memory_learns_is_the_same_in_pieces() -> None:
    memories = Memories.make(_MEMORIES[1], 5)
    h_BTD = torch.randn(3, 60, 64).bfloat16()
    at_once, state = memories.native.write(h_BTD, memories.state), memories.state
    for piece in h_BTD.split([1, 20, 8, 31], dim=1):
        state = memories.native.write(piece, state)
    assert torch.equal(state.recent, at_once.recent)
    torch.testing.assert_close(state.weights, at_once.weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.momentum, at_once.momentum, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", [{"value_dim": 8}, {"rule": "chunk"}, {"output_norm": True}, {"num_heads": 1}])
def test_memories_that_the_kernels_do_not_know_stay_with_torch(form: dict[str, Any]) -> None:
    assert not NativeMemory.knows(NeuralMemory(replace(tiny().memory, **form), 64))


@pytest.mark.parametrize("form", [{"architecture": "mag"}, {"architecture": "lmm", "memory_layers": (0, 1, 2, 3)}, {}])
def test_models_that_the_kernels_do_not_know_stay_with_torch(form: dict[str, object]) -> None:
    model = aligned(**form) if form else make_tiny().bfloat16()
    pack(model, {})
    assert model.walks is None


@torch.inference_mode()
def test_the_shipped_model_says_what_it_said() -> None:
    loaded = load(device=torch.device("cpu"), dtype=torch.bfloat16)
    model, text = loaded.model, (Path(__file__).parents[2] / "examples" / "sherlock-holmes.txt").read_text()
    kinds = [x.native.kind for x in model.modules() if isinstance(x, PackedLinear) and x.native]
    assert sorted(kinds) == [4] * 120 + [8, 16], "the layers, the head (an eight-bit embedding), the readout"
    tokens = torch.tensor([loaded.tokenizer.encode(text[:3000])[:340]])
    state = model.ingest(tokens[:, :300], model.new_state())
    assert model.walks is not None
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


def test_what_was_compiled_is_found_and_what_does_not_compile_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    broken = tmp_path / "kernels" / "kernels.cpp"
    broken.parent.mkdir()
    broken.write_text("this is not C++")
    monkeypatch.setattr(build, "_SOURCES", broken.parent)
    assert build.library.__wrapped__() is None
    assert "no compiled kernels" in caplog.text
    broken.write_text('extern "C" int titans_answer() { return 42; }')
    library = build.library.__wrapped__()
    assert library is not None and library.titans_answer() == 42

    def nothing(*_: object, **__: object) -> None:
        raise subprocess.SubprocessError("compiled a second time")

    monkeypatch.setattr(subprocess, "run", nothing)
    assert build.library.__wrapped__() is not None
    assert [path.suffix for path in (tmp_path / ".cache" / "titans").iterdir()] == [".so"]


@pytest.mark.parametrize("home", [None, "x" * 300])
def test_a_user_without_a_home_has_the_kernels_beside_the_sources_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, home: str | None
) -> None:
    """Nobody knows one, or to look into it is refused: a container that runs as some number, say."""

    def of_nobody() -> Path:
        if home is None:
            raise RuntimeError("Could not determine home directory.")
        return tmp_path / home

    kernels = build.library()
    assert kernels is not None
    made = Path(kernels._name)
    monkeypatch.setattr(Path, "home", of_nobody)
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    assert build.library.__wrapped__() is None
    assert "no compiled kernels" in caplog.text
    (tmp_path / made.name).write_bytes(made.read_bytes())
    assert build.library.__wrapped__() is not None


def test_without_kernels_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titans.packed.library", lambda: None)
    model = aligned()
    pack(model, {})
    layers = [x for x in model.modules() if isinstance(x, PackedLinear)]
    assert layers and not any(x.native for x in layers)
    assert model.walks is None
