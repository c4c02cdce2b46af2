"""The recipe on a tiny body: it learns, and a run that was cut goes on as if it had not been."""

from pathlib import Path

import pytest
import torch
from support.models import TinyCheckpoint, write_tiny_checkpoint
from titans.backbone import load_backbone
from titans.checkpoint import digest, load
from titans.evaluation.facts import make_facts
from titans.model import TitansModel
from titans.training.batch import make_batch
from titans.training.config import Stage, TrainingConfig
from titans.training.loop import Trainer
from titans.training.pool import Pool, load_pool
from titans.training.score import Scorer

TEXT = Path(__file__).parents[2] / "examples" / "sherlock-holmes.txt"
CONFIG = TrainingConfig(
    key_steps=6,
    num_facts=256,
    haystack_tokens=4_096,
    num_questions=8,
    warmup_steps=2,
    learning_rate=1e-2,
    stages=(Stage(400, 4, 3, 2), Stage(600, 4, 3, 2)),
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def pool(tiny: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    loaded, folder = load_tiny(tiny), tmp_path_factory.mktemp("pool")
    first = load_pool(loaded, load_backbone(tiny.body).tokenizer, [TEXT, TEXT], CONFIG, folder / "pool.pt")
    again = load_pool(loaded, load_backbone(tiny.body).tokenizer, [], CONFIG, folder / "pool.pt")
    assert torch.equal(first.haystack, again.haystack)
    return again


def load_tiny(tiny: TinyCheckpoint) -> TitansModel:
    return load(tiny.body, tiny.memory, device=torch.device("cpu"), dtype=torch.float32).model


def make_trainer(tiny: TinyCheckpoint, pool: Pool, run: Path) -> Trainer:
    run.mkdir(exist_ok=True)
    scorer = Scorer(load_backbone(tiny.body).tokenizer, TEXT, num_facts=1)
    return Trainer(load_tiny(tiny), digest(tiny.body), pool=pool, config=CONFIG, scorer=scorer, run=run)


def test_cached_states_are_those_of_a_server(tiny: TinyCheckpoint, pool: Pool) -> None:
    model = load_tiny(tiny)
    state = model.ingest(pool.haystack_tokens[:1, :40], model.new_state())
    slots = torch.arange(40 - 16, 40) % 16
    torch.testing.assert_close(state.tail[0, slots], pool.haystack[0, 24:40], rtol=1e-4, atol=1e-4)


def test_training_lowers_the_loss_and_leaves_the_body_alone(tiny: TinyCheckpoint, pool: Pool, tmp_path: Path) -> None:
    trainer = make_trainer(tiny, pool, tmp_path / "run")
    before = {name: x.clone() for name, x in trainer.model.state_dict().items()}
    batch = make_batch(pool, CONFIG, CONFIG.stages[0], step=99)
    untrained = trainer.losses(batch).answer.item()
    trainer.train()
    assert trainer.losses(batch).answer.item() < untrained
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, before[name]) != name.startswith("memory."), name
    assert "generated" in trainer.history[-1]


def test_a_resumed_run_is_the_uninterrupted_one(tiny: TinyCheckpoint, pool: Pool, tmp_path: Path) -> None:
    whole = make_trainer(tiny, pool, tmp_path / "whole")
    whole.train()
    cut = make_trainer(tiny, pool, tmp_path / "cut")
    stop_after_first_stage(cut)
    resumed = make_trainer(tiny, pool, tmp_path / "cut")
    resumed.train()
    assert len(resumed.history) == CONFIG.num_steps
    for name, tensor in resumed.model.memory.state_dict().items():
        torch.testing.assert_close(tensor, whole.model.memory.state_dict()[name], rtol=1e-4, atol=1e-6)


def stop_after_first_stage(trainer: Trainer) -> None:
    save = trainer._save

    def save_and_stop() -> None:
        save()
        raise KeyboardInterrupt

    trainer._save = save_and_stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


def test_training_and_test_facts_share_no_word() -> None:
    import random

    def things(split: str) -> set[str]:
        facts = make_facts(300, split, random.Random(0))  # type: ignore[arg-type]
        return {word for f in facts for word in f.question.rstrip("?").split(" of the ")[-1].split()}

    assert not things("train") & things("test")
