"""First lesson, on cached states alone: under which keys to write, and what. Seconds instead of hours.

A fact is found only if the query after its question is nearer to the fact's own key than to all others. Learnt
through the memory and the layers above it, that takes hundreds of steps, since each question asked tells of one
pair; here each of them tells of every pair in the batch (InfoNCE, van den Oord et al. 2018). And a memory that writes
every word is soon full: the step size theta starts out large on what is asked for and small on all else.
"""

import math
import random

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from titans.memory.neural import NeuralMemory
from titans.training.batch import Recalls, choose, make_recalls
from titans.training.config import TrainingConfig
from titans.training.pool import Pool

_FACTS = 256  # a step
_STRETCHES = 64  # of plain text a step, whose keys no question means
_TEMPERATURE = 0.15  # lower: other keys are let come too near; higher: the own key is not found
_OPENING_WEIGHT = 10.0  # of the step size at plain text
_WARMUP = 20
_GATE_FACTOR = 3.0  # gates and convolutions learn faster


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
        runs = choose(range(len(pool.statements) - config.held_out_facts), _FACTS, rng)
        recalls = make_recalls(pool, [(fact, 0) for run in runs for fact in run], rng).to(device)
        loss = _loss(memory, recalls, pool.stretches(_STRETCHES, recalls.stated.shape[1], rng).to(device))
        progress = step / config.key_steps
        rate = (
            config.key_learning_rate
            * min(1, (step + 1) / _WARMUP)
            * (0.05 + 0.475 * (1 + math.cos(math.pi * progress)))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


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
