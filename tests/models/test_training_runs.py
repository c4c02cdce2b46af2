"""The recipe on a tiny body: it learns, and a run that was cut goes on as if it had not been."""

import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.models import TinyCheckpoint
from support.training import CONFIG, make_trainer
from titans.checkpoint import load, memory_tensors
from titans.training import loop
from titans.training.batch import make_batch
from titans.training.config import Rates, Stage
from titans.training.loop import Trainer, kind_of
from titans.training.plot import plot
from titans.training.pool import Pool


def test_steps_on_a_batch_lower_its_losses(tiny: TinyCheckpoint, pool: Pool, tmp_path: Path) -> None:
    trainer, stage = make_trainer(tiny, pool, tmp_path / "run"), CONFIG.stages[1]
    trainer.step = CONFIG.stages[0].num_steps + 2
    first = trainer._take_step(stage)
    for _ in range(12):
        last = trainer._take_step(stage)
    for name in ("answer", "recall"):
        assert last[name] < first[name], name


def test_a_run_leaves_the_body_alone_and_is_drawn(tiny: TinyCheckpoint, pool: Pool, tmp_path: Path) -> None:
    trainer = make_trainer(tiny, pool, tmp_path / "run")
    before = {name: x.clone() for name, x in trainer.model.state_dict().items()}
    trainer.train()
    for name, tensor in trainer.model.state_dict().items():
        ours = name.startswith(("memory_layers.", "readout.")) or name in trainer.model.adapted
        assert torch.equal(tensor, before[name]) != ours, name
    assert "generated" in trainer.history[-1]
    again = make_trainer(tiny, pool, tmp_path / "run")
    again.train()  # a finished run comes to the same memory: the strength of its answers is set from what was trained
    assert torch.equal(again.memory.out.weight, trainer.memory.out.weight)
    plot(tmp_path / "run" / "log.json", tmp_path / "run" / "training.png")
    assert (tmp_path / "run" / "training.png").read_bytes().startswith(b"\x89PNG")


def test_norms_and_sinks_learn_beside_a_memory_that_stays_as_it_is(
    tiny: TinyCheckpoint, pool: Pool, tmp_path: Path
) -> None:
    only = replace(CONFIG.adapting().joint, body=1e-2)
    config = replace(CONFIG, key_steps=0, value_steps=0, joint=only, stages=(Stage(400, 4, 12, 2, 8),))
    trainer = make_trainer(tiny, pool, tmp_path / "run", config)
    before = {name: x.clone() for name, x in memory_tensors(trainer.model).items()}
    batch = make_batch(pool, config, config.stages[0], 0)

    @torch.no_grad()
    def text_loss() -> float:
        losses = trainer.losses(batch).figures()
        return losses["text"] + config.name_weight * losses["names"]

    loss = text_loss()
    trainer.train(tiny.memory)
    for name, tensor in memory_tensors(trainer.model).items():
        assert torch.equal(tensor, before[name]) != (name in trainer.model.adapted), name
    assert text_loss() < loss


def test_the_strength_of_the_answers_is_the_best_on_held_out_facts(
    tiny: TinyCheckpoint, pool: Pool, tmp_path: Path
) -> None:
    trainer = make_trainer(tiny, pool, tmp_path / "run")
    trained = trainer.memory.out.weight.detach().clone()
    batches = [make_batch(pool, CONFIG, CONFIG.stages[1], CONFIG.num_steps + i, held_out=True) for i in range(6)]

    def loss() -> float:
        losses = [trainer.losses(batch).figures() for batch in batches]
        return sum(x["answer"] + CONFIG.text_weight * x["text"] for x in losses)

    strength = trainer._set_strength()
    torch.testing.assert_close(trainer.memory.out.weight, strength * trained)
    best = loss()
    with torch.no_grad():
        for other in (1.0, 1.2, 1.4, 1.6, 1.8):
            trainer.memory.out.weight.copy_(other * trained)
            assert loss() >= best - 1e-4


@pytest.mark.parametrize("step", [3, 5], ids=["the memory alone", "with the body"])
def test_a_resumed_run_is_the_uninterrupted_one(
    tiny: TinyCheckpoint, pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.setattr(loop, "_SAVE_EVERY", 5)
    whole = make_trainer(tiny, pool, tmp_path / "whole")
    whole.train()
    cut = make_trainer(tiny, pool, tmp_path / "cut")
    stop_after(cut, step)
    resumed = make_trainer(tiny, pool, tmp_path / "cut")
    resumed.train()
    assert len(resumed.history) == CONFIG.num_steps
    expected = memory_tensors(whole.model)
    for name, tensor in memory_tensors(resumed.model).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_lesson_with_the_body_begins_with_what_its_weights_have_adapted(
    tiny: TinyCheckpoint, pool: Pool, tmp_path: Path
) -> None:
    """So it does where it was cut before anything but its beginning was saved. The pool is made by the body alone."""
    plain = load(tiny.body, tiny.memory, device=torch.device("cpu"), dtype=torch.float32, adapted=False).model
    pool, config = pool.renewed(plain), replace(CONFIG, key_steps=0, value_steps=0, stages=(Stage(400, 4, 2, 2, 8),))
    whole = make_trainer(tiny, pool, tmp_path / "whole", config)
    whole.train(tiny.memory)
    stop_after(make_trainer(tiny, pool, tmp_path / "cut", config), 0, tiny.memory)
    resumed = make_trainer(tiny, pool, tmp_path / "cut", config)
    resumed.train(tiny.memory)
    for ours, theirs in zip(resumed.history, whole.history, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    expected = memory_tensors(whole.model)
    for name, tensor in memory_tensors(resumed.model).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("first_save", [True, False])
@pytest.mark.parametrize("file", [1, 2, 3], ids=["the memory", "the log", "what it goes on from"])
def test_a_run_that_was_killed_while_it_was_saved_goes_on(
    tiny: TinyCheckpoint,
    pool: Pool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    first_save: bool,
    file: int,
) -> None:
    cut = make_trainer(tiny, pool, tmp_path / "run")
    if not first_save:
        stop_after(cut, 0)
        cut = make_trainer(tiny, pool, tmp_path / "run")

    begun = list[int]()

    def killed(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            begun.append(descriptor)
            if len(begun) == file:
                os.ftruncate(descriptor, 10)  # so far it came
                raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", killed)
        cut.train()
    resumed = make_trainer(tiny, pool, tmp_path / "run")
    resumed.train()
    assert [row["step"] for row in resumed.history] == [*range(1, CONFIG.num_steps + 1)]
    plot(tmp_path / "run" / "log.json", tmp_path / "run" / "training.png")


def stop_after(trainer: Trainer, step: int, start: Path | None = None) -> None:
    save = trainer._save

    def save_and_stop() -> None:
        save()
        if trainer.step == step:
            raise KeyboardInterrupt

    trainer._save = save_and_stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.train(start)


def test_a_run_goes_on_from_weights(tiny: TinyCheckpoint, pool: Pool, tmp_path: Path) -> None:
    slow, stages = Rates(*[1e-12] * 6), (Stage(400, 4, 1, 2, 0), Stage(400, 4, 1, 2, 4))
    config = replace(CONFIG, key_learning_rate=1e-12, value_learning_rate=1e-12, alone=slow, joint=slow, stages=stages)
    trainer = make_trainer(tiny, pool, tmp_path / "run", config)
    started = {name: x.clone() for name, x in memory_tensors(trainer.model).items()}
    for tensor in memory_tensors(trainer.model).values():
        tensor.data.zero_()
    trainer.train(tiny.memory)
    for name, tensor in memory_tensors(trainer.model).items():
        if not name.endswith("out.weight"):  # whose strength is set
            torch.testing.assert_close(tensor, started[name], rtol=1e-3, atol=1e-6, msg=name)


def test_the_lesson_in_answers_leaves_alone_what_is_written(tiny: TinyCheckpoint, pool: Pool, tmp_path: Path) -> None:
    config = replace(CONFIG.answering(), haystack_tokens=4_096, num_facts=300, stages=(Stage(400, 4, 2, 2, 4),))
    assert all(stage.num_questions for stage in CONFIG.answering().stages)
    trainer = make_trainer(tiny, pool, tmp_path / "run", config)
    before = {name: x.clone() for name, x in trainer.memory.named_parameters()}
    trainer.train(tiny.memory)
    moved = {name for name, x in trainer.memory.named_parameters() if not torch.equal(x, before[name])}
    assert moved and all(kind_of(name) == "answers" for name in moved)
    assert trainer.direct is not None
    assert trainer.step == 2


def test_the_first_lessons_by_themselves_leave_the_body_alone(tiny: TinyCheckpoint, pool: Pool, tmp_path: Path) -> None:
    lesson = CONFIG.finding()
    (sizes,) = (replace(stage, num_tokens=400, num_documents=4) for stage in lesson.stages)
    config = replace(lesson, key_steps=2, value_steps=2, num_facts=300, haystack_tokens=4_096, stages=(sizes,))
    trainer = make_trainer(tiny, pool, tmp_path / "run", config)
    before = {name: x.clone() for name, x in memory_tensors(trainer.model).items()}
    trainer.train(tiny.memory)
    moved = {name for name, x in memory_tensors(trainer.model).items() if not torch.equal(x, before[name])}
    assert {"key.weight", "query.weight", "gates.weight", "value.weight"} <= {
        name.rpartition("memory.")[2] for name in moved
    }
    assert all(".memory." in name for name in moved)
    saved = load(tiny.body, tmp_path / "run" / "memory.safetensors", dtype=torch.float32).model
    assert all(torch.equal(x, memory_tensors(trainer.model)[name]) for name, x in memory_tensors(saved).items())
