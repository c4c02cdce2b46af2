"""First lessons, on cached states alone: under which keys to write, and what. Minutes instead of hours.

Keys. A fact is found only if the query after its question is nearer to the fact's own key than to all others. Learnt
through the memory and the layers above it, that takes hundreds of steps, since each question asked tells of one
pair; here each of them tells of every pair in the batch (InfoNCE, van den Oord et al. 2018). And a memory that writes
every word is soon full: the step size theta starts out large on what is asked for and small on all else.

Values. What is written is what the token is: any token of any text must be told from its own value, and through the
noise that other facts add when it is read. So words that no fact of training has are remembered as well.
"""

import math
import random

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from titans.memory.neural import NeuralMemory
from titans.model import next_token_loss
from titans.training.batch import CONTEXT, Recalls, choose, make_recalls
from titans.training.config import TrainingConfig
from titans.training.pool import Pool

_FACTS = 256  # a step
_STRETCHES = 64  # of plain text a step, whose keys no question means
_TEMPERATURE = 0.15  # lower: other keys are let come too near; higher: the own key is not found
_OPENING_WEIGHT = 10.0  # of the step size at plain text
_WARMUP = 20
_GATE_FACTOR = 3.0  # gates and convolutions learn faster
_NOISE = 0.7  # added to values, as a share of their size
_READOUT_FACTOR = 3.0
_PLAIN = 48  # tokens of a stretch that are told from their values, context included
_OTHER_TOKENS = 2_048  # besides a step's own, between which it is decided


def teach_keys(memory: NeuralMemory, pool: Pool, config: TrainingConfig) -> float:
    """Train keys, queries and the step size. Returns the last loss, in nats."""
    rng = random.Random(config.seed)
    taps = [memory.query_conv, memory.key_conv, memory.norm.weight, memory.center, *memory.gates.parameters()]
    groups = [
        {"params": [memory.query.weight, memory.key.weight], "factor": 1.0},
        {"params": taps, "factor": _GATE_FACTOR},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    device, loss = memory.key.weight.device, torch.tensor(0.0)
    for step in tqdm(range(config.key_steps), desc="keys", unit="step"):
        recalls = _some_facts(pool, config, rng).to(device)
        loss = _loss(memory, recalls, pool.stretches(_STRETCHES, recalls.stated.shape[1], rng).to(device))
        _descend(optimizer, loss, config.key_learning_rate * _schedule(step, config.key_steps))
    return loss.item()


def teach_values(
    memory: NeuralMemory, readout: nn.Linear, embedding: Tensor, pool: Pool, config: TrainingConfig
) -> float:
    """Train values, what becomes of them, and the readout. Returns the last loss, in nats a token.

    `embedding` [N, D]: the body's. Only what the readout makes of an answer is scored; it is in the embedding's space.
    """
    rng, noise = random.Random(config.seed), torch.Generator().manual_seed(config.seed)
    groups = [
        {"params": [memory.value.weight, memory.out.weight], "factor": 1.0},
        {"params": [*readout.parameters()], "factor": _READOUT_FACTOR},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    device, loss, common = embedding.device, torch.tensor(0.0), pool.haystack_tokens.unique()
    for step in tqdm(range(config.value_steps), desc="values", unit="step"):
        recalls = _some_facts(pool, config, rng)
        plain, tokens = pool.stretches_with_tokens(_STRETCHES, _PLAIN, rng)
        hidden = [(recalls.stated, recalls.answers), (plain, tokens[:, CONTEXT:])]
        targets = torch.cat([own[own != -100] for _, own in hidden])
        letters = torch.cat((targets, common[torch.randint(len(common), (_OTHER_TOKENS,), generator=noise)])).unique()
        y = torch.cat([_answers(memory, h.to(device), noise)[(own != -100).to(device)] for h, own in hidden])
        logits = readout(F.rms_norm(y, y.shape[-1:])) @ unit(embedding[letters.to(device)]).T
        loss = next_token_loss(logits, torch.searchsorted(letters, targets).to(device))
        _descend(optimizer, loss, config.value_learning_rate * _schedule(step, config.value_steps))
    return loss.item()


def unit(letters: Tensor) -> Tensor:
    """Embeddings, all of one size: [A, D], float32."""
    return F.rms_norm(letters.float(), letters.shape[-1:], eps=1e-6)


def _answers(memory: NeuralMemory, hidden: Tensor, noise: torch.Generator) -> Tensor:
    """What the memory would answer if it gave back each token's own value, and noise: [B, T - context, D]."""
    values = memory.writes(hidden).values
    size = values.detach().square().mean().sqrt()
    values = values + _NOISE * size * torch.randn(values.shape, generator=noise).to(values.device)
    return memory.answer(values, hidden[:, CONTEXT:]).float()


def _some_facts(pool: Pool, config: TrainingConfig, rng: random.Random) -> Recalls:
    runs = choose(range(len(pool.statements) - config.held_out_facts), _FACTS, rng)
    return make_recalls(pool, [(fact, 0) for run in runs for fact in run], rng)


def _schedule(step: int, num_steps: int) -> float:
    return min(1, (step + 1) / _WARMUP) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / num_steps)))


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _loss(memory: NeuralMemory, recalls: Recalls, plain: Tensor) -> Tensor:
    """Each token of each value is to find its own key among all; facts alone are written."""
    wanted, unwanted = memory.writes(recalls.stated), memory.writes(plain)
    counts = recalls.answers != -100
    queries, keys = (x.transpose(0, 1)[:, counts] for x in (memory.queries(recalls.asking), wanted.keys))
    others = unwanted.keys.transpose(0, 1).flatten(1, 2)
    similar = queries @ torch.cat((keys, others), dim=1).transpose(1, 2)  # [H, Q, all keys]
    own = torch.arange(keys.shape[1], device=keys.device).expand(len(keys), -1)
    found = F.cross_entropy(similar.flatten(0, 1) / _TEMPERATURE, own.flatten())
    theta = wanted.theta.flatten(1, 2).transpose(1, 2)[counts]
    half = 0.5 * (theta * (1 - theta)).log().mean()
    return found - half - _OPENING_WEIGHT * (1 - unwanted.theta).log().mean()
