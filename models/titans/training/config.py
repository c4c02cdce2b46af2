"""The recipe's numbers."""

from dataclasses import dataclass, field, replace

from titans.config import MemoryConfig

MEMORY = MemoryConfig(value_dim=112, conv_width=12, gate_width=12, products=4, momentum=True, write_threshold=0.02)


@dataclass(frozen=True)
class Stage:
    """A step of the curriculum."""

    num_tokens: int  # length of a document
    num_documents: int  # a step
    num_steps: int
    max_facts: int  # planted in a document
    num_questions: int  # a step, about: asked through the layers above; 0: the memory learns by itself


@dataclass(frozen=True)
class Rates:
    """Learning rates at their highest; 0: not trained."""

    keys: float  # of keys and queries; five times what is set here unlearns what the first lesson taught
    values: float
    answers: float  # of what becomes of a value that was read
    gates: float  # of gates, convolutions and norms
    readout: float  # of what reads the memory in place of the layers above
    body: float = 0  # of norms and persistent tokens of the layers above


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides the outcome, but for the texts."""

    seed: int = 0
    memory: MemoryConfig = MEMORY
    key_steps: int = 1_000
    key_learning_rate: float = 3e-3
    value_steps: int = 400
    value_learning_rate: float = 2e-3
    alone: Rates = Rates(keys=2e-4, values=2e-4, answers=5e-4, gates=2e-3, readout=1e-3)
    joint: Rates = Rates(keys=0, values=0, answers=3e-3, gates=0, readout=1e-3, body=2e-3)
    weight_decay: float = 0.01
    warmup_steps: int = 20
    max_norm: float = 1.0
    recall_weight: float = 1.0  # of what is read straight from the memory
    missed_weight: float = 0.5  # of step sizes at what is asked for: those far from a half write nothing, or all
    told_weight: float = 1.0  # of what is told from values that nothing disturbs
    text_rows: int = 2  # stretches of plain text a step, so that reading does no harm to language
    text_tokens: int = 384  # of each that count, after a window that does not
    text_weight: float = 0.5
    name_weight: float = 0.2  # of those of its tokens that are of names which the window does not show
    unanswered_share: float = 0.15  # of a step's questions as many more, about what no document states
    lead_weight: float = 0.2  # of what an answer says before the value
    opening_weight: float = 20.0  # of the mean step size at plain text: what it writes is noise
    leak_weight: float = 0.1  # of its logarithm, which still pulls where the step size itself is small
    num_facts: int = 24_000  # in the pool
    haystack_tokens: int = 480_000
    repeating_share: float = 0.125  # of each text, and of documents: a passage said over and over, as boilerplate is
    after_tokens: int = 8  # of the text after a fact, as they are once it is stated
    asking_stride: int = 4  # windows of a text between two places where facts are asked for
    held_out_facts: int = 400  # of the pool, never trained on: for the log
    stages: tuple[Stage, ...] = field(
        default=(
            Stage(1_024, 32, 600, 20, 0),
            Stage(4_096, 16, 120, 48, 0),
            Stage(16_384, 8, 30, 64, 0),
            Stage(1_024, 16, 150, 12, 32),
            Stage(4_096, 8, 60, 24, 24),
            Stage(16_384, 4, 40, 24, 24),
            Stage(65_536, 2, 30, 24, 24),
        )
    )

    def scaled(self, share: float) -> "TrainingConfig":
        """The same with a share, 0 to 1, of its facts, texts and steps: where it leads, sooner.

        What has no steps gets none: one alone changes every weight by a whole learning rate.
        """

        def some(count: int, least: int = 1) -> int:
            return max(least, round(share * count)) if count else 0

        return replace(
            self,
            key_steps=some(self.key_steps),
            value_steps=some(self.value_steps),
            num_facts=some(self.num_facts, 2 * self.held_out_facts),
            haystack_tokens=some(self.haystack_tokens, 2 * max(stage.num_tokens for stage in self.stages)),
            stages=tuple(replace(stage, num_steps=some(stage.num_steps)) for stage in self.stages),
        )

    def going_on(self) -> "TrainingConfig":
        """The same for a memory that has been through it before: its first lessons are short and careful."""
        return replace(self, key_steps=300, key_learning_rate=1e-3, value_steps=100, value_learning_rate=7e-4)

    def finding(self) -> "TrainingConfig":
        """The first lessons by themselves: how it is found what is stated in ways that are new to a trained memory."""
        return replace(
            self.going_on(),
            key_steps=500,
            num_facts=9_000,
            haystack_tokens=131_072,
            joint=Rates(keys=0, values=0, answers=0, gates=0, readout=0),
            stages=(Stage(1_024, 16, 0, 12, 32),),  # without steps: the size of answers is measured on its documents
        )

    def answering(self) -> "TrainingConfig":
        """The lesson with the body alone, for a memory that has learnt what to write: under an hour on two cores."""
        return replace(
            self,
            key_steps=0,
            value_steps=0,
            num_facts=6_000,
            haystack_tokens=131_072,
            stages=(
                Stage(1_024, 16, 120, 12, 32),
                Stage(4_096, 8, 40, 24, 24),
                Stage(16_384, 4, 20, 24, 24),
                Stage(65_536, 2, 8, 24, 24),
            ),
        )

    def adapting(self) -> "TrainingConfig":
        """The lesson with the body, in which nothing learns but what of the body is trained: norms and sinks."""
        return replace(
            self.answering(),
            joint=Rates(keys=0, values=0, answers=0, gates=0, readout=0, body=5e-4),
            text_weight=1.0,
            unanswered_share=0.5,
            haystack_tokens=262_144,
            stages=(Stage(1_024, 8, 60, 12, 24), Stage(4_096, 4, 50, 24, 24)),
        )

    @property
    def is_memory_fixed(self) -> bool:
        """Whether nothing of it learns in any lesson."""
        taught = [self.joint if stage.num_questions else self.alone for stage in self.stages if stage.num_steps]
        rates = [{**vars(each), "body": 0, "readout": 0} for each in taught]
        return not (self.key_steps or self.value_steps or any(any(each.values()) for each in rates))

    @property
    def context(self) -> int:
        """Tokens before its own that a key, value or query is made of."""
        return self.memory.conv_width - 1

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

    def lesson_at(self, step: int) -> tuple[int, int]:
        """Steps done and steps in all of the lesson that a step belongs to: the memory by itself, or with the body."""
        alone = sum(stage.num_steps for stage in self.stages if not stage.num_questions)
        return (step, alone) if step < alone else (step - alone, self.num_steps - alone)
