"""Streams that come and go in one set of tensors are each as by themselves."""

import random
from typing import Any

import pytest
import torch
from support.models import make_tiny
from titans.model import TitansModel
from titans.state import Stream
from titans_server.engine.pool import Pool, move_on

DEEP = {"rule": "chunk", "depth": 2, "expansion": 2, "momentum": True}
FORMS: dict[str, Any] = {
    "mal": {},
    "mal, protecting": {"protected_keys": 5, "products": 2, "write_threshold": 0.4},
    "mag": {"architecture": "mag", "memory_layers": (0, 2)},
    "mac": {"architecture": "mac", "memory_layers": (1, 3), **DEEP},
    "lmm": {"architecture": "lmm", "memory_layers": (0, 1, 2, 3), **DEEP},
}


def opened(model: TitansModel, num_read: int) -> Stream:
    generator = torch.Generator().manual_seed(num_read)
    tokens = torch.randint(0, 259, (1, num_read), generator=generator)
    return model.open(model.ingest(tokens, model.new_state()))


@pytest.mark.parametrize("form", list(FORMS.values()), ids=list(FORMS))
@torch.inference_mode()
def test_each_stream_is_as_alone_whoever_joins_and_leaves(form: dict[str, Any]) -> None:
    model, pool, chance = make_tiny(**form), Pool(), random.Random(1)
    alone = list[Stream]()
    for turn in range(40):
        if alone and (len(alone) == 5 or chance.random() < 0.3):
            row = chance.randrange(len(alone))
            pool.leave(row)
            last = alone.pop()
            if row < len(alone):
                alone[row] = last
        else:
            stream = opened(model, 7 * turn + 1)
            assert pool.join(stream) == len(alone)
            alone.append(stream.select([0]))
        assert len(pool) == len(alone)
        if not alone:
            continue
        tokens = torch.tensor([[chance.randrange(259)] for _ in alone])
        h, after = model(tokens, pool.stream)
        move_on(pool.stream, after)
        for row, stream in enumerate(alone):
            expected, alone[row] = model(tokens[row : row + 1], stream)
            torch.testing.assert_close(h[row : row + 1], expected, rtol=1e-4, atol=1e-4)


def parts(stream: Stream) -> dict[str, torch.Tensor]:
    found = dict[str, torch.Tensor]()
    stream.map(found.setdefault)
    return found


@torch.inference_mode()
def test_what_does_not_move_is_not_copied() -> None:
    model, pool = make_tiny(), Pool()
    for num_read in (3, 20, 40, 50):
        pool.join(opened(model, num_read))
    before = parts(pool.stream)
    move_on(pool.stream, model(torch.zeros(4, 1, dtype=torch.int64), pool.stream)[1])
    pool.leave(1)
    pool.join(opened(model, 9))
    assert all(x.data_ptr() == before[name].data_ptr() for name, x in parts(pool.stream).items())


@torch.inference_mode()
def test_a_stream_that_joined_is_not_written_to() -> None:
    model, pool = make_tiny(), Pool()
    stream = opened(model, 20)
    copy = stream.select([0])
    pool.join(stream)
    move_on(pool.stream, model(torch.tensor([[5]]), pool.stream)[1])
    assert all(torch.equal(x, parts(copy)[name]) for name, x in parts(stream).items())


@pytest.mark.parametrize(("most", "kept"), [(1, 1), (3, 4), (16, 16), (17, 1)])
@torch.inference_mode()
def test_room_for_a_few_answers_stays_and_for_many_is_given_back(most: int, kept: int) -> None:
    model, pool = make_tiny(), Pool()
    stream = opened(model, 20)
    for _ in range(most):
        pool.join(stream)
    for row in reversed(range(most)):
        pool.leave(row)
    pool.join(stream)
    assert pool.stream.state.position.untyped_storage().nbytes() == kept * stream.state.position.nbytes
    assert all(torch.equal(x, parts(stream)[name]) for name, x in parts(pool.stream).items())
