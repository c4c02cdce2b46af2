"""Train a small model from nothing, and see what its memory is worth.

Documents are longer than attention's window, so what is asked for is in the memory or nowhere. A run is scored on
documents up to four times as long as those it was trained on, beside the control: the same model, its memories silent.
"""

import json
import math
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from titans.files import write_whole
from titans.model import TitansModel, next_token_loss
from titans.training.saving import save_whole
from titans.training.scratch.config import ScratchConfig
from titans.training.scratch.tasks import TASKS
from titans.training.settings import check_run, claimed

_SAVE_EVERY = 100  # steps
_SCORED_BATCHES = 8
LENGTHS = {"1x": 1, "2x": 2, "4x": 4}  # of a scored document, in lengths of training
Scores = dict[str, dict[str, float]]  # "memory on" and "memory off", by length: "1x", "2x", "4x"


class Reader(nn.Module):
    """Tokens of whole documents to scores, each token learnt before the next is read."""

    def __init__(self, model: TitansModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens_BT: Tensor, *, recall: bool = True) -> Tensor:
        """[B, T] to [B, T, N]."""
        stream = self.model.open(self.model.new_state(tokens_BT.shape[0]), write=True, recall=recall)
        h_BTD, _ = self.model(tokens_BT, stream)
        return self.model.logits(h_BTD)


class ScratchTrainer:
    """One run: resumable, on as many devices as `accelerate launch` or `torchrun` starts it on."""

    def __init__(
        self, config: ScratchConfig, run: Path, *, checkpointing: bool = False, mixed_precision: str = "no"
    ) -> None:
        """Goes on with what the folder `run` has. Raises ValueError where that is a run of other settings."""
        self.config, self.run = config, run
        self.accelerator = Accelerator(mixed_precision=mixed_precision)
        processes = {"num_processes": self.accelerator.num_processes}  # which decides what documents there are
        self.settings = settings(config, mixed_precision) | processes
        check_run(run, self.settings)
        torch.manual_seed(config.seed)
        model = TitansModel(config.model())
        initialize(model)
        model.checkpointing = checkpointing
        decayed = [p for p in model.parameters() if p.ndim > 1]
        other = [p for p in model.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": other, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98))
        # Not prepared: a prepared schedule steps once for each process, but every process takes all of the steps.
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._share)
        self.model, self.optimizer = self.accelerator.prepare(Reader(model), optimizer)
        self.history: list[dict[str, Any]] = []

    def train(self) -> Scores:
        """To the end of the run; returns its scores, which are in `run/log.json` too.

        Raises ValueError where another process is at work in the folder.
        """
        with claimed(self.run, self.settings) if self.accelerator.is_main_process else nullcontext():
            return self._train()

    def _train(self) -> Scores:
        self._resume()
        first = len(self.history)
        bar = tqdm(range(first, self.config.num_steps), initial=first, total=self.config.num_steps, unit="step")
        for step in bar:
            tokens, targets = sample(self.config, self.config.num_tokens, self._seed(step))
            device = self.accelerator.device
            loss = next_token_loss(self.model(tokens.to(device)), targets.to(device))
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_norm)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.history.append({"step": step + 1, "loss": loss.item()})
            bar.set_postfix(loss=f"{loss.item():.3f}")
            if (step + 1) % _SAVE_EVERY == 0 or step + 1 == self.config.num_steps:
                self._save({})
        reader = self.accelerator.unwrap_model(self.model)
        scores = {
            name: {length: score(reader, self.config, factor, recall=recall) for length, factor in LENGTHS.items()}
            for name, recall in (("memory on", True), ("memory off", False))
        }
        self._save(scores)
        return scores

    def _seed(self, step: int) -> int:
        """Of a step's documents: no two steps, runs or processes have the same."""
        count: int = self.accelerator.num_processes
        index: int = self.accelerator.process_index
        return (self.config.seed * 1_000_000 + step) * count + index

    def _share(self, step: int) -> float:
        warm = min(1.0, (step + 1) / self.config.warmup_steps)
        return warm * (0.05 + 0.475 * (1 + math.cos(math.pi * min(1.0, step / self.config.num_steps))))

    def _save(self, scores: Scores) -> None:
        if not self.accelerator.is_main_process:
            return
        fields = {
            "model": self.accelerator.unwrap_model(self.model).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "history": self.history,
        }
        save_whole(fields, self.run / "trainer.pt")
        log = {"config": asdict(self.config), "scores": scores, "history": self.history}
        write_whole(self.run / "log.json", json.dumps(log, indent=1) + "\n")

    def _resume(self) -> None:
        path = self.run / "trainer.pt"
        if path.exists():
            fields = torch.load(path, map_location=self.accelerator.device, weights_only=True)
            self.accelerator.unwrap_model(self.model).load_state_dict(fields["model"])
            self.optimizer.load_state_dict(fields["optimizer"])
            self.schedule.load_state_dict(fields["schedule"])
            self.history = fields["history"]


def settings(config: ScratchConfig, mixed_precision: str) -> dict[str, Any]:
    """What a run is of, for its folder: with others it would be another run."""
    return asdict(config) | {"mixed_precision": mixed_precision}


@torch.no_grad()
def initialize(model: TitansModel) -> None:
    """Weights to train from: matrices of unit gain, and a tenth of it for what goes back to the residual.

    So the residual is the tokens at first, and what a memory learns from it is worth learning.
    """
    for name, parameter in model.named_parameters():
        if ".memory." in name or "persistent" in name or parameter.ndim < 2:
            continue
        gain = 0.1 if name.endswith(("out.weight", "down.weight")) else 1.0
        parameter.normal_(std=gain * parameter.shape[1] ** -0.5)


def sample(config: ScratchConfig, num_tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """A batch of documents, a function of the seed alone."""
    return TASKS[config.task].sample(config.batch_size, num_tokens, torch.Generator().manual_seed(seed))


@torch.no_grad()
def score(reader: Reader, config: ScratchConfig, factor: int, *, recall: bool) -> float:
    """The share of documents' answers that are right to the last token, `factor` times as long as in training."""
    right = total = 0
    device = reader.model.device
    for batch in range(_SCORED_BATCHES):
        tokens, targets = sample(config, factor * config.num_tokens, -1 - batch)
        guesses = reader(tokens.to(device), recall=recall).argmax(-1).cpu()
        counts = targets != -100
        if config.task == "passkey":  # one answer a document
            right += int(((guesses == targets) | ~counts).all(1).sum())
            total += len(tokens)
        else:
            right += int((guesses == targets)[counts].sum())
            total += int(counts.sum())
    return right / total
