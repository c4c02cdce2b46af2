"""What a model is made of: frozen, comparable, serialisable."""

import itertools
import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

Architecture = Literal["mac", "mag", "mal", "lmm"]  # memory as context, as gate, as layer; memory alone
RuleName = Literal["exact", "chunk"]

MOMENTUM_REACH = 24  # tokens, after which momentum, of an eta below a half, has 2^-24 left of what was learnt


@dataclass(frozen=True)
class BackboneConfig:
    """A Llama-family transformer body (RMSNorm, rotary positions, grouped queries, SwiGLU).

    Raises ValueError where a field is of another type, num_heads is not a multiple of num_kv_heads, rope_theta or
    norm_eps is not above 0, and where bos_token or eos_token is no id.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int  # of queries
    num_kv_heads: int  # of keys and values
    head_dim: int  # floats a head; even, for rotary positions turn pairs
    intermediate_size: int  # inner width of SwiGLU
    rope_theta: float  # base of the rotary angles
    norm_eps: float  # of every RMSNorm, the memories' too
    tie_embeddings: bool  # True: the head's weights are the embedding's
    bos_token: int  # id
    eos_token: int  # id

    def __post_init__(self) -> None:
        _check_types(self)
        if not (0 < self.rope_theta < math.inf and 0 < self.norm_eps < math.inf):
            raise ValueError("rope_theta and norm_eps are above 0, and finite")
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError("num_heads must be a multiple of num_kv_heads")
        for name, token in (("bos_token", self.bos_token), ("eos_token", self.eos_token)):
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"{name} {token!r} is none of {self.vocab_size} tokens")


@dataclass(frozen=True)
class MemoryConfig:
    """What every neural memory of a model is made of, and its rule.

    Raises ValueError where a field is of another type, a size is below 1, there is no such rule, the rule is exact and
    the memory not linear, keys are protected and the rule is not exact, a gate is made of more tokens than a key, a key
    has too few neighbours for its products, no gate, answer or margin could pass its threshold, margins are asked for
    without protected keys or a read_threshold, or with `residual` what the memory is asked with and values differ in
    size.
    """

    num_heads: int = 4  # each with weights of its own
    key_dim: int = 256  # of one head; queries too
    value_dim: int = 128  # of one head
    conv_width: int = 4  # tokens that a key, value or query is made of, the last its own
    gate_width: int = 1  # tokens that a gate is made of, likewise; the paper's are made of their own
    chunk_size: int = 64  # tokens learnt at once; with rule "exact" a matter of speed alone
    momentum: bool = False  # False: eta = 0 in equation 10
    forgetting: bool = True  # False: alpha = 0 in equation 13
    rule: RuleName = "exact"  # where gradients are taken: at the last token, or where the chunk began
    depth: int = 1  # layers of the memory (L_M); more than one: rule "chunk"
    expansion: int = 4  # width of the layers between, as a multiple of key_dim
    residual: bool = False  # M(x) = x + LN(...): the camera-ready form
    products: int = 0  # neighbours that each float of a key is multiplied with; 0: keys stay as they are
    learned_start: bool = False  # M_0 is trained; always so with rule "chunk"
    output_norm: bool = False  # True: an RMSNorm on what a head answers
    protected_keys: int = 0  # written well last, whose answers a write leaves as it can; for rule "exact"
    write_threshold: float = 0.0  # a gate theta below it writes nothing; from twice that on it is what it is
    read_threshold: float = 0.0  # an answer whose root mean square is below it is none; from twice that on likewise
    margin_threshold: float = 0.0  # below it, an answer is no larger than read_threshold (`titans.memory.margin`)

    def __post_init__(self) -> None:
        _check_types(self)
        if self.rule not in get_args(RuleName):
            raise ValueError(f"there is no rule {self.rule!r}")
        if self.rule == "exact" and (self.depth > 1 or self.residual):
            raise ValueError("the exact rule is for a linear memory: depth 1, no residual")
        if self.protected_keys < 0 or (self.protected_keys and self.rule != "exact"):
            raise ValueError("protected_keys is 0 or, under the exact rule, how many there are")
        if not 1 <= self.gate_width <= self.conv_width:
            raise ValueError("a gate is made of one to conv_width tokens")
        if not 0 <= self.products <= self.key_dim // 2:
            raise ValueError("a key has products with none to key_dim / 2 neighbours")
        if not 0 <= self.write_threshold < 0.5:
            raise ValueError("a threshold that a step of one half could not pass would let nothing be written")
        if not 0 <= self.read_threshold < math.inf:
            raise ValueError("a threshold of answers is 0 or above, and finite")
        if not 0 <= self.margin_threshold < 0.5:
            raise ValueError("a threshold of margins is 0 or above, and below a half")
        if self.margin_threshold and not (self.protected_keys and self.read_threshold):
            raise ValueError("margins are of the protected keys, and what is doubted is held to read_threshold")
        if self.residual and self.feature_dim != self.value_dim:
            raise ValueError("with residual, key_dim and value_dim must be equal, and products at most 1")
        sizes = (self.num_heads, self.key_dim, self.value_dim, self.conv_width, self.chunk_size)
        if min(*sizes, self.depth, self.expansion) < 1:
            raise ValueError("the sizes of a memory start at 1")

    @property
    def settings(self) -> dict[str, Any]:
        """What no tensor depends on, so that it can be set after training."""
        names = "write_threshold", "read_threshold", "margin_threshold", "protected_keys"
        return {name: getattr(self, name) for name in names}

    @property
    def feature_dim(self) -> int:
        """Floats of a key as the memory sees it, of one head."""
        return self.key_dim * max(1, self.products)

    @property
    def layer_shapes(self) -> list[tuple[int, int]]:
        """Inputs I and outputs O of each layer of the memory."""
        hidden = [self.expansion * self.key_dim] * (self.depth - 1)
        return list(itertools.pairwise([self.feature_dim, *hidden, self.value_dim]))

    @property
    def momentum_shapes(self) -> list[tuple[int, int]]:
        """What S is kept as: I and O of each layer; of the exact rule the last steps, directions and what they moved.

        There S is the sum of all steps so far, each times the etas after it. Those before the last MOMENTUM_REACH are
        less than float32 tells from nothing beside the step that they were.
        """
        if self.rule == "chunk" or not self.momentum:
            return self.layer_shapes
        return [(MOMENTUM_REACH, self.feature_dim), (MOMENTUM_REACH, self.value_dim)]

    @property
    def num_weights(self) -> int:
        """Floats of weights a head."""
        return sum(inputs * outputs for inputs, outputs in self.layer_shapes)

    @property
    def num_momentum(self) -> int:
        """Floats of momentum a head, where there is any."""
        return sum(rows * columns for rows, columns in self.momentum_shapes)

    @property
    def num_gates(self) -> int:
        """Of a token, head and layer: theta and, where they are on, alpha and eta."""
        return 1 + self.forgetting + self.momentum

    @property
    def num_recent(self) -> int:
        """Inputs that a state keeps: what the convolutions reach and, of the chunk rule, the chunk begun."""
        return self.conv_width - 1 + (self.chunk_size - 1 if self.rule == "chunk" else 0)


@dataclass(frozen=True)
class TitansConfig:
    """A body, its memories and where they stand, and how far attention sees.

    Raises ValueError where a field is of another type, `memory_layers` is empty, out of order or names what the body
    has not, where there is no such architecture, where a MAC's window is not a multiple of the memory's chunk_size or
    its memory has a margin_threshold, and where a readout is asked of another architecture than "mal".
    """

    backbone: BackboneConfig
    memory: MemoryConfig
    memory_layers: tuple[int, ...]  # layers of the body that have a memory, counted from 0, in order
    architecture: Architecture = "mal"
    window: int = 256  # tokens that attention sees; with "mac" the tokens of a segment
    num_persistent: int = 1  # keys and values per layer that are always attended to (eq. 19)
    readout: bool = False  # True: what the last memory answers also reaches the head past the layers above ("mal")
    adapted: bool = False  # True: norms and persistent tokens above the last memory are trained beside it

    def __post_init__(self) -> None:
        _check_types(self)
        layers = self.memory_layers
        if self.architecture not in get_args(Architecture):
            raise ValueError(f"there is no architecture {self.architecture!r}")
        if self.window < 1 or self.num_persistent < 0:
            raise ValueError("a window has one token or more; persistent tokens are not fewer than none")
        if not layers or list(layers) != sorted(set(layers)):
            raise ValueError("memory_layers names one layer or more, each once, in order")
        if layers[0] < 0 or layers[-1] >= self.backbone.num_layers:
            raise ValueError(f"the body has the layers 0 to {self.backbone.num_layers - 1}")
        if self.architecture == "mac" and self.window % self.memory.chunk_size:
            raise ValueError("a segment of a MAC is a whole number of the memory's chunks")
        if self.architecture == "mac" and self.memory.margin_threshold:
            raise ValueError("a segment of a MAC asks a memory whose keys are not kept: it has no margin_threshold")
        if self.readout and self.architecture != "mal":
            raise ValueError('only the architecture "mal" has a readout')

    def to_dict(self) -> dict[str, Any]:
        """A JSON-compatible description; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "TitansConfig":
        """The inverse of `to_dict`, also by way of JSON. `readout`, `adapted` and all of `memory` have defaults.

        Raises KeyError where a part is missing, TypeError where the body or the memory has a field too many, too few or
        of a wrong type, and ValueError as the constructors do.
        """
        return cls(
            backbone=BackboneConfig(**fields["backbone"]),
            memory=MemoryConfig(**fields["memory"]),
            memory_layers=tuple(fields["memory_layers"]),
            architecture=fields["architecture"],
            window=fields["window"],
            num_persistent=fields["num_persistent"],
            readout=fields.get("readout", False),
            adapted=fields.get("adapted", False),
        )


def _check_types(config: BackboneConfig | MemoryConfig | TitansConfig) -> None:
    """Raises ValueError where a number or a switch is none: they may come from any JSON."""
    for each in fields(config):
        value = getattr(config, each.name)
        is_right = {
            int: isinstance(value, int) and not isinstance(value, bool),
            float: isinstance(value, int | float) and not isinstance(value, bool),
            bool: isinstance(value, bool),
        }
        if isinstance(each.type, type) and not is_right.get(each.type, True):
            raise ValueError(f"{each.name} is {value!r}, which is no {each.type.__name__}")


def tiny(
    architecture: Architecture = "mal", memory_layers: tuple[int, ...] = (2,), *, readout: bool = False, **memory: Any
) -> TitansConfig:
    """A model small enough for unit tests: 4 layers, 48 wide, a memory in the middle; `memory` is for MemoryConfig."""
    return TitansConfig(
        backbone=BackboneConfig(
            vocab_size=259,
            hidden_size=48,
            num_layers=4,
            num_heads=6,
            num_kv_heads=2,
            head_dim=8,
            intermediate_size=96,
            rope_theta=10_000.0,
            norm_eps=1e-5,
            tie_embeddings=True,
            bos_token=1,
            eos_token=2,
        ),
        memory=MemoryConfig(**{"num_heads": 2, "key_dim": 16, "value_dim": 16, "chunk_size": 8} | memory),
        memory_layers=memory_layers,
        architecture=architecture,
        window=16,
        readout=readout,
    )
