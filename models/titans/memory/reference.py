"""The oracle: any memory token by token, in float64, as the paper writes it. Slow, and right by inspection.

The gradient is autograd's, of the forward pass below and nothing else.
"""

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from titans.config import MemoryConfig
from titans.memory.chunk import Writes
from titans.memory.protection import ANOTHER, FIRMNESS, LEAST_STEP, MOST_WEIGHT, SAME, SLACK
from titans.memory.rule import Absorbed


def absorb_tokens(config: MemoryConfig, writes: Writes, weights: Tensor, momentum: Tensor, queries: Tensor) -> Absorbed:
    """Titans equations 10, 12, 13, 15 and 16 for one token after the other, from a chunk's beginning.

    `weights` and `momentum` are M_0 and S_0 [B, H, N] (S_0 counts where there is momentum); `queries` [B, H, T, K], T
    one or more. All that is returned is float64; without momentum, S is the last step.
    """
    keys, values, theta, log_keep = (x.double() for x in writes[:4])
    eta = torch.zeros_like(theta) if writes.log_eta is None else writes.log_eta.double().exp()
    memory = split(config, weights.double())
    surprise = split(config, momentum.double() if config.momentum else torch.zeros_like(weights))
    begun, reads = memory, []
    for t in range(keys.shape[2]):
        if config.rule == "exact" or t % config.chunk_size == 0:
            begun = memory  # where gradients are taken (eq. 16)
        gradients = _gradients(config, begun, keys[:, :, t], values[:, :, t])
        if writes.directions is not None:  # the gradient is k e^T, and what is taken d e^T
            errors = [keys[:, :, t, None].double() @ gradient for gradient in gradients]
            gradients = [writes.directions[:, :, t, :, None].double() @ error for error in errors]
        rates = [x[:, :, i, t, None, None] for x in (eta, theta, log_keep) for i in range(config.depth)]
        etas, thetas, keeps = rates[: config.depth], rates[config.depth : -config.depth], rates[-config.depth :]
        steps = zip(etas, surprise, thetas, gradients, strict=True)
        surprise = [e * s - r * g for e, s, r, g in steps]  # eq. 10, 14
        memory = [k.exp() * m + s for k, m, s in zip(keeps, memory, surprise, strict=True)]  # eq. 13
        reads.append(answer(config, memory, queries[:, :, t].double()))  # eq. 15
    return Absorbed(join(memory), join(surprise), torch.stack(reads, dim=2))


def directions(keys: Tensor, theta: Tensor, num_kept: int) -> Tensor:
    """`titans.memory.protection` by its definition, from a session's beginning: float64, like keys [B, H, T, K].

    `theta` [B, H, T]. No key is rounded, as those that a state keeps in eight bits are.
    """
    keys, theta, found = keys.double(), theta.double(), torch.empty_like(keys, dtype=torch.float64)
    for b, h in itertools.product(*map(range, keys.shape[:2])):
        for t, key in enumerate(keys[b, h]):
            found[b, h, t] = key
            turned = min(1.0, max(0.0, 2 * float(theta[b, h, t]) / LEAST_STEP - 1))
            if not turned:
                continue
            known = torch.eye(keys.shape[-1], dtype=torch.float64)
            for i, weight in _kept(theta[b, h, :t], num_kept):
                another = min(1.0, max(0.0, (SAME - float(keys[b, h, i] @ key)) / (SAME - ANOTHER)))
                known += FIRMNESS * another * weight * torch.outer(keys[b, h, i], keys[b, h, i])
            free = torch.linalg.inv(known) @ key
            along = (free + SLACK * key) / (key @ free + SLACK)  # (a key has unit length, or none)
            found[b, h, t] += turned * (along - key)
    return found


def margins(keys: Tensor, theta: Tensor, queries: Tensor, num_kept: int) -> Tensor:
    """`titans.memory.margin` by its definition, from a session's beginning, each token after it is written: [B, T]."""
    keys, queries = keys.double(), queries.double()
    found = torch.zeros(keys.shape[0], keys.shape[2], dtype=torch.float64)
    for b, h, t in itertools.product(*map(range, keys.shape[:3])):
        kept = _kept(theta[b, h, : t + 1].double(), num_kept)
        rows = [min(1.0, weight**0.5) * keys[b, h, i] for i, weight in kept]
        if len(rows) == num_kept:
            found[b, t] = torch.inf
            continue
        alike = [float(queries[b, h, t] @ row) for row in rows]
        if max(alike, default=0.0) > 0:
            nearest = rows[alike.index(max(alike))]
            same = [min(1.0, max(0.0, float(row @ nearest / (nearest @ nearest)))) for row in rows]
            rival = max(x * (1 - s) for x, s in zip(alike, same, strict=True))
            found[b, t] += (max(alike) - rival) / max(alike) ** 0.5 / keys.shape[1]
    return found


def _kept(theta: Tensor, num_kept: int) -> list[tuple[int, float]]:
    """Which of these tokens are kept, and the weight of each."""
    steps = [(i, step) for i, step in enumerate(theta.tolist()) if step > LEAST_STEP][-num_kept:]
    return [(i, step / max(1 - step, 1 / MOST_WEIGHT) * min(1, step / LEAST_STEP - 1)) for i, step in steps]


def answer(config: MemoryConfig, memory: list[Tensor], x: Tensor, inputs: list[Tensor] | None = None) -> Tensor:
    """M(x) for one token a head, [B, H, K] to [B, H, V], by the layers [B, H, I, O].

    What each layer was given, and what the last one made of it, is added to `inputs`.
    """
    h = x
    for i, layer in enumerate(memory):
        if inputs is not None:
            inputs.append(h)
        z = (h[:, :, None] @ layer).squeeze(2)
        h = F.gelu(z) if i < len(memory) - 1 else z
    if inputs is not None:
        inputs.append(h)
    return x + F.layer_norm(h, h.shape[-1:]) if config.residual else h


def split(config: MemoryConfig, flat: Tensor) -> list[Tensor]:
    """[B, H, N] to [B, H, I, O] of each layer: views."""
    sizes = [inputs * outputs for inputs, outputs in config.layer_shapes]
    return [x.unflatten(-1, shape) for x, shape in zip(flat.split(sizes, -1), config.layer_shapes, strict=True)]


def join(layers: list[Tensor]) -> Tensor:
    """The inverse of `split`, a copy: [B, H, I, O] of each layer to [B, H, N]."""
    return torch.cat([layer.flatten(2) for layer in layers], dim=-1)


def _gradients(config: MemoryConfig, memory: list[Tensor], key: Tensor, value: Tensor) -> list[Tensor]:
    """d/dM of 1/2 |M(k) - v|^2 (eq. 12), by autograd; of the chunk rule with normalised steps."""
    with torch.enable_grad():
        memory = [layer.detach().requires_grad_() for layer in memory]
        inputs: list[Tensor] = []
        loss = 0.5 * (answer(config, memory, key, inputs) - value).square().sum()
        gradients = list(torch.autograd.grad(loss, memory))
    if config.rule == "exact":
        return gradients
    *inputs, out = (x.detach() for x in inputs)
    if config.residual:
        spread = out.var(-1, correction=0, keepdim=True) + 1e-5
        gradients = [g * spread.clamp(max=1)[..., None] for g in gradients]
    sizes = [x.square().sum(-1).clamp(min=1)[..., None, None] for x in inputs[1:]]
    return [gradients[0], *(g / size for g, size in zip(gradients[1:], sizes, strict=True))]
