"""First lessons, on cached states alone: under which keys to write, and what. Minutes instead of hours.

Keys. A fact is found only if the query after its question is nearer to the fact's own key than to all others. Learnt
through the memory and the layers above it, that takes hundreds of steps, since each question asked tells of one
pair; here each of them tells of every pair in the batch (InfoNCE, van den Oord et al. 2018). Nearer is not enough:
what a linear memory answers is a sum over all keys by their similarity. So facts are also learnt, with random values,
by the delta rule, and each query must read its own value and little else. And a memory that writes every word is soon
full: the step size theta starts out large on what is asked for and small on all else.

Values. What is written is what the token is: any token of any text must be told from its own value, and through the
noise that other facts add when it is read. So words that no fact of training has are remembered as well.
"""

import math
import random

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from titans.memory.chunk import Writes
from titans.memory.neural import NeuralMemory
from titans.model import next_token_loss
from titans.training.batch import Recalls, choose, make_recalls
from titans.training.config import TrainingConfig
from titans.training.pool import Pool

_FACTS = 256  # a step
_STRETCHES = 64  # of plain text a step, whose keys no question means
_TEMPERATURE = 0.3  # lower: other keys are let come too near; higher: the own key is not found
_DOCUMENTS = 8  # among which a step's facts are shared out, to be learnt by the delta rule
_STEP_SIZE = 0.5  # of that rule
_DISTURBED_WEIGHT = 16.0
_RANDOM_VALUE = 128  # floats
_LEAST_ALIKE = 0.05  # below which nothing is learnt from a read
_OPENING_WEIGHT = 10.0  # of the step size at plain text
_LEADING_WEIGHT = 1.0  # of that at what stands before a value
_WARMUP = 20
_GATE_FACTOR = 3.0  # gates and convolutions learn faster
_NOISE = 0.7  # added to values, as a share of their size
_READOUT_FACTOR = 3.0
_PLAIN = 48  # tokens of a stretch that are told from their values, context included
_OTHER_TOKENS = 4_096  # besides a step's own, between which it is decided


def teach_keys(memory: NeuralMemory, pool: Pool, config: TrainingConfig) -> float:
    """Train keys, queries and the step size. Returns the last loss, in nats."""
    rng = random.Random(config.seed)
    small = ("gate", "query_conv", "key_conv", "norm", "center")
    taps = [parameter for name, parameter in memory.named_parameters() if name.startswith(small)]
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
    rng, chance = random.Random(config.seed), torch.Generator().manual_seed(config.seed)
    groups = [
        {"params": [memory.value.weight, memory.out.weight], "factor": 1.0},
        {"params": [*readout.parameters()], "factor": _READOUT_FACTOR},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    loss, others = torch.tensor(0.0), pool.haystack_tokens.unique()
    for step in tqdm(range(config.value_steps), desc="values", unit="step"):
        recalls = _some_facts(pool, config, rng)
        plain, tokens = pool.stretches_with_tokens(_STRETCHES, _PLAIN, rng)
        said = [(recalls.stated, recalls.answers), (plain, tokens[:, config.context :])]
        loss = value_loss(memory, readout, said, embedding=embedding, others=others, chance=chance)
        _descend(optimizer, loss, config.value_learning_rate * _schedule(step, config.value_steps))
    return loss.item()


def value_loss(
    memory: NeuralMemory,
    readout: nn.Module,
    said: list[tuple[Tensor, Tensor]],
    *,
    embedding: Tensor,
    others: Tensor,
    chance: torch.Generator,
) -> Tensor:
    """Nats a token, of telling tokens from their own values and noise, among each other and some `others` [N].

    `said`: hidden states [B, C + T, D], C tokens of context before those that count, and which these are [B, T], -100
    where none is. `chance` draws the noise and the others, on the CPU.
    """
    device = embedding.device
    targets = torch.cat([own[own != -100].cpu() for _, own in said])
    letters = torch.cat((targets, others[torch.randint(len(others), (_OTHER_TOKENS,), generator=chance)])).unique()
    y = torch.cat([_answers(memory, h.to(device), chance)[(own != -100).to(device)] for h, own in said])
    logits = readout(F.rms_norm(y, y.shape[-1:])) @ unit(embedding[letters.to(device)]).T
    return next_token_loss(logits, torch.searchsorted(letters, targets).to(device))


def away_from_half(stated: Writes, counts: Tensor) -> Tensor:
    """Nats by which the step sizes of the tokens that count [F, S] are away from a half, where this is least."""
    theta = stated.theta.flatten(1, 2).transpose(1, 2)[counts]
    return -0.5 * (4 * theta * (1 - theta)).log().mean()


def unit(letters: Tensor) -> Tensor:
    """Embeddings, all of one size: [A, D], float32."""
    return F.rms_norm(letters.float(), letters.shape[-1:], eps=1e-6)


def _answers(memory: NeuralMemory, hidden: Tensor, noise: torch.Generator) -> Tensor:
    """What the memory would answer if it gave back each token's own value, and noise: [B, T - context, D]."""
    values = memory.writes(hidden).values
    size = values.detach().square().mean().sqrt()
    values = values + _NOISE * size * torch.randn(values.shape, generator=noise).to(values.device)
    return memory.answer(values, hidden[:, -values.shape[2] :]).float()


def _some_facts(pool: Pool, config: TrainingConfig, rng: random.Random) -> Recalls:
    runs = choose(range(len(pool.statements) - config.held_out_facts), _FACTS, rng)
    return make_recalls(pool, [(fact, 0) for run in runs for fact in run], config.context, rng)


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
    similar = _similar(queries, torch.cat((keys, others), dim=1))  # [H, Q, all keys]
    own = torch.arange(keys.shape[1], device=keys.device).expand(len(keys), -1)
    found = F.cross_entropy(similar.flatten(0, 1) / _TEMPERATURE, own.flatten())
    told_before = recalls.replaced_counts
    replaced = memory.writes(recalls.replaced).keys.transpose(0, 1)[:, told_before]
    owners = recalls.replaced_by[:, None].expand_as(told_before)[told_before]
    lost = found + _DISTURBED_WEIGHT * _disturbed(queries, keys, counts, replaced, owners)
    opening = _OPENING_WEIGHT * _opening(unwanted) + _LEADING_WEIGHT * _opening(memory.writes(recalls.leading))
    return lost + away_from_half(wanted, counts) + opening


def _opening(unwanted: Writes) -> Tensor:
    """Nats by which the step sizes of what is not asked for are away from none."""
    return -(1 - unwanted.theta).log().mean()


def _disturbed(queries: Tensor, keys: Tensor, counts: Tensor, replaced: Tensor, owners: Tensor) -> Tensor:
    """-log of the cosine between what queries [H, Q, K] read and their own values, random ones.

    `counts` [F, S]: which tokens of each fact the Q are; so many facts in order make a document. Before these it has
    tokens with the keys `replaced` [H, N, K], of values that were told of the facts `owners` [N] before: where their
    keys are those of the values that hold, these replace them.
    """
    losses, parts = [], torch.arange(len(counts), device=counts.device).tensor_split(_DOCUMENTS)
    sizes = [int(counts[facts].sum()) for facts in parts]
    for q, k, facts in zip(queries.split(sizes, dim=1), keys.split(sizes, dim=1), parts, strict=True):
        told = torch.cat((replaced[:, torch.isin(owners, facts)], k), dim=1)
        values = F.normalize(torch.randn(*told.shape[:2], _RANDOM_VALUE, device=k.device), dim=-1)
        errors = torch.linalg.solve_triangular(_STEP_SIZE * (told @ told.mT), values, upper=False, unitriangular=True)
        read, own = _STEP_SIZE * (q @ told.mT) @ errors, values[:, told.shape[1] - k.shape[1] :]
        alike = F.cosine_similarity(read.transpose(0, 1).flatten(1), own.transpose(0, 1).flatten(1), dim=-1)
        losses.append(alike.clamp(min=_LEAST_ALIKE).log())
    return -torch.cat(losses).mean()


def _similar(queries: Tensor, keys: Tensor) -> Tensor:
    """All with all, in half precision: a temperature is coarse."""
    return (queries.bfloat16() @ keys.bfloat16().mT).float()
