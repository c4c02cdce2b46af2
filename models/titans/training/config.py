"""The recipe's numbers."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stage:
    """A step of the curriculum."""

    num_tokens: int  # length of a document
    num_documents: int  # a step
    num_steps: int
    max_facts: int  # planted in a document


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides the outcome, but for the texts."""

    seed: int = 0
    key_steps: int = 150
    key_learning_rate: float = 3e-3
    learning_rate: float = 1.5e-3
    gate_factor: float = 3.0  # gates and convolutions learn faster
    weight_decay: float = 0.01
    warmup_steps: int = 30
    max_norm: float = 1.0
    num_questions: int = 32  # a step, about: asked through the layers above, spread over the documents
    recall_weight: float = 1.0  # of the memory's own error on all that a document stated
    text_rows: int = 4  # stretches of plain text a step, so that reading does no harm to language
    text_weight: float = 0.2
    num_facts: int = 2_000  # in the pool
    haystack_tokens: int = 400_000
    context_tokens: int = 16  # plain text to the left of a cached fact or question
    stages: tuple[Stage, ...] = field(
        default=(
            Stage(512, 16, 80, 8),
            Stage(1_024, 16, 60, 10),
            Stage(2_048, 16, 30, 12),
            Stage(4_096, 12, 20, 16),
            Stage(16_384, 6, 15, 16),
        )
    )

    @property
    def num_steps(self) -> int:
        """Steps of all the stages."""
        return sum(stage.num_steps for stage in self.stages)

    def stage_at(self, step: int) -> Stage:
        """The stage that a step belongs to."""
        for stage in self.stages:
            if step < stage.num_steps:
                return stage
            step -= stage.num_steps
        return self.stages[-1]
