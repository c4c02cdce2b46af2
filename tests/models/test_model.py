"""The whole model on a tiny body: one stream of tokens, however it is cut, batched, saved or continued."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.models import make_tiny
from titans.model import TitansModel
from titans.state import State, Stream


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, name: str = "") -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, msg=partial("{}: {}".format, name))


def random_tokens(count: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 259, (batch, count), generator=generator)


def assert_same(ours: State, theirs: State) -> None:
    for name, part in ours.parts().items():
        assert_close(part, theirs.parts()[name], name)


def read_on(model: TitansModel, tokens: torch.Tensor, stream: Stream, sizes: Sequence[int] = ()) -> torch.Tensor:
    """Logits of all tokens, read in runs of these sizes and then the rest."""
    hidden = []
    for part in tokens.split([*sizes, tokens.shape[1] - sum(sizes)], dim=1):
        h, stream = model(part, stream)
        hidden.append(h)
    return model.logits(torch.cat(hidden, dim=1))


@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_document_cut_anywhere_leaves_one_state(model: TitansModel, data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 90))
    tokens = random_tokens(count)
    whole = model.ingest(tokens, model.new_state())
    state, start = model.new_state(), 0
    for cut in [*sorted(data.draw(st.sets(st.integers(1, count - 1), max_size=6))), count]:
        state = model.ingest(tokens[:, start:cut], state)
        start = cut
    assert_same(state, whole)


def test_sessions_in_one_batch_are_each_as_alone(model: TitansModel) -> None:
    lengths = [37, 5, 16, 1]
    rows = [random_tokens(n, seed=n) for n in lengths]
    starts = [model.ingest(random_tokens(n, seed=90 + n), model.new_state()) for n in (3, 40, 16, 7)]
    padded = torch.zeros(4, 37, dtype=torch.int64)
    for i, row in enumerate(rows):
        padded[i, : row.shape[1]] = row
    for told in (lengths, torch.tensor(lengths)):
        together = model.ingest(padded, State.cat(starts), told).split()
        for row, start, ours in zip(rows, starts, together, strict=True):
            assert_same(ours, model.ingest(row, start))


def test_a_session_keeps_no_more_in_memory_than_its_state(model: TitansModel) -> None:
    """Nor the batch it was in, nor the text it has read."""
    for state in model.ingest(torch.cat([random_tokens(50, seed=n) for n in (1, 2)]), model.new_state(2)).split():
        read_on = model.ingest(random_tokens(50, seed=3), state)
        for name, part in [*state.parts().items(), *read_on.parts().items()]:
            assert part.untyped_storage().nbytes() == part.nbytes, name


@pytest.mark.parametrize("fused_on", ["cuda", "cpu"], ids=["as on a CPU", "as on a GPU"])
def test_several_windows_at_once_leave_the_state_that_each_alone_does(
    model: TitansModel, fused_on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a row's last tokens reach before the call's first one, and where it has none."""
    monkeypatch.setattr("titans.attention._FUSED_ON", fused_on)
    most = 4 * model.config.window
    starts = [model.ingest(random_tokens(n, seed=90 + n), model.new_state()) for n in (3, 41, 16, 7, 129, 30)]
    tokens, lengths = random_tokens(most, batch=6), [most, 37, 5, most - 1, 0, model.config.window]
    ragged = model.ingest(tokens, State.cat(starts), lengths, at_once=most)
    assert_same(ragged, model.ingest(tokens, State.cat(starts), lengths))
    assert_same(model.ingest(tokens, ragged, at_once=most), model.ingest(tokens, ragged))
    longer = random_tokens(most + 21)
    assert_same(model.ingest(longer, starts[1], at_once=most), model.ingest(longer, starts[1]))
    assert_same(model.ingest(longer, starts[1], at_once=most + 21), model.ingest(longer, starts[1]))


def test_ingest_leaves_the_state_it_was_given_alone(model: TitansModel) -> None:
    before = model.ingest(random_tokens(20), model.new_state())
    copy = before.clone()
    model.ingest(random_tokens(50, seed=1), before)
    model(random_tokens(5), model.open(before))
    for name, part in before.parts().items():
        assert torch.equal(part, copy.parts()[name]), name


def test_ingest_is_what_reading_with_write_learns(model: TitansModel) -> None:
    tokens = random_tokens(50)
    stream = model.open(model.new_state(), write=True)
    for part in tokens.split(10, dim=1):
        _, stream = model(part, stream)
    learnt, ingested = stream.state.parts(), model.ingest(tokens, model.new_state()).parts()
    for name in set(learnt) - {"tail"}:
        assert_close(learnt[name], ingested[name], name)


@pytest.mark.parametrize("write", [False, True])
def test_no_logit_looks_ahead(model: TitansModel, write: bool) -> None:
    state = model.ingest(random_tokens(40, seed=3), model.new_state())
    tokens = random_tokens(14)
    before = read_on(model, tokens, model.open(state, write=write))
    for t in (1, 5, 13):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % 259
        after = read_on(model, changed, model.open(state, write=write))
        assert torch.equal(after[:, :t], before[:, :t]), f"a logit before token {t} changed with it"
        assert not torch.equal(after[:, t], before[:, t])


@pytest.mark.parametrize("write", [False, True])
def test_token_by_token_equals_all_at_once(model: TitansModel, write: bool) -> None:
    state = model.ingest(random_tokens(23, seed=3), model.new_state())
    tokens = random_tokens(45)
    at_once = read_on(model, tokens, model.open(state, write=write))
    one_by_one = read_on(model, tokens, model.open(state, write=write), [1] * 44)
    assert_close(one_by_one, at_once)


@given(data=st.data())
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_runs_of_any_sizes_equal_one(model: TitansModel, data: st.DataObject) -> None:
    write = data.draw(st.booleans())
    state = model.ingest(random_tokens(data.draw(st.integers(1, 40)), seed=3), model.new_state())
    tokens = random_tokens(50)
    sizes = data.draw(st.lists(st.integers(1, 20), max_size=6).filter(lambda sizes: sum(sizes) < 50))
    at_once = read_on(model, tokens, model.open(state, write=write))
    assert_close(read_on(model, tokens, model.open(state, write=write), sizes), at_once)


@pytest.mark.parametrize("form", ["lmm", "mag", "mac", "mal"])
def test_with_the_last_memory_on_top_a_session_is_what_one_reading_of_all_would_be(form: str) -> None:
    deep: dict[str, Any] = {"rule": "chunk", "depth": 2, "expansion": 2, "momentum": True}
    model = make_tiny(architecture=form, memory_layers=(0, 3), **deep)
    before, after = random_tokens(37), random_tokens(21, seed=4)
    whole = read_on(model, torch.cat((before, after), 1), model.open(model.new_state(), write=True))[:, 37:]
    session = model.open(model.ingest(before, model.new_state()), write=True)
    same = torch.allclose(read_on(model, after, session), whole, rtol=1e-4, atol=1e-4)
    assert same == (form != "mal"), "MAL: the last window passes without the last memory's answers"


def test_streams_in_one_batch_are_each_as_alone(model: TitansModel) -> None:
    states = [model.ingest(random_tokens(n, seed=n), model.new_state()) for n in (3, 50, 16)]
    token = torch.tensor([[7], [8], [9]])
    alone = [model(token[i : i + 1], model.open(s))[0] for i, s in enumerate(states)]
    together, after = model(token, model.open(State.cat(states)))
    assert_close(together, torch.cat(alone))
    assert after.state.position.tolist() == [4, 51, 17]


def test_a_continued_session_is_the_uninterrupted_one_to_the_bit(model: TitansModel) -> None:
    first, second = random_tokens(33), random_tokens(29, seed=4)
    state = model.ingest(first, model.new_state())
    reloaded = State.from_parts({name: part.clone() for name, part in state.parts().items()})
    ours, theirs = model.ingest(second, reloaded), model.ingest(second, state)
    for name, part in ours.parts().items():
        assert torch.equal(part, theirs.parts()[name]), name


def test_nothing_but_the_memory_reaches_past_the_windows(model: TitansModel) -> None:
    """With recall off, text further back than every window leaves no trace; with it on, it does."""
    depth = model.config.backbone.num_layers * model.config.window
    same = random_tokens(depth, seed=5)
    documents = [torch.cat((random_tokens(60, seed=seed), same), dim=1) for seed in (1, 2)]
    prompt = random_tokens(5, seed=6)
    for recall, equal in ((False, True), (True, False)):
        states = [model.ingest(document, model.new_state(), recall=recall) for document in documents]
        a, b = (read_on(model, prompt, model.open(state, recall=recall)) for state in states)
        assert torch.equal(a, b) == equal


def test_a_reader_may_turn_off_a_memory_that_has_learnt() -> None:
    model = make_tiny()
    state = model.ingest(random_tokens(60), model.new_state())
    silent = model.ingest(random_tokens(60), model.new_state(), recall=False)
    prompt = random_tokens(5, seed=6)
    off, never = (read_on(model, prompt, model.open(s, recall=False)) for s in (state, silent))
    assert torch.equal(off, never), "MAL: the last window passes as the layers below left it"
    assert not torch.equal(off, read_on(model, prompt, model.open(state)))


def test_a_state_does_not_grow(model: TitansModel) -> None:
    short = model.ingest(random_tokens(1), model.new_state())
    assert model.ingest(random_tokens(3_000), short).num_bytes == short.num_bytes


def test_far_positions_keep_their_precision(model: TitansModel) -> None:
    """The same window of text answers alike at position 0 and at position 100 million."""
    tokens = random_tokens(40)
    near = model.new_state()
    far = replace(near, position=near.position + 100_000_000 * model.config.window)
    # a far session has a full window of (empty) past, so compare the far one with itself one window on
    a = model.ingest(tokens, far)
    b = model.ingest(tokens, replace(far, position=far.position + model.config.window))
    assert_close(a.layers[-1]["weights"], b.layers[-1]["weights"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_reads_and_answers_as_a_cpu_does(model: TitansModel) -> None:
    other, tokens, prompt = copy.deepcopy(model).cuda(), random_tokens(70), random_tokens(9, seed=1)
    state, theirs = model.ingest(tokens, model.new_state()), other.new_state()
    for part in tokens.split([5, 41, 24], dim=1):
        theirs = other.ingest(part.cuda(), theirs)
    assert_same(theirs.map(lambda _, x: x.cpu()), state)
    for write in (False, True):
        logits = read_on(model, prompt, model.open(state, write=write))
        assert_close(read_on(other, prompt.cuda(), other.open(theirs, write=write), [4, 1]).cpu(), logits)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_sessions_on_a_gpu_in_one_batch_are_each_as_alone(model: TitansModel) -> None:
    other, tokens, lengths = copy.deepcopy(model).cuda(), random_tokens(70, batch=3).cuda(), [70, 1, 33]
    together = other.ingest(tokens, other.new_state(3), lengths).split()
    for row, length, ours in zip(tokens, lengths, together, strict=True):
        assert_same(ours, other.ingest(row[None, :length], other.new_state()))
