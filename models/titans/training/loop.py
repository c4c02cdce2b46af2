"""The training loop: resumable, with a log of losses and of generated answers."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from titans.checkpoint import save_memory
from titans.memory.linear import LinearMemory, MemoryState
from titans.model import TitansModel, next_token_loss
from titans.training.batch import Batch, Recalls, make_batch
from titans.training.config import TrainingConfig
from titans.training.keys import teach_keys
from titans.training.pool import Pool
from titans.training.score import Scorer

_SEGMENT = 512  # tokens between two states that are kept for the backward pass; longer is slower on a CPU


@dataclass(frozen=True)
class Losses:
    """Of one step."""

    answer: Tensor  # nats a token of the answers
    text: Tensor  # nats a token of plain text
    recall: Tensor  # relative squared error of what the memory gives back
    right: float  # share of answers of which every token came first (teacher-forced)


class Trainer:
    """Trains a model's memory; the body is frozen."""

    def __init__(
        self,
        model: TitansModel,
        body_digest: str,
        *,
        pool: Pool,
        config: TrainingConfig,
        scorer: Scorer,
        run: Path,
    ) -> None:
        self.model, self.pool, self.config, self.scorer, self.run = model, pool, config, scorer, run
        self.body_digest = body_digest
        self.step = 0
        self.history: list[dict[str, Any]] = []
        model.requires_grad_(False)
        model.memory.float().requires_grad_(True)
        fast = [
            p for n, p in model.memory.named_parameters() if any(x in n for x in ("gate", "conv", "norm", "center"))
        ]
        slow = [p for n, p in model.memory.named_parameters() if not any(p is f for f in fast)]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": slow, "factor": 1.0, "weight_decay": config.weight_decay},
                {"params": fast, "factor": config.gate_factor, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(0.9, 0.98),
        )

    def train(self) -> None:
        """From where the run stands to its end; the memory is then in `run/memory.safetensors`."""
        if not self._resume():
            calibrate(self.model.memory, self.pool.haystack)
            tqdm.write(f"keys: {teach_keys(self.model.memory, self.pool, self.config):.3f} nats")
        bar = tqdm(total=self.config.num_steps, initial=self.step, desc="train", unit="step")
        while self.step < self.config.num_steps:
            stage = self.config.stage_at(self.step)
            losses = self._take_step(make_batch(self.pool, self.config, stage, self.step).to(self.model.device))
            self.step += 1
            row = {"step": self.step, "tokens": stage.num_tokens, "answer": losses.answer.item()}
            row |= {"text": losses.text.item(), "recall": losses.recall.item(), "right": losses.right}
            if self.step == self.config.num_steps or self.config.stage_at(self.step) != stage:
                row["generated"] = self.scorer.score(self.model, stage.num_tokens)
                tqdm.write(f"step {self.step}: generated exact match {row['generated']}")
            self.history.append(row)
            bar.set_postfix({name: f"{row[name]:.2f}" for name in ("answer", "text", "recall", "right")})
            bar.update()
            if self.step % 20 == 0 or "generated" in row:
                self._save()
        bar.close()

    def losses(self, batch: Batch) -> Losses:
        """Learn the documents, answer the rows."""
        memory, rows = self._learn(batch.documents), batch.rows
        y, _ = self.model.memory.read(rows.hidden, _of(memory, rows.document_of, rows.hidden))
        num_rows, num_tokens = rows.targets.shape
        block = self.model.place(num_tokens, offset=4 * self.model.config.window, batch=num_rows)
        h = self.model.upper(rows.hidden + y * rows.asks.to(y.dtype), block, None)
        counts = rows.targets != -100
        logits, targets, is_answer = self.model.logits(h[counts]), rows.targets[counts], rows.is_answer[counts]
        wrong = torch.zeros_like(counts)
        wrong[counts] = (logits.argmax(-1) != targets) & is_answer
        asked = rows.is_answer.any(1)
        return Losses(
            next_token_loss(logits[is_answer], targets[is_answer]),
            next_token_loss(logits[~is_answer], targets[~is_answer]),
            self._recall_error(memory, batch.recalls),
            1 - wrong[asked].any(1).float().mean().item(),
        )

    def _recall_error(self, memory: MemoryState, recalls: Recalls) -> Tensor:
        """How far the memory's answers are from the values it was told, of every fact, asked or not.

        1: no better than the mean answer. The layers above take no part: this is the cheap signal that teaches
        keys, queries and gates.
        """
        values = self.model.memory.writes(recalls.stated).values.detach()
        reads = self.model.memory.queries(recalls.asking) @ memory.weights[recalls.document_of]
        spread = (values - values.mean(0)).square().mean((0, 2, 3))
        return ((reads - values).square().mean((0, 2, 3)) / spread).mean()

    def _learn(self, documents: Tensor) -> MemoryState:
        """The memory after each document; activations are kept for one segment at a time."""
        model = self.model
        config, size = model.config.memory, model.config.backbone.hidden_size
        state = MemoryState.zeros(config, size, documents.shape[0], documents.dtype, documents.device)
        if documents.shape[1] <= _SEGMENT:
            return model.memory.write(documents, state)
        for segment in documents.split(_SEGMENT, dim=1):
            state = MemoryState(*checkpoint(model.memory.write, segment, state, use_reentrant=False))
        return state

    def _take_step(self, batch: Batch) -> Losses:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * group["factor"] * self._schedule()
        losses = self.losses(batch)
        loss = losses.answer + self.config.text_weight * losses.text + self.config.recall_weight * losses.recall
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.memory.parameters(), self.config.max_norm)
        if math.isfinite(norm.item()):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return losses

    def _schedule(self) -> float:
        warm = min(1.0, (self.step + 1) / self.config.warmup_steps)
        return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * self.step / self.config.num_steps)))

    def _save(self) -> None:
        part = self.run / "trainer.part"
        fields = {"step": self.step, "memory": self.model.memory.state_dict()}
        torch.save(fields | {"optimizer": self.optimizer.state_dict()}, part)
        part.replace(self.run / "trainer.pt")
        save_memory(self.model, self.body_digest, self.run / "memory.safetensors")
        log = {"config": asdict(self.config), "history": self.history}
        (self.run / "log.json").write_text(json.dumps(log, indent=1) + "\n")

    def _resume(self) -> bool:
        """Go on where the run was saved last, if it was."""
        path = self.run / "trainer.pt"
        if not path.exists():
            return False
        fields = torch.load(path, map_location=self.model.device, weights_only=True)
        self.step = fields["step"]
        self.model.memory.load_state_dict(fields["memory"])
        self.optimizer.load_state_dict(fields["optimizer"])
        self.history = json.loads((self.run / "log.json").read_text())["history"]
        return True


@torch.no_grad()
def calibrate(memory: LinearMemory, hidden: Tensor) -> None:
    """Let every dimension of the body's hidden states have mean 0 and weight 1 in the memory, in and out.

    A few of them are larger than all others together and mean little (Sun et al. 2024, "Massive Activations").
    """
    sample = hidden.flatten(0, -2)[::16].float()
    unit = sample / sample.square().mean(-1, keepdim=True).sqrt()
    memory.norm.weight.copy_(unit.std(0).reciprocal())
    memory.center.copy_(unit.mean(0) / unit.std(0))
    memory.out.weight.mul_(sample.std(0)[:, None])


def _of(memory: MemoryState, document_of: Tensor, hidden: Tensor) -> MemoryState:
    """Each row's memory; its convolutions begin with the row."""
    recent = torch.zeros_like(hidden[:, : memory.recent.shape[1]])
    return MemoryState(memory.weights[document_of], memory.momentum[document_of], recent)
