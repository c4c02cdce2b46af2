"""The deep memory, the paper's chunk rule: a multi-layer perceptron whose gradients are taken where the chunk began.

M(x) = h_{L-1} W_L with h_l = gelu(h_{l-1} W_l), h_0 = x; with `residual`, M(x) = x + LN(h_{L-1} W_L) (camera-ready
form). Gradients of a chunk are taken at the weights it STARTED with (eq. 16). Each token's gradient of a layer is of
rank one, h_{l-1} (x) delta_l, so the weights of no token are ever built: a chunk's end is two products a layer, and a
strictly causal read is the layers one after the other, each with its own chunk correction (`titans.memory.chunk`).

Two normalised step sizes keep repetitive text from diverging, as in normalised least mean squares (Haykin, 2002,
chapter 6): a layer's step is divided by max(1, |h_{l-1}|^2), and with LN by max(1, 1 / sigma^2), what its Jacobian
amplifies.

Shapes: as in `titans.memory.rule`; C tokens of the chunk · I, O a layer's input and output ·
A = B H, the heads of all rows.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titans.config import MemoryConfig
from titans.memory.chunk import Chunk
from titans.memory.rule import Rule, Step, row_at

_EPS = 1e-5
Product = Callable[[Tensor], Tensor]  # h -> h W: [B, H, T, I] to [B, H, T, O]


class Gradients(NamedTuple):
    """Of every token of a chunk, for each layer: what the step -theta * inputs (x) errors is made of."""

    inputs: list[Tensor]  # [B, H, C, I] each
    errors: list[Tensor]  # [B, H, C, O] each, steps normalised


class MLPRule(Rule):
    """M is a perceptron of `depth` layers; depth 1 is the paper's linear memory."""

    bound_to_chunks = True

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        self.residual = config.residual
        self.start_weights = nn.Parameter(torch.empty(config.num_heads, config.num_weights))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Draw small weights to start from, in place: deviation 1 / sqrt(inputs), a tenth of it in the last layer."""
        for i, layer in enumerate(self.split(self.start_weights[None])):
            last = i == len(self.shapes) - 1
            layer.normal_(std=(0.1 if last else 1.0) * layer.shape[-2] ** -0.5)

    def step(self, chunk: Chunk, weights: list[Tensor], momentum: list[Tensor], ends_B: Tensor | None = None) -> Step:
        """One chunk, whole or its beginning. `titans.memory.reference` is the same, token by token."""
        gradients = self.gradients(weights, chunk.keys, chunk.values)
        reads = None
        if chunk.queries is not None:
            reads = self._forward(chunk.queries, self._products(weights, momentum, gradients, chunk))
        keep, carry, decay, weight, share = (row_at(x, ends_B) for x in chunk.weighing)
        scales = (keep, carry, decay, weight * chunk.theta, share * chunk.theta)
        after, left = [], []
        for i, start in enumerate(weights):
            keep_A, carry_A, decay_A, weight_AC, share_AC = (x[:, :, i].flatten(0, 1)[..., None] for x in scales)
            inputs, errors = gradients.inputs[i].flatten(0, 1), gradients.errors[i].flatten(0, 1)
            now = keep_A[..., None] * start.flatten(0, 1)  # all that follows is done in its place
            if momentum:
                surprise = momentum[i].flatten(0, 1)
                now.addcmul_(carry_A[..., None], surprise)
                surprise = decay_A[..., None] * surprise
                surprise.baddbmm_((inputs * share_AC).transpose(1, 2), errors, alpha=-1)
                left.append(surprise.unflatten(0, start.shape[:2]))
            now.baddbmm_((inputs * weight_AC).transpose(1, 2), errors, alpha=-1)
            after.append(now.unflatten(0, start.shape[:2]))
        return Step(after, left, reads)

    def read(self, weights: Tensor, queries: Tensor) -> Tensor:
        """M(q): [B, H, N] and [B, H, T, K] to [B, H, T, V]."""
        return self._forward(queries, [partial(_times, layer) for layer in self.split(weights)])

    def gradients(self, layers: list[Tensor], keys: Tensor, values: Tensor) -> Gradients:
        """Of 1/2 |M(k) - v|^2 at one set of weights, layer by layer, written out (eq. 12).

        Weights [B, H, I, O] of each layer, keys [B, H, C, K], values [B, H, C, V].
        """
        inputs, sums, h = [keys], [], keys
        for layer in layers[:-1]:
            sums.append(h @ layer)
            h = F.gelu(sums[-1])
            inputs.append(h)
        out = h @ layers[-1]
        if self.residual:
            answer, deviation = _layer_norm(out)
            error = _layer_norm_backward(answer, deviation, keys + answer - values) * deviation.square().clamp(max=1)
        else:
            error = out - values
        errors = [error]
        for layer, z in zip(reversed(layers[1:]), reversed(sums), strict=True):
            errors.insert(0, torch.ops.aten.gelu_backward(errors[0] @ layer.transpose(-1, -2), z))
        for i, x in enumerate(inputs[1:], start=1):  # (keys have unit length as it is)
            errors[i] = errors[i] / x.square().sum(-1, keepdim=True).clamp(min=1)
        return Gradients(inputs, errors)

    def _products(
        self, weights: list[Tensor], momentum: list[Tensor], gradients: Gradients, chunk: Chunk
    ) -> list[Product]:
        """h_t W_t of each layer, with the weights as of token t, which are never built."""
        c = chunk.weighing

        def product(i: int, start: Tensor, surprise: Tensor | None, h: Tensor) -> Tensor:
            inputs, errors = gradients.inputs[i], gradients.errors[i]
            similar = c.weight_PC[:, :, i, 1:] * chunk.theta[:, :, i, None] * (h @ inputs.transpose(-1, -2))
            out = c.keep_P[:, :, i, 1:, None] * (h @ start) - similar @ errors
            return out if surprise is None else out + c.carry_P[:, :, i, 1:, None] * (h @ surprise)

        surprises: Sequence[Tensor | None] = momentum or [None] * len(weights)
        return [partial(product, i, w, s) for i, (w, s) in enumerate(zip(weights, surprises, strict=True))]

    def _forward(self, queries: Tensor, products: list[Product]) -> Tensor:
        h = queries
        for product in products[:-1]:
            h = F.gelu(product(h))
        out: Tensor = products[-1](h)
        return queries + _layer_norm(out)[0] if self.residual else out


def _times(layer: Tensor, h: Tensor) -> Tensor:
    return h @ layer


def _layer_norm(z: Tensor) -> tuple[Tensor, Tensor]:
    """LN(z) without learned scale, and the deviation that it divides by."""
    centered = z - z.mean(-1, keepdim=True)
    deviation = (centered.square().mean(-1, keepdim=True) + _EPS).sqrt()
    return centered / deviation, deviation


def _layer_norm_backward(answer: Tensor, deviation: Tensor, error: Tensor) -> Tensor:
    """From d l / d LN(z) to d l / dz."""
    along = (error * answer).mean(-1, keepdim=True)
    return (error - error.mean(-1, keepdim=True) - answer * along) / deviation
