"""The naive whole model: one document from its beginning, in float64, as the paper's equations say (Titans, section 4).

Slow, and right by inspection. It takes a model's weights by name and its config, and runs none of its code; how a
memory learns and answers is `titans.memory.reference`, the oracle of the rules. Nothing is kept from call to call: no
ring, no tail, no chunk begun. What is this project's and not the paper's says so.

Shapes: T tokens · S keys · D hidden · H heads (of attention's queries, or of a memory) · G kv heads · E head dim ·
P persistent · K key dim and V value dim of a memory · L its layers · N vocabulary; a 1 in front is the one session that
the oracle is asked about.
"""

from collections.abc import Sequence

import torch
from titans.config import MemoryConfig, TitansConfig
from titans.memory.chunk import Writes
from titans.memory.reference import absorb_tokens, answer, directions, split
from titans.model import TitansModel
from torch import Tensor
from torch.nn import functional as F

Weights = dict[str, Tensor]  # of a model or a part of it, by name


@torch.no_grad()
def read_document(model: TitansModel, tokens_T: Tensor) -> Tensor:
    """Logits [T, N], float64: each token is learnt by every memory before that memory answers it."""
    config, weights = model.config, {name: Tensor.double(x) for name, x in model.state_dict().items()}
    h_TD = weights["embedding.weight"][tokens_T]
    answered_TD = torch.zeros_like(h_TD)
    for i in range(config.backbone.num_layers):
        layer, kind = under(weights, f"layers.{i}."), config.architecture if i in config.memory_layers else None
        if kind == "mal":
            answered_TD = consult(config, under(weights, f"memory_layers.{i}.memory."), h_TD)
            h_TD = h_TD + answered_TD  # eq. 30
        h_TD = h_TD + mix(config, layer, kind, h_TD)
        h_TD = h_TD + swiglu(layer, rms_norm(config, layer["mlp_norm.weight"], h_TD))
    h_TD = rms_norm(config, weights["norm.weight"], h_TD)
    if config.readout:  # this project's
        h_TD = h_TD + answered_TD @ weights["readout.weight"].T
    return h_TD @ weights["head.weight"].T


def mix(config: TitansConfig, layer: Weights, kind: str | None, h_TD: Tensor) -> Tensor:
    """What the half of a layer that looks at other tokens adds to h."""
    if kind == "lmm":
        return consult(config, under(layer, "memory."), h_TD)
    x_TD = rms_norm(config, layer["attention_norm.weight"], h_TD)
    if kind == "mac":
        return memory_as_context(config, layer, h_TD, x_TD)
    if kind == "mag":
        y_TD = attend(config, layer, x_TD)  # eq. 27
        return merge(config, layer, y_TD, consult(config, under(layer, "memory."), x_TD))  # eq. 28
    if config.architecture == "mac":  # without a memory: the segments one by one
        return torch.cat([attend(config, layer, segment_SD) for segment_SD in x_TD.split(config.window)])
    return attend(config, layer, x_TD)  # eq. 31


def memory_as_context(config: TitansConfig, layer: Weights, h_TD: Tensor, x_TD: Tensor) -> Tensor:
    """MAC, one segment after the other (eq. 21 to 25); convolutions reach into the segment before.

    That the memory learns y on its residual, and that what it knew passes attention's norm, is this project's.
    """
    memory = under(layer, "memory.")
    weights, momentum = start(config, memory)
    y_TD = m_TD = x_TD[:0]
    for begin in range(0, len(x_TD), config.window):
        end = min(begin + config.window, len(x_TD))
        queries, _ = ask(config, memory, x_TD[:end])
        before = split(config.memory, weights)
        known = torch.stack([answer(config.memory, before, queries[:, :, t]) for t in range(begin, end)], dim=2)
        known_TD = project_reads(config, memory, known, x_TD[begin:end])  # eq. 21
        known_TD = rms_norm(config, layer["attention_norm.weight"], known_TD)
        y_TD = torch.cat((y_TD, attend(config, layer, x_TD[begin:end], known_TD)))  # eq. 22, 23
        learnt_TD = h_TD[:end] + y_TD
        queries, writes = ask(config, memory, learnt_TD)
        after = absorb_tokens(config.memory, some_of(writes, begin, end), weights, momentum, queries[:, :, begin:end])
        weights, momentum = after.weights, after.momentum  # eq. 24
        assert after.reads is not None
        m_TD = torch.cat((m_TD, project_reads(config, memory, after.reads, learnt_TD[begin:end])))
    return merge(config, layer, y_TD, m_TD)  # eq. 25


def merge(config: TitansConfig, layer: Weights, y_TD: Tensor, m_TD: Tensor) -> Tensor:
    """y * M (eq. 25, 28); that M is normalised and added to 1 is this project's (docs/models.md)."""
    return y_TD * (1 + rms_norm(config, layer["merge.norm.weight"], m_TD))


def attend(config: TitansConfig, layer: Weights, x_TD: Tensor, known_TD: Tensor | None = None) -> Tensor:
    """softmax(q k / sqrt(E)) v, each token t of a sequence over [persistent | known | tokens] (eq. 19, 22).

    It sees the last `window` tokens, its own included, and what was known of those. The persistent tokens stand before
    the first token, and never further back than the window.
    """
    body, num_tokens, window = config.backbone, len(x_TD), config.window
    shared = body.num_heads // body.num_kv_heads
    sizes = [body.num_heads, body.num_kv_heads, body.num_kv_heads]
    weights_q, weights_k, weights_v = layer["attention.qkv.weight"].split([n * body.head_dim for n in sizes])
    places, source_SD = [*range(num_tokens)], x_TD
    if known_TD is not None:  # what was known of a token stands where the token does
        places, source_SD = places * 2, torch.cat((known_TD, x_TD))
    q_THE = rotate(config, (x_TD @ weights_q.T).unflatten(-1, (-1, body.head_dim)), range(num_tokens))
    k_SGE = rotate(config, (source_SD @ weights_k.T).unflatten(-1, (-1, body.head_dim)), places)
    v_SGE = (source_SD @ weights_v.T).unflatten(-1, (-1, body.head_dim))
    mixed = []
    for t in range(num_tokens):
        seen_S = torch.tensor([t - window < place <= t for place in places])
        persistent_PGE = rotate(config, layer["attention.persistent_keys"], [max(-1, t - window)])
        keys_SHE = torch.cat((persistent_PGE, k_SGE[seen_S])).repeat_interleave(shared, dim=1)
        values_SGE = torch.cat((layer["attention.persistent_values"], v_SGE[seen_S]))
        share_SH = ((keys_SHE * q_THE[t]).sum(-1) / body.head_dim**0.5).softmax(dim=0)
        mixed.append((share_SH[..., None] * values_SGE.repeat_interleave(shared, dim=1)).sum(0).flatten())
    return torch.stack(mixed) @ layer["attention.out.weight"].T


def rotate(config: TitansConfig, x_THE: Tensor, places: Sequence[int]) -> Tensor:
    """Turn dimensions i and i + E/2 by place * theta^(-2i/E) (Su et al. 2021)."""
    half = config.backbone.head_dim // 2
    speeds_E = config.backbone.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles_T1E = torch.tensor(places, dtype=torch.float64)[:, None, None] * speeds_E
    a, b = x_THE[..., :half], x_THE[..., half:]
    return torch.cat((a * angles_T1E.cos() - b * angles_T1E.sin(), a * angles_T1E.sin() + b * angles_T1E.cos()), -1)


def consult(config: TitansConfig, memory: Weights, h_TD: Tensor) -> Tensor:
    """What a memory answers to a document that it learns: M_t(q_t), the memory as of each token (eq. 15)."""
    queries, writes = ask(config, memory, h_TD)
    reads = absorb_tokens(config.memory, writes, *start(config, memory), queries).reads
    assert reads is not None
    return project_reads(config, memory, reads, h_TD)


def start(config: TitansConfig, memory: Weights) -> tuple[Tensor, Tensor]:
    """M_0 and S_0 [1, H, N of a memory]; M_0 is 0 where it is not learnt."""
    zeros = torch.zeros(1, config.memory.num_heads, config.memory.num_weights, dtype=torch.float64)
    return memory.get("rule.start_weights", zeros[0])[None], zeros


def ask(config: TitansConfig, memory: Weights, h_TD: Tensor) -> tuple[Tensor, Writes]:
    """q [1, H, T, K], and what is written: k, v and the gates of every token, head and layer (section 4.4)."""
    form, x_TD = config.memory, center(config, memory, h_TD)
    seen_TD = x_TD if form.gate_width == 1 else weigh(x_TD, memory["gate_conv"].T)
    gates = seen_TD @ memory["gates.weight"].T + memory["gates.bias"]
    gates = gates.T.unflatten(0, (form.num_gates, 1, form.num_heads, form.depth))  # [gate, 1, H, L, T]
    theta, eta = gates[0].sigmoid(), gates[-1].sigmoid() if form.momentum else None
    if eta is not None and form.rule == "exact":  # this project's: less than a half is stable
        eta = eta / 2
    alpha = gates[1].sigmoid() if form.forgetting else torch.zeros_like(theta)
    if form.rule == "chunk":  # this project's: all steps of a chunk, and all that momentum makes of one, are one step
        theta = theta / form.chunk_size
    if eta is not None:
        theta = theta * (1 - eta)
    queries, keys = (features(form, convolve(config, memory, name, x_TD)) for name in ("query", "key"))
    values = convolve(config, memory, "value", x_TD)
    along = directions(keys, theta[:, :, 0], form.protected_keys) if form.protected_keys else None
    return queries, Writes(keys, values, theta, (1 - alpha).log(), None if eta is None else eta.log(), along)


def features(form: MemoryConfig, x: Tensor) -> Tensor:
    """SiLU, or each float times those 1, 2, ... places before it, in a ring; then unit length."""
    size = form.key_dim
    pairs = [(j, (j - i) % size) for i in range(1, form.products + 1) for j in range(size)]
    made = torch.stack([x[..., j] * x[..., k] for j, k in pairs], dim=-1) if pairs else F.silu(x)
    return F.normalize(made, dim=-1)


def convolve(config: TitansConfig, memory: Weights, name: str, x_TD: Tensor) -> Tensor:
    """A projection, then of each channel a weighted sum over the last conv_width tokens: [1, H, T, K] (or V)."""
    rows = weigh(x_TD @ memory[f"{name}.weight"].T, memory[f"{name}_conv"].T)
    heads: Tensor = rows.unflatten(-1, (config.memory.num_heads, -1)).transpose(0, 1)
    return heads[None]


def weigh(x_TD: Tensor, taps_WD: Tensor) -> Tensor:
    """Of each channel a weighted sum over the last W tokens, the first ones after zeros: [T, D]."""
    size = len(taps_WD)
    padded = torch.cat((torch.zeros(size - 1, x_TD.shape[1], dtype=x_TD.dtype), x_TD))
    return torch.stack([(taps_WD * padded[t : t + size]).sum(0) for t in range(len(x_TD))])


def project_reads(config: TitansConfig, memory: Weights, reads_1HTV: Tensor, h_TD: Tensor) -> Tensor:
    """The heads' answers to [T, D]: normalised where the config says so, then a gate, then the output projection."""
    if config.memory.output_norm:
        reads_1HTV = rms_norm(config, memory["read_norm.weight"], reads_1HTV)
    gate = center(config, memory, h_TD) @ memory["out_gate.weight"].T + memory["out_gate.bias"]
    return (gate.sigmoid() * reads_1HTV[0].transpose(0, 1).flatten(1)) @ memory["out.weight"].T


def center(config: TitansConfig, memory: Weights, h_TD: Tensor) -> Tensor:
    """What a memory makes of the hidden states that it is given: normalised, less a learned vector (this project's)."""
    return rms_norm(config, memory["norm.weight"], h_TD) - memory["center"]


def swiglu(layer: Weights, x_TD: Tensor) -> Tensor:
    """down(silu(gate x) * up x) (Shazeer 2020)."""
    gate, up = (x_TD @ layer["mlp.gate_up.weight"].T).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ layer["mlp.down.weight"].T


def rms_norm(config: TitansConfig, weight: Tensor, x: Tensor) -> Tensor:
    """x / rms(x) * weight (Zhang & Sennrich 2019)."""
    return x / (x.square().mean(-1, keepdim=True) + config.backbone.norm_eps).sqrt() * weight


def under(weights: Weights, prefix: str) -> Weights:
    """The part of them whose names begin so."""
    return {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}


def some_of(writes: Writes, start: int, stop: int) -> Writes:
    """Tokens `start` to `stop`, which is not among them."""
    return writes.split([start, stop - start, writes.keys.shape[2] - stop])[1]
