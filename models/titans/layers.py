"""The pieces of a Llama-family block: RMSNorm, rotary positions, SwiGLU.

Shapes: B batch · T tokens · D hidden · H heads · E head dim.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 (Zhang & Sennrich 2019); `size` is D."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[..., D] to [..., D], in x's dtype."""
        if x_BTD.dtype == self.weight.dtype:
            return F.rms_norm(x_BTD, self.weight.shape, self.weight, self.eps)
        return F.rms_norm(x_BTD.float(), self.weight.shape, self.weight.float(), self.eps).to(x_BTD.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one product (Shazeer 2020); `size` is D."""

    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(size, 2 * inner, bias=False)
        self.down = nn.Linear(inner, size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        gate, up = self.gate_up(x_BTD).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)  # type: ignore[no-any-return]


class Rotation:
    """Rotary position embedding of given positions (Su et al. 2021, the half-split layout).

    Positions are whole numbers of any shape; `head_dim` is E, even; `theta` the base. Angles are taken in float64: at a
    session's millionth token float32 would be off by 0.06 rad.
    """

    def __init__(self, positions: Tensor, head_dim: int, theta: float) -> None:
        steps = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device)
        angles = positions.double()[..., None, None] * theta ** (-steps / head_dim)
        cos, sin = angles.cos().float(), angles.sin().float()
        self.cos = torch.cat((cos, cos), dim=-1)  # [..., 1, E]
        self.sin = torch.cat((-sin, sin), dim=-1)

    def __call__(self, x: Tensor) -> Tensor:
        """Turn each head's vector by its token's position: [..., H, E] to float32; other dimensions broadcast."""
        x = x.float()
        a, b = x.chunk(2, dim=-1)
        return torch.addcmul(x * self.cos, torch.cat((b, a), dim=-1), self.sin)
