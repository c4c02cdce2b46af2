"""Small models from nothing: the tasks ask what they state, runs learn and resume, the table says what was measured."""

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from accelerate.state import AcceleratorState
from titans.config import Architecture
from titans.training.scratch import trainer
from titans.training.scratch.__main__ import table
from titans.training.scratch.config import ScratchConfig, ablations
from titans.training.scratch.tasks import TASKS
from titans.training.scratch.trainer import LENGTHS, Scores, ScratchTrainer
from titans_client import cli

TINY = ScratchConfig(hidden_size=16, num_tokens=128, batch_size=4, num_steps=4, warmup_steps=1)


@pytest.fixture(autouse=True)
def _score_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "_SCORED_BATCHES", 1)


@pytest.mark.parametrize("task", sorted(TASKS))
def test_what_is_asked_was_stated_and_follows_the_same_token(task: str) -> None:
    tokens, targets = TASKS[task].sample(16, 128, torch.Generator().manual_seed(0))
    assert tokens.max() < TASKS[task].vocab_size
    for row, due in zip(tokens, targets, strict=True):
        asked = (due != -100).nonzero().flatten()
        assert len(asked)
        for place in asked[: 1 if task == "passkey" else None]:
            first = (row == row[place]).nonzero().flatten()[0]
            assert first < 96
            assert first + 1 < place
            assert row[first + 1] == due[place] == row[place + 1]


@pytest.mark.parametrize("architecture", get_args(Architecture))
def test_a_resumed_run_is_the_uninterrupted_one(
    architecture: Architecture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(TINY, architecture=architecture)
    whole = ScratchTrainer(config, tmp_path / "whole")
    scores = whole.train()
    cut = ScratchTrainer(config, tmp_path / "cut")
    stop_after(cut, 2, monkeypatch)
    resumed = ScratchTrainer(config, tmp_path / "cut", checkpointing=True)
    assert resumed.train() == scores
    assert [row["step"] for row in resumed.history] == [1, 2, 3, 4]
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def stop_after(run: ScratchTrainer, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    save = run._save

    def save_and_stop(scores: Scores) -> None:
        save(scores)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "_SAVE_EVERY", step)
        patch.setattr(run, "_save", save_and_stop)
        run.train()
    assert len(run.history) == step


def test_a_folder_with_a_run_of_other_settings_is_refused_and_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would go on with the old ones, under the name of the new."""
    scores = {name: dict.fromkeys(LENGTHS, 1.0) for name in ("memory on", "memory off")}
    monkeypatch.setattr(ScratchTrainer, "_train", lambda run: run._save(scores) or scores)
    asked = ["scratch", "mac", "--run", str(tmp_path)]
    folder = tmp_path / "mac-recall-all-0"
    assert cli.main([*asked, "--steps", "2"]) == 0
    assert cli.main([*asked, "--steps", "2"]) == 0
    before = (folder / "run.json").read_bytes()
    capsys.readouterr()
    for change, name in ((["--steps", "3"], "num_steps"), (["--mixed-precision", "bf16"], "mixed_precision")):
        assert cli.main([*asked, "--steps", "2", *change]) == 1
        error = f"{folder} has a run of another {name}: name another folder with --run"
        assert capsys.readouterr().err == f"titans: scratch: {error}\n"
    (tmp_path / "mac-recall-no-persistent-tokens-0").mkdir()
    (tmp_path / "mac-recall-no-persistent-tokens-0" / "trainer.pt").touch()  # of nobody knows what
    assert cli.main([*asked, "--steps", "2", "--ablations"]) == 1
    assert "does not tell what the run is of" in capsys.readouterr().err
    assert not (tmp_path / "mac-recall-deep-memory-0").exists(), "the first of them waits for all"
    with pytest.raises(ValueError, match="another hidden_size"):
        ScratchTrainer(replace(TINY, num_steps=2), folder)
    assert (folder / "run.json").read_bytes() == before


def test_a_folder_in_which_another_process_trains_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ScratchTrainer(TINY, tmp_path)
    monkeypatch.setattr(run, "_resume", ScratchTrainer(TINY, tmp_path).train)
    with pytest.raises(ValueError, match="another process is at work"):
        run.train()
    assert not (tmp_path / "trainer.pt").exists()


def test_a_log_is_there_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ScratchTrainer(TINY, tmp_path)
    run._save({})
    before = (tmp_path / "log.json").read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    run.history.append({"step": 1, "loss": 1.0})
    with pytest.raises(OSError, match="No space left"):
        run._save({})
    assert (tmp_path / "log.json").read_bytes() == before
    assert not torch.load(tmp_path / "trainer.pt", weights_only=True)["history"]


@pytest.mark.parametrize("architecture", get_args(Architecture))
@pytest.mark.parametrize("memory", ["all", "deep memory"])
def test_mixed_precision_stays_near_float32(architecture: Architecture, memory: str, tmp_path: Path) -> None:
    config = replace(ablations(TINY)[memory], architecture=architecture, num_steps=2)
    losses = []
    for precision in ("no", "bf16"):
        AcceleratorState._reset_state(reset_partial_state=True)  # the library has one precision a process
        run = ScratchTrainer(config, tmp_path / precision, mixed_precision=precision)
        run.train()
        losses.append([row["loss"] for row in run.history])
    AcceleratorState._reset_state(reset_partial_state=True)
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_every_parameter_is_trained(tmp_path: Path) -> None:
    for name, config in ablations(TINY).items():
        run = ScratchTrainer(config, tmp_path / name)
        before = [p.clone() for p in run.model.parameters()]
        run.config = replace(config, num_steps=2)
        run.train()
        after = zip(before, run.model.named_parameters(), strict=True)
        same = [name for old, (name, new) in after if new.numel() and torch.equal(old, new)]
        assert not same, f"{name}: {same}"


def test_the_table_shows_what_was_scored() -> None:
    scores = {"memory on": {"1x": 1.0, "2x": 0.995, "4x": 0.5}, "memory off": {"1x": 0.1, "2x": 0.1, "4x": 0.125}}
    heading, row, other = table("mac", [("no momentum", scores), ("deep, no forgetting", scores)]).splitlines()
    assert heading.split() == ["1x", "2x", "4x", "memory", "off,", "4x", "paper,", "table", "5"]
    assert row.split() == ["mac,", "no", "momentum", "100.0%", "99.5%", "50.0%", "12.5%", "87.1%"]
    assert other.split()[-2:] == ["12.5%", "-"]


@pytest.mark.parametrize("steps", ["0", "-1", "many"])
def test_a_run_has_a_step(steps: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["scratch", "mac", "--steps", steps, "--run", str(tmp_path / "run")]) == 2
    assert "--steps" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_two_processes_train_one_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    train = ["-m", "--", "titans.training.scratch", "lmm", "--steps", "2", "--run", str(tmp_path)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "1",
    }  # `accelerate launch` would start one
    done = subprocess.run([*launch, *train], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("lmm, all") == 1
    folder = tmp_path / "lmm-recall-all-0"
    log = json.loads((folder / "log.json").read_text())
    assert [row["step"] for row in log["history"]] == [1, 2]
    schedule = torch.load(folder / "trainer.pt", weights_only=True)["schedule"]
    assert schedule["last_epoch"] == 2, "the rate is of the step, however many processes take it"
    before = (folder / "trainer.pt").read_bytes()
    assert cli.main(["scratch", "lmm", "--steps", "2", "--run", str(tmp_path)]) == 1, "one process has other documents"
    assert "has a run of another num_processes" in capsys.readouterr().err
    assert (folder / "trainer.pt").read_bytes() == before
