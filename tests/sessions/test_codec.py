"""A state survives being written down bit for bit, and nothing doubtful is ever read back."""

import json
import math
import random
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from support.models import make_tiny
from titans.checkpoint import ready
from titans.config import tiny
from titans.memory.quantization import as_floats, quantize
from titans.model import TitansModel
from titans.sampling import Sampler, SamplingParams
from titans.state import State
from titans_server.errors import StateCorrupted, StateMismatch
from titans_server.sessions import codec
from titans_server.sessions.codec import decode, encode, sha256
from torch import Tensor

MODEL = "model-a"
HEADER = {"format": "titans-session", "format_version": "1", "fingerprint": MODEL}  # without a checksum


def empty(dtype: torch.dtype, *, momentum: bool = True) -> State:
    return TitansModel(tiny(momentum=momentum)).to(dtype).new_state()


def a_state(dtype: torch.dtype = torch.float32, momentum: bool = True) -> State:
    zeros = empty(dtype, momentum=momentum)
    generator = torch.Generator().manual_seed(7)
    parts = {name: torch.randn(x.shape, generator=generator).to(x.dtype) for name, x in zeros.parts().items()}
    return State.from_parts(parts | {"position": torch.tensor([12345678901])})


def bits(x: Tensor) -> bytes:
    return bytes(x.contiguous().view(torch.uint8).numpy().tobytes())


def assert_bit_equal(a: State, b: State) -> None:
    for name, x in a.parts().items():
        y = b.parts()[name]
        assert (x.dtype, x.shape) == (y.dtype, y.shape), name
        assert bits(x) == bits(y), name


def altered(blob: bytes, header: dict[str, str] | None = None, **parts: Tensor) -> bytes:
    return save(load(blob) | parts, metadata=HEADER if header is None else header)


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_read_back_is_bit_equal(dtype: torch.dtype, momentum: bool) -> None:
    state = a_state(dtype, momentum)
    restored = decode(encode(state, MODEL), fingerprint=MODEL, like=empty(dtype, momentum=momentum))
    assert_bit_equal(state, restored)


def test_negative_zero_and_denormals_keep_their_bits() -> None:
    state = a_state()
    state.tail.view(-1)[:3] = torch.tensor([-0.0, 1e-45, codec.MOST_STORED])
    assert_bit_equal(state, decode(encode(state, MODEL), fingerprint=MODEL, like=state))


def test_views_strides_and_shared_storages_can_be_written() -> None:
    state = a_state()
    parts = state.parts()
    both = torch.stack([parts["0.keys"], parts["0.values"]])
    flipped = parts["2.weights"].transpose(1, 2).contiguous().transpose(1, 2)
    assert not flipped.is_contiguous()
    tangled = State.from_parts(parts | {"0.keys": both[0], "0.values": both[1], "2.weights": flipped})
    assert_bit_equal(state, decode(encode(tangled, MODEL), fingerprint=MODEL, like=state))


def test_a_state_of_another_dtype_is_cast() -> None:
    written, like = a_state(torch.bfloat16), empty(torch.float32)
    restored = decode(encode(written, MODEL), fingerprint=MODEL, like=like)
    for name, x in restored.parts().items():
        assert x.dtype == like.parts()[name].dtype
        assert torch.equal(x, written.parts()[name].to(x.dtype))


@pytest.mark.parametrize(("written", "read"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_keys_that_one_server_keeps_in_eight_bits_another_has_in_float32(
    written: torch.dtype, read: torch.dtype
) -> None:
    config = tiny(momentum=True, products=2, protected_keys=5)
    state, like = (TitansModel(config).to(dtype).new_state() for dtype in (written, read))
    (name,) = (name for name in state.parts() if name.endswith(".kept"))
    keys = torch.randn((*like.parts()[name].shape[:-1], config.memory.key_dim))
    kept = quantize(keys) if state.parts()[name].dtype == torch.int8 else keys
    state = State.from_parts(state.parts() | {name: kept})
    restored = decode(encode(state, MODEL), fingerprint=MODEL, like=like).parts()[name]
    assert (restored.dtype, restored.shape) == (like.parts()[name].dtype, like.parts()[name].shape)
    torch.testing.assert_close(as_floats(restored), as_floats(kept), rtol=0, atol=0.02)
    as_kept = kept.shape[-1] - (kept.dtype == torch.int8)
    for doubtful, why in (
        (torch.full((*kept.shape[:-1], as_kept), math.nan), "of 0"),
        (torch.tensor(1).char(), "shape"),
    ):
        with pytest.raises(StateCorrupted, match=why):
            decode(altered(encode(state, MODEL), None, **{name: doubtful}), fingerprint=MODEL, like=like)


def test_numbers_that_the_servers_dtype_has_not_are_refused() -> None:
    state, like = a_state(torch.float32), empty(torch.bfloat16)
    state.tail.view(-1)[0] = torch.finfo(torch.float32).max  # bfloat16 would make it infinite
    with pytest.raises(StateCorrupted, match="of 0"):
        decode(encode(state, MODEL), fingerprint=MODEL, like=like)


def test_the_state_and_the_bytes_share_nothing() -> None:
    state = a_state()
    blob = encode(state, MODEL)
    before = sha256(blob)
    decode(blob, fingerprint=MODEL, like=state).tail.fill_(1.0)
    state.tail.fill_(2.0)
    assert sha256(blob) == before
    assert not torch.equal(decode(blob, fingerprint=MODEL, like=state).tail, state.tail)


def test_the_header_says_what_it_is() -> None:
    blob = encode(a_state(), MODEL)
    length = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + length])["__metadata__"]
    assert {name: header[name] for name in HEADER} == HEADER | {"format_version": "2"}
    assert len(header["sha256"]) == 64


def test_an_altered_number_is_found_out() -> None:
    state = a_state()
    blob = bytearray(encode(state, MODEL))
    for place in (-1, -100, -1000):
        damaged = blob.copy()
        damaged[place] ^= 1
        with pytest.raises(StateCorrupted, match="not those that were written"):
            decode(bytes(damaged), fingerprint=MODEL, like=state)


def test_a_file_of_the_version_before_is_read() -> None:
    state = a_state()
    assert_bit_equal(state, decode(altered(encode(state, MODEL)), fingerprint=MODEL, like=state))


def test_another_models_state_is_a_mismatch() -> None:
    state = a_state()
    with pytest.raises(StateMismatch, match=r"model-a.*model-b"):
        decode(encode(state, MODEL), fingerprint="model-b", like=state)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({}, "format"),
        (HEADER | {"format": "titans-memory/1"}, "titans-memory/1"),
        (HEADER | {"format_version": "3"}, "version '3'"),
    ],
)
def test_an_unknown_format_or_version_is_named(header: dict[str, str], message: str) -> None:
    state = a_state()
    with pytest.raises(StateCorrupted, match=message):
        decode(altered(encode(state, MODEL), header), fingerprint=MODEL, like=state)


@pytest.mark.parametrize("blob", [b"", b"\0" * 7, b"\xff" * 64, b"not a state at all", b"\2\0\0\0\0\0\0\0{}"])
def test_what_is_no_state_is_refused(blob: bytes) -> None:
    with pytest.raises(StateCorrupted):
        decode(blob, fingerprint=MODEL, like=a_state())


def test_a_torn_state_is_refused_wherever_it_is_torn() -> None:
    state = a_state()
    blob = encode(state, MODEL)
    for size in [*range(0, len(blob), 997), len(blob) - 1]:
        with pytest.raises(StateCorrupted):
            decode(blob[:size], fingerprint=MODEL, like=state)
    with pytest.raises(StateCorrupted):
        decode(blob + b"\0", fingerprint=MODEL, like=state)


def test_an_altered_header_is_read_alike_or_refused() -> None:
    state, chance = a_state(), random.Random(3)
    blob = encode(state, MODEL)
    length = 8 + int.from_bytes(blob[:8], "little")
    for _ in range(500):
        damaged = bytearray(blob)
        damaged[chance.randrange(length)] = chance.randrange(256)
        try:
            restored = decode(bytes(damaged), fingerprint=MODEL, like=state)
        except (StateCorrupted, StateMismatch):
            continue
        assert restored.parts().keys() == state.parts().keys()


def test_a_missing_or_additional_part_is_refused() -> None:
    state = a_state()
    blob = encode(state, MODEL)
    parts = load(blob)
    del parts["tail"]
    for changed in (save(parts, metadata=HEADER), altered(blob, extra=torch.zeros(1))):
        with pytest.raises(StateCorrupted, match="parts"):
            decode(changed, fingerprint=MODEL, like=state)


def test_another_shape_is_refused_and_named() -> None:
    state = a_state()
    with pytest.raises(StateCorrupted, match=r"tail.*\(1, 2, 3\)"):
        decode(altered(encode(state, MODEL), tail=torch.zeros(1, 2, 3)), fingerprint=MODEL, like=state)


def test_another_kind_of_number_is_refused() -> None:
    state = a_state()
    with pytest.raises(StateCorrupted, match="position"):
        decode(altered(encode(state, MODEL), position=torch.zeros(1)), fingerprint=MODEL, like=state)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", ["2.weights", "2.momentum", "2.recent", "0.keys", "1.values", "tail"])
def test_a_number_that_is_not_finite_is_refused(part: str, dtype: torch.dtype, bad: float) -> None:
    state = a_state(dtype)
    x = state.parts()[part].clone()
    x.view(-1)[-1] = bad
    with pytest.raises(StateCorrupted, match=f"{part} holds .* to be within 3.40282e\\+38 of 0"):
        decode(encode(State.from_parts(state.parts() | {part: x}), MODEL), fingerprint=MODEL, like=state)


@pytest.mark.parametrize("sign", [1, -1])
def test_of_what_is_imported_what_goes_beyond_the_bound_is_refused_and_what_reaches_it_is_not(sign: int) -> None:
    state, most = filled(a_state(), sign * codec.MOST_IMPORTED), codec.MOST_IMPORTED
    assert_bit_equal(state, decode(encode(state, MODEL), fingerprint=MODEL, like=state, most=most))
    beyond = encode(filled(state, 1.001 * sign * most), MODEL)
    with pytest.raises(StateCorrupted, match="of 0"):
        decode(beyond, fingerprint=MODEL, like=state, most=most)
    assert decode(beyond, fingerprint=MODEL, like=state), "what is stored was acknowledged"


def filled(like: State, number: float, *, signs: torch.Generator | None = None) -> State:
    """A state of nothing but one number; where there are `signs`, each of either."""

    def fill(name: str, x: Tensor) -> Tensor:
        if name == "position":
            return torch.tensor([103])  # within a chunk, and the window has been filled
        numbers = torch.full_like(x, number if x.is_floating_point() else math.copysign(127, number))
        if signs is None:
            return numbers
        return numbers * torch.randint(0, 2, x.shape, generator=signs).mul(2).sub(1).to(x.dtype)

    return like.map(fill)


@pytest.mark.parametrize("sign", [1, -1, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "form",
    [
        {"readout": True},
        {"momentum": True, "memory_layers": (1, 2)},
        {"momentum": True, "products": 2, "output_norm": True},
        {"momentum": True, "products": 2, "protected_keys": 5},
        {"momentum": True, "architecture": "mag"},
        {"momentum": True, "architecture": "mac"},
        {"momentum": True, "architecture": "lmm", "memory_layers": (0, 1, 2, 3)},
        {"momentum": True, "rule": "chunk"},
    ],
    ids=str,
)
@torch.no_grad()
def test_a_state_of_the_largest_numbers_goes_on_as_any(form: dict[str, Any], dtype: torch.dtype, sign: int) -> None:
    model = make_tiny(**form)
    ready(model, torch.device("cpu"), dtype)
    chance = torch.Generator().manual_seed(0)
    largest = filled(model.new_state(), (sign or 1) * codec.MOST_IMPORTED, signs=None if sign else chance)
    state = decode(encode(largest, MODEL), fingerprint=MODEL, like=largest, most=codec.MOST_IMPORTED)
    sampler = Sampler(SamplingParams(min_p=0.1, num_logprobs=5, seed=1))
    for _ in range(4):
        hidden, _ = model.forward(torch.randint(3, 259, (1, 11), generator=chance), model.open(state))
        told = sampler.draw(model.logits(hidden[0, -1]))
        assert all(math.isfinite(logprob or 0.0) for logprob in (told.logprob, *dict(told.top).values()))
        before, state = state, model.ingest(torch.randint(3, 259, (1, 37), generator=chance), state)
        state = decode(encode(state, MODEL), fingerprint=MODEL, like=state)
        weights = [name for name in state.parts() if name.endswith(".weights")]
        assert all((state.parts()[name] - before.parts()[name]).square().sum().isfinite() for name in weights)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_states_move_between_devices() -> None:
    state = a_state()
    on_device = State.from_parts({name: x.cuda() for name, x in state.parts().items()})
    there = decode(encode(state, MODEL), fingerprint=MODEL, like=on_device)
    assert all(x.is_cuda for x in there.parts().values())
    assert_bit_equal(state, decode(encode(on_device, MODEL), fingerprint=MODEL, like=state))
