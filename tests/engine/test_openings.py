"""What answers begin from: opened once a state, a layer at a time, and let go of with it."""

import gc
import weakref
from dataclasses import replace

import torch
from support.models import make_tiny
from titans.model import TitansModel
from titans.state import State, Stream
from titans_server.engine.openings import Openings
from titans_server.engine.steps import Steps


def read(model: TitansModel, seed: int) -> State:
    tokens = torch.randint(3, 259, (1, 40), generator=torch.Generator().manual_seed(seed))
    return model.ingest(tokens, model.new_state())


def tensors_of(stream: Stream) -> dict[str, torch.Tensor]:
    found = dict[str, torch.Tensor]()
    stream.map(found.setdefault)
    return found


def test_a_state_is_opened_a_layer_at_a_time_once_for_all_who_ask() -> None:
    model = make_tiny()
    openings, state = Openings(Steps(model)), read(model, 1)
    tries = 0
    while not openings.is_open(state):
        openings.open(state, 0.0)
        tries += 1
    assert tries > len(model.upper)
    stream, expected = openings.stream(state, recall=False), tensors_of(model.open(state))
    for name, x in tensors_of(stream).items():
        assert torch.equal(x, expected[name]), name
    assert not stream.recall
    assert openings.stream(state, recall=True).recall


def test_all_states_that_may_be_asked_are_opened_ahead_the_last_one_first() -> None:
    model = make_tiny()
    openings, states = Openings(Steps(model)), [read(model, seed) for seed in range(40)]
    for state in states:
        openings.expect(state)
    opened: list[int] = []
    while openings.has_expected():
        openings.prepare()
        opened += [i for i, state in enumerate(states) if i not in opened and id(state) in openings._opened]
    assert opened == list(range(40))[::-1]


def test_a_state_that_is_let_go_of_half_opened_is_not_taken_for_one_that_comes_after_it() -> None:
    """A state that is made where another one was has its id."""
    model = make_tiny()
    openings, one, other = Openings(Steps(model)), read(model, 1), read(model, 2)
    expected = tensors_of(model.open(other))
    for _ in range(100):
        openings.open(replace(one), 0.0)  # a copy that nobody else has
        copy = replace(other)
        while not openings.is_open(copy):
            openings.open(copy, 0.0)
        for name, x in tensors_of(openings.stream(copy, recall=True)).items():
            assert torch.equal(x, expected[name]), name


def test_a_state_that_is_let_go_of_takes_what_was_opened_with_it() -> None:
    model = make_tiny()
    openings, whole, begun = Openings(Steps(model)), read(model, 1), read(model, 2)
    while not openings.is_open(whole):
        openings.open(whole, 0.0)
    openings.open(begun, 0.0)
    assert (len(openings._opened), len(openings._under_way)) == (1, 1)
    openings.abandon(begun)
    openings.abandon(whole)
    assert (len(openings._opened), len(openings._under_way)) == (1, 0), "what is whole stays"
    refs = weakref.ref(whole), weakref.ref(begun)
    openings.expect(whole)
    del whole, begun
    gc.collect()
    assert [ref() for ref in refs] == [None, None]
    assert not openings._opened
    assert not openings.has_expected()
    openings.prepare()
