"""The oracle: the linear memory token by token, in float64, as the paper writes it. Slow, and right by inspection."""

import torch
from torch import Tensor

from titans.memory.linear import Writes


def absorb_tokens(writes: Writes, weights: Tensor, momentum: Tensor, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Titans equations 10, 12, 13 and 15 for one token after the other.

    `weights` and `momentum` are M_0 and S_0 [B, H, K, V]; `queries` [B, H, T, K]. The gradient is autograd's.
    Returns (M_T, S_T, reads [B, H, T, V]) in float64.
    """
    keys, values, theta, log_keep = (x.double() for x in writes[:4])
    eta = torch.zeros_like(theta) if writes.log_eta is None else writes.log_eta.double().exp()
    memory, surprise = weights.double(), momentum.double()
    if writes.log_eta is None:
        surprise = torch.zeros_like(memory)
    reads = []
    for t in range(keys.shape[2]):
        gradient = _gradient(memory, keys[:, :, t], values[:, :, t])
        surprise = eta[:, :, t, None, None] * surprise - theta[:, :, t, None, None] * gradient  # eq. 10, 14
        memory = log_keep[:, :, t, None, None].exp() * memory + surprise  # eq. 13
        reads.append((queries[:, :, t, None].double() @ memory).squeeze(2))  # eq. 15
    return memory, surprise, torch.stack(reads, dim=2)


def _gradient(memory: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """d/dM of 1/2 |k M - v|^2 (eq. 12), by autograd."""
    with torch.enable_grad():
        memory = memory.detach().requires_grad_()
        loss = 0.5 * ((key[:, :, None] @ memory).squeeze(2) - value).square().sum()
        (gradient,) = torch.autograd.grad(loss, memory)
    return gradient
