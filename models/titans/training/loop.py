"""The training loop: resumable, with a log of losses and of generated answers."""

import json
import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from titans.checkpoint import read_memory, save_memory
from titans.files import write_whole
from titans.memory.neural import MemoryState, NeuralMemory
from titans.model import TitansModel, next_token_loss
from titans.packed import pack_memories
from titans.training.batch import Batch, Recalls, Rows, make_batch
from titans.training.config import Stage, TrainingConfig
from titans.training.keys import away_from_half, teach_keys, teach_values, unit, value_loss
from titans.training.pool import Pool
from titans.training.saving import save_whole
from titans.training.score import Scorer

_SAVE_EVERY = 20  # steps
_STRENGTHS = (1.0, 1.2, 1.4, 1.6, 1.8)
_STRENGTH_BATCHES = 6
_FIRST_MOMENTUM = -3.0  # of its gate, before the sigmoid
_SHUT = 1e-4  # a step size below which a million tokens do no harm
_TOLD = 96  # tokens of a stretch of text that are told from their values
_SEGMENT = 512  # tokens between two states that are kept for the backward pass; longer is slower on a CPU


@dataclass(frozen=True)
class Losses:
    """Of one step."""

    recall: Tensor  # nats a token of all that was stated, read straight from the memory
    recalled: float  # share of it of which every token came first
    opening: Tensor  # mean step size at plain text, which is not asked for
    leak: Tensor  # nats by which it is above what does no harm
    missed: Tensor  # nats by which step sizes at what was stated are away from a half
    told: Tensor  # nats a token, of any text and of the facts: told from their own values and noise
    answer: Tensor | None = None  # nats a token of the answers
    lead: Tensor | None = None  # nats a token of what stands before an answer
    text: Tensor | None = None  # nats a token of plain text
    names: Tensor | None = None  # nats a token of its names that the window does not show; 0 where there are none
    right: float | None = None  # share of answers of which every token came first (teacher-forced)

    def figures(self) -> dict[str, float]:
        """What there is, as numbers."""
        figures = {name: value for name, value in vars(self).items() if value is not None}
        return {name: value.item() if isinstance(value, Tensor) else value for name, value in figures.items()}


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
        model.requires_grad_(False)
        (self.memory,) = model.memories
        self.body_digest = body_digest
        self.step = 0
        self._maker = ThreadPoolExecutor(1)
        self._coming: dict[int, Future[Batch]] = {}  # by step
        self.history: list[dict[str, Any]] = []
        values = [q.targets[q.start : q.start + q.answer] for q in pool.questions]
        self.alphabet = torch.cat(values).unique().to(model.device)
        self.others = pool.haystack_tokens.unique()
        self.letters = unit(model.embedding.weight[self.alphabet])  # [A, D]
        size = model.config.backbone.hidden_size
        self.readout = nn.Linear(size, size, device=model.device)
        nn.init.normal_(self.readout.weight, std=0.1 / size)
        self.memory.float().requires_grad_(True)
        self.direct = model.readout  # learns with the body
        self.adapted = nn.ParameterList(model.adapted.values())  # and so does this
        self.optimizer = torch.optim.AdamW(self._groups(), betas=(0.9, 0.98))

    def train(self, start: Path | None = None) -> None:
        """From where the run stands to its end; the memory is then in `run/memory.safetensors`.

        `start`: what `save_memory` wrote, to begin a run with. Raises CheckpointError where it does not fit.
        """
        resumed = self._resume()
        if start is not None and not resumed:
            read_memory(self.model, start)
        if self.config.is_memory_fixed:
            pack_memories(self.model)
        if not resumed:
            if start is None:
                calibrate(self.memory, self.pool.haystack)
            else:
                self._start_readout()
            self._first_lessons()
            self._save()
        self._renew_tails()  # the pool has those of the body as it was
        bar = tqdm(total=self.config.num_steps, initial=self.step, desc="train", unit="step")
        while self.step < self.config.num_steps:
            stage = self.config.stage_at(self.step)
            row = {"tokens": stage.num_tokens} | self._take_step(stage)
            self.step += 1
            ends = self.step == self.config.num_steps or self.config.stage_at(self.step) != stage
            if self.step % _SAVE_EVERY == 0 or ends:
                row |= {f"held_out_{name}": value for name, value in self._check(stage).items()}
                if ends and stage.num_questions:
                    row["generated"] = self.scorer.score(self.model, stage.num_tokens)
                tqdm.write(f"step {self.step}: " + ", ".join(f"{name} {value:.3f}" for name, value in row.items()))
            self.history.append({"step": self.step} | row)
            bar.set_postfix({name: f"{value:.2f}" for name, value in row.items()})
            bar.update()
            if self.step % _SAVE_EVERY == 0 or ends:
                self._save()
                self._renew_tails()
        bar.close()
        if self.config.joint.answers:
            tqdm.write(f"strength: {self._set_strength()}")
        save_memory(self.model, self.body_digest, self.run / "memory.safetensors")

    def _first_lessons(self) -> None:
        if self.config.key_steps:
            tqdm.write(f"keys: {teach_keys(self.memory, self.pool, self.config):.3f} nats")
        if self.config.value_steps:
            embedding = self.model.embedding.weight
            told = teach_values(self.memory, self.readout, embedding, self.pool, self.config)
            tqdm.write(f"values: {told:.3f} nats")

    def losses(self, batch: Batch) -> Losses:
        """Learn the documents, give back all they stated, answer the rows."""
        memory = self._learn(batch.documents)
        recall, recalled = self._recall(memory, batch.recalls)
        theta = self.memory.writes(batch.plain).theta
        opening, leak = theta.mean(), (theta / _SHUT).log1p().mean()
        missed = away_from_half(self.memory.writes(batch.recalls.stated), batch.recalls.answers != -100)
        first = (recall, recalled, opening, leak, missed, self._tell(batch))
        return Losses(*first, *self._answer(memory, batch.rows)) if batch.rows else Losses(*first)

    def _tell(self, batch: Batch) -> Tensor:
        """The lesson in values goes on, so that words which no fact has are not unlearnt."""
        plain = batch.plain[:, : self.config.context + _TOLD], batch.plain_tokens[:, self.config.context :][:, :_TOLD]
        said = [(batch.recalls.stated, batch.recalls.answers), plain]
        chance = torch.Generator().manual_seed(self.config.seed + self.step)
        embedding = self.model.embedding.weight
        return value_loss(self.memory, self.readout, said, embedding=embedding, others=self.others, chance=chance)

    def _recall(self, memory: MemoryState, recalls: Recalls) -> tuple[Tensor, float]:
        """Every fact, asked or not, by a readout of what the memory answers: one matrix, then the body's embedding.

        The layers above take no part: this is the cheap signal that teaches keys, queries, values and gates.
        """
        counts = recalls.answers != -100
        y = self._read(memory, recalls)
        logits = self.readout(F.rms_norm(y, y.shape[-1:])) @ self.letters.T
        targets = torch.searchsorted(self.alphabet, recalls.answers[counts])
        wrong = torch.zeros_like(counts)
        wrong[counts] = logits.argmax(-1) != targets
        return next_token_loss(logits, targets), 1 - wrong.any(1).float().mean().item()

    def _read(self, memory: MemoryState, recalls: Recalls) -> Tensor:
        """What the memory answers wherever a value's token is asked for: [tokens, D], float32."""
        context = recalls.asking.shape[1] - recalls.answers.shape[1]
        recent = torch.zeros_like(memory.recent[recalls.document_of])
        y, _ = self.memory.read(recalls.asking, memory.weights[recalls.document_of], recent)
        return y[:, context:][recalls.answers != -100].float()

    @torch.no_grad()
    def _start_direct(self, batch: Batch) -> None:
        """Let the model's readout begin with what the lesson alone has learnt, at the usual size of an answer."""
        if self.direct is not None:
            self.direct.weight.copy_(self.readout.weight / self._size(batch))

    @torch.no_grad()
    def _start_readout(self) -> None:
        """The other way: let the lesson begin with the model's readout, if it has one."""
        if self.direct is not None:
            batch = make_batch(self.pool, self.config, self.config.stages[0], 0).to(self.model.device)
            self.readout.weight.copy_(self.direct.weight * self._size(batch))

    def _size(self, batch: Batch) -> Tensor:
        """What the sizes of an answer and of an embedding come to, which the lesson takes out."""
        y = self._read(self._learn(batch.documents), batch.recalls)
        letters = self.model.embedding.weight[self.alphabet].float()
        return y.square().mean(-1).sqrt().median() * letters.square().mean(-1).sqrt().mean()

    def _answer(self, memory: MemoryState, rows: Sequence[Rows]) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        """The questions and the plain text, through the layers above: answers, leads, text and names in nats a token.

        And the share of the answers that is right.
        """
        nats: dict[str, list[Tensor]] = {"answer": [], "lead": [], "text": [], "names": []}
        right: list[Tensor] = []
        for some in rows:
            logits, counts = self._score(memory, some)
            targets, is_answer = some.targets[counts], some.is_answer[counts]
            asked = some.is_answer.any(1)
            of_question = asked[:, None].expand_as(counts)[counts]
            loss = F.cross_entropy(logits, targets, reduction="none")
            nats["answer"].append(loss[is_answer])
            nats["lead"].append(loss[of_question & ~is_answer])
            nats["text"].append(loss[~of_question])
            nats["names"].append(loss[some.is_name[counts]])
            wrong = torch.zeros_like(counts)
            wrong[counts] = (logits.argmax(-1) != targets) & is_answer
            right.append(~wrong[asked].any(1))
        *all_there, names = (torch.cat(each) for each in nats.values())
        answer, lead, text = (each.mean() for each in all_there)
        return answer, lead, text, names.sum() / max(1, len(names)), torch.cat(right).float().mean().item()

    def _score(self, memory: MemoryState, rows: Rows) -> tuple[Tensor, Tensor]:
        """The scores of every token that counts, and which those are [R, S]."""
        num_tokens = rows.hidden.shape[1]
        joined = torch.cat((rows.before, rows.hidden), dim=1)
        recent = torch.zeros_like(memory.recent[rows.document_of])
        kept = memory.kept[rows.document_of]  # what nobody has told is as faint as it will be
        y, _ = self.memory.read(joined, memory.weights[rows.document_of], recent, kept=kept)
        y = y[:, -num_tokens:]
        h = rows.hidden + y
        call = self.model.place(rows.position, None, num_tokens)
        for layer, parts in zip(self.model.upper, rows.parts(), strict=True):
            h, _ = layer(h, call, parts)
        counts = rows.targets != -100
        return self.model.logits(self.model.finish(h[counts], y[counts])), counts

    @torch.no_grad()
    def _check(self, stage: Stage) -> dict[str, float]:
        """The same on facts that training never saw."""
        batch = make_batch(self.pool, self.config, stage, self.step, held_out=True)
        return self.losses(batch.to(self.model.device)).figures()

    @torch.no_grad()
    def _set_strength(self) -> float:
        """Scale the memory's answers as suits facts that training never saw, and return the factor.

        A query made of new words is less like its key than one that was trained on, so what it reads is weaker.
        """
        longest = max(self.config.stages, key=lambda stage: (stage.num_questions > 0, stage.num_tokens))
        steps = range(self.config.num_steps, self.config.num_steps + _STRENGTH_BATCHES)
        learnt: list[tuple[MemoryState, Sequence[Rows]]] = []
        for step in steps:
            batch = make_batch(self.pool, self.config, longest, step, held_out=True).to(self.model.device)
            assert batch.rows, "the last lesson is with the body"
            learnt.append((self._learn(batch.documents), batch.rows))
        trained = self.memory.out.weight.clone()

        def loss(strength: float) -> float:
            self.memory.out.weight.copy_(strength * trained)
            asked = [self._answer(memory, rows) for memory, rows in learnt]
            return sum((answer + self.config.text_weight * text).item() for answer, _, text, *_ in asked)

        best = min(_STRENGTHS, key=loss)
        self.memory.out.weight.copy_(best * trained)
        return best

    def _learn(self, documents: Tensor) -> MemoryState:
        """The memory after each document, settled; activations are kept for one segment at a time."""
        state = self.memory.new_state(documents.shape[0], documents.dtype)
        for segment in documents.split(_SEGMENT, dim=1):
            if documents.shape[1] <= _SEGMENT:
                state = self.memory.write(segment, state)
            else:
                state = MemoryState(*checkpoint(self.memory.write, segment, state, use_reentrant=False))
        return state._replace(weights=self.memory.settle(state))

    def _take_step(self, stage: Stage) -> dict[str, float]:
        self._set_rates(stage)
        batch = self._batch().to(self.model.device)
        if batch.rows and self.step and not self.config.lesson_at(self.step)[0]:  # the lesson alone has just ended
            self._start_direct(batch)
        losses = self.losses(batch)
        loss = self.config.recall_weight * losses.recall + self.config.opening_weight * losses.opening
        loss = loss + self.config.leak_weight * losses.leak + self.config.missed_weight * losses.missed
        loss = loss + self.config.told_weight * losses.told
        if losses.answer is not None and losses.lead is not None:
            loss = loss + losses.answer + self.config.lead_weight * losses.lead
        if losses.text is not None and losses.names is not None:
            loss = loss + self.config.text_weight * losses.text + self.config.name_weight * losses.names
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self._parameters(), self.config.max_norm)
        if math.isfinite(norm.item()):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return losses.figures()

    def _batch(self) -> Batch:
        """This step's; while it is learnt from, a thread puts the next one together."""

        def make(step: int) -> Batch:
            return make_batch(self.pool, self.config, self.config.stage_at(step), step)

        batch = self._coming.pop(self.step, None) or self._maker.submit(make, self.step)
        following = range(self.step + 1, self.config.num_steps)[:1]
        self._coming = {step: self._maker.submit(make, step) for step in following}
        return batch.result()

    def _set_rates(self, stage: Stage) -> None:
        rates, share = vars(self.config.joint if stage.num_questions else self.config.alone), self._schedule()
        for group in self.optimizer.param_groups:
            group["lr"] = rates[group["kind"]] * share
            for parameter in group["params"]:
                parameter.requires_grad_(rates[group["kind"]] > 0)

    def _parameters(self) -> list[nn.Parameter]:
        direct = () if self.direct is None else self.direct.parameters()
        return [*self.memory.parameters(), *self.readout.parameters(), *direct, *self.adapted]

    def _groups(self) -> list[dict[str, Any]]:
        groups: dict[str, list[nn.Parameter]] = {kind: [] for kind in vars(self.config.alone)}
        for name, parameter in self.memory.named_parameters():
            groups[kind_of(name)].append(parameter)
        groups["readout"] += self.readout.parameters()
        groups["answers"] += () if self.direct is None else self.direct.parameters()
        groups["body"] += self.adapted
        decay = dict.fromkeys(("keys", "values", "answers"), self.config.weight_decay)
        return [
            {"params": params, "kind": kind, "weight_decay": decay.get(kind, 0.0)}
            for kind, params in groups.items()
            if params
        ]

    def _schedule(self) -> float:
        step, num_steps = self.config.lesson_at(self.step)
        warm = min(1.0, (step + 1) / self.config.warmup_steps)
        return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / num_steps)))

    @torch.no_grad()
    def _renew_tails(self) -> None:
        """Where the layers above the memory learn too: what they make of the text before a question, as they are."""
        if self.adapted and self.config.stage_at(self.step).num_questions:
            self._coming = {}
            self.pool = self.pool.renewed(self.model)

    def _save(self) -> None:
        """Each file whole or as it was; that which a run goes on from is the last, and needs no other."""
        save_memory(self.model, self.body_digest, self.run / "memory.safetensors")
        log = {"config": asdict(self.config), "history": self.history}
        write_whole(self.run / "log.json", json.dumps(log, indent=1) + "\n")
        fields: dict[str, object] = {"step": self.step, "history": self.history}
        save_whole(fields | {name: x.state_dict() for name, x in self._learners().items()}, self.run / "trainer.pt")

    def _learners(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        direct = {} if self.direct is None else {"direct": self.direct}
        ours = {"memory": self.memory, "readout": self.readout, "adapted": self.adapted}
        return {**ours, "optimizer": self.optimizer, **direct}

    def _resume(self) -> bool:
        """Go on where the run was saved last, if it was."""
        path = self.run / "trainer.pt"
        if not path.exists():
            return False
        fields = torch.load(path, map_location=self.model.device, weights_only=True)
        self.step, self.history = fields["step"], fields["history"]
        for name, learner in self._learners().items():
            learner.load_state_dict(fields[name])
        return True


def kind_of(name: str) -> str:
    """Which learning rate a parameter of the memory has."""
    if any(part in name for part in ("gates", "conv", "norm", "center")):
        return "gates"
    if name.startswith(("query", "key")):
        return "keys"
    return "answers" if name.startswith("out") else "values"


@torch.no_grad()
def calibrate(memory: NeuralMemory, hidden: Tensor) -> None:
    """Let every dimension of the body's hidden states have mean 0 and weight 1 in the memory, in and out.

    A few of them are larger than all others together and mean little (Sun et al. 2024, "Massive Activations").
    """
    sample = hidden.flatten(0, -2)[::16].to(memory.center.device).float()
    unit = sample / sample.square().mean(-1, keepdim=True).sqrt()
    memory.norm.weight.copy_(unit.std(0).reciprocal())
    memory.center.copy_(unit.mean(0) / unit.std(0))
    memory.out.weight.mul_(sample.std(0)[:, None])
    if memory.config.momentum:  # the first lesson knows none
        memory.gates.bias[-memory.config.num_heads * memory.config.depth :] = _FIRST_MOMENTUM
