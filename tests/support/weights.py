"""Matrices such as bodies have."""

import torch


def on_a_grid(bits: int, num_outputs: int, num_inputs: int) -> torch.Tensor:
    """Weights as a file of four or eight bits has them: steps and lowest levels of half precision."""
    generator = torch.Generator().manual_seed(bits)
    shape = num_outputs, num_inputs // 32, 32
    most = {4: 15, 8: 254}[bits]
    codes = torch.randint(0, most + 1, shape, generator=generator)
    codes[..., 0], codes[..., 1] = 0, most
    step, lowest = torch.rand(2, *shape[:2], 1, generator=generator)
    lowest = -127 * (step + 0.1) if bits == 8 else lowest - 0.6
    step, lowest = ((0.01 * x).half().float() for x in (step + 0.1, lowest))
    weight: torch.Tensor = codes * step + (lowest if bits == 4 else -127 * step)
    return weight.flatten(1)


def weight_of(bits: int, num_outputs: int, num_inputs: int) -> torch.Tensor:
    """Of four or eight bits a weight, or 16: bfloat16 at random."""
    if bits < 16:
        return on_a_grid(bits, num_outputs, num_inputs)
    torch.manual_seed(0)
    return torch.randn(num_outputs, num_inputs).bfloat16().float() * 0.125
