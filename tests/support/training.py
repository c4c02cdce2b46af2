"""The recipe of training, made small: for a tiny body, in a few steps."""

from pathlib import Path

import torch
from support.models import TinyCheckpoint
from titans.backbone import load_backbone
from titans.checkpoint import digest, load
from titans.config import tiny as tiny_config
from titans.model import TitansModel
from titans.training.config import Rates, Stage, TrainingConfig
from titans.training.loop import Trainer
from titans.training.pool import Pool
from titans.training.score import Scorer

WINDOW = 192  # a question and its answer, in bytes
TEXT = Path(__file__).parents[2] / "examples" / "sherlock-holmes.txt"
ALONE = Rates(keys=3e-3, values=1e-2, answers=1e-2, gates=3e-3, readout=1e-2)
JOINT = Rates(keys=0, values=0, answers=1e-2, gates=0, readout=1e-2, body=1e-2)
CONFIG = TrainingConfig(
    memory=tiny_config().memory,
    key_steps=6,
    value_steps=6,
    num_facts=300,
    held_out_facts=20,
    haystack_tokens=4_096,
    asking_stride=3,
    warmup_steps=2,
    alone=ALONE,
    joint=JOINT,
    stages=(Stage(400, 4, 3, 2, 0), Stage(600, 4, 3, 2, 8)),
)


def load_tiny(tiny: TinyCheckpoint) -> TitansModel:
    """As a server would, in float32."""
    return load(tiny.body, tiny.memory, device=torch.device("cpu"), dtype=torch.float32).model


def make_trainer(tiny: TinyCheckpoint, pool: Pool, run: Path, config: TrainingConfig = CONFIG) -> Trainer:
    """The same each time; one that finds a cut run in its folder goes on with it."""
    run.mkdir(exist_ok=True)
    torch.manual_seed(CONFIG.seed)
    longest = max(stage.num_tokens for stage in config.stages)
    scorer = Scorer(load_backbone(tiny.body).tokenizer, TEXT, longest, num_facts=1)
    model = load_tiny(tiny).requires_grad_(True)  # as it is when nothing has been trained
    return Trainer(model, digest(tiny.body), pool=pool, config=config, scorer=scorer, run=run)
