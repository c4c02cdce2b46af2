"""The recipe on a tiny body: it learns, and a run that was cut goes on as if it had not been."""

import itertools
import random
import re
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.models import TinyCheckpoint, write_tiny_checkpoint
from titans import backbone
from titans.backbone import load_backbone
from titans.checkpoint import build, digest, load, memory_tensors, read_header, ready, save_memory
from titans.config import tiny as tiny_config
from titans.evaluation.facts import NOT_KNOWN, Fact, make_facts, make_families, words_of
from titans.evaluation.wording import ASKINGS, STATEMENTS, a_statement, an_asking
from titans.memory import MemoryState
from titans.model import TitansModel, next_token_loss
from titans.tokenizer import Tokenizer
from titans.training import __main__ as training
from titans.training import loop
from titans.training.__main__ import add_arguments, run
from titans.training.batch import _hay, _how_many, _rows, make_batch
from titans.training.config import Rates, Stage, TrainingConfig
from titans.training.loop import Trainer, kind_of
from titans.training.plot import plot
from titans.training.pool import Pool, _make_facts, _repeat, load_pool, save_pool
from titans.training.score import Scorer
from titans_client import cli

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


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), window=WINDOW)


@pytest.fixture(scope="module")
def pool(tiny: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    path = tmp_path_factory.mktemp("pool") / "pool.pt"
    save_pool(load_tiny(tiny), load_backbone(tiny.body).tokenizer, [TEXT, TEXT], CONFIG, path)
    return load_pool(path)


def load_tiny(tiny: TinyCheckpoint) -> TitansModel:
    return load(tiny.body, tiny.memory, device=torch.device("cpu"), dtype=torch.float32).model


def make_trainer(tiny: TinyCheckpoint, pool: Pool, run: Path, config: TrainingConfig = CONFIG) -> Trainer:
    run.mkdir(exist_ok=True)
    torch.manual_seed(CONFIG.seed)
    scorer = Scorer(load_backbone(tiny.body).tokenizer, TEXT, num_facts=1)
    model = load_tiny(tiny).requires_grad_(True)  # as it is when nothing has been trained
    return Trainer(model, digest(tiny.body), pool=pool, config=config, scorer=scorer, run=run)


def test_cached_states_are_those_of_a_server(tiny: TinyCheckpoint, pool: Pool) -> None:
    model = load_tiny(tiny)
    state = model.ingest(pool.haystack_tokens[:1, :300], model.new_state())
    slots = torch.arange(300 - WINDOW, 300) % WINDOW
    torch.testing.assert_close(state.tail[0, slots], pool.haystack[0, 300 - WINDOW : 300], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_cached_question_is_answered_as_a_server_would(tiny: TinyCheckpoint, pool: Pool, tmp_path: Path) -> None:
    trainer = make_trainer(tiny, pool, tmp_path / "run")
    tokenizer = load_backbone(tiny.body).tokenizer
    facts = _make_facts(CONFIG, random.Random(CONFIG.seed), words_of([TEXT.read_text(encoding="utf-8")] * 2))
    i, tokens = next(
        (i, asked)
        for i, fact in reversed([*enumerate(facts)])
        if len(asked := asked_alone(tokenizer, fact)) == len(pool.questions[i].targets)
    )
    model, question = trainer.model, pool.questions[i]
    text, end = pool.tails.text[question.tail], pool.tails.position[question.tail]
    state = model.ingest(pool.haystack_tokens[text, :end][None], model.new_state())
    stream = model.open(state)
    memory = MemoryState(state.position, *(stream.state.layers[-1][x] for x in ("weights", "momentum", "recent")))
    hidden, _ = model(torch.tensor([tokens]), stream)
    logits = model.logits(hidden[:, -question.answer - 1 : -1])
    expected = next_token_loss(logits, torch.tensor([tokens[-question.answer :]]))
    loss, *_ = trainer._answer(memory, [_rows(pool, [question], [0], CONFIG.context)])
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)


def asked_alone(tokenizer: Tokenizer, fact: Fact) -> list[int]:
    lead = f" {fact.answer_lead}" if fact.answer_lead else ""
    prompt = f"\n\nQuestion: {fact.question}\nAnswer:" if fact.form == "question" else fact.prompt
    return tokenizer.encode(f"{prompt}{lead} {fact.value}.\n")


def test_steps_on_a_batch_lower_its_losses(tiny: TinyCheckpoint, pool: Pool, tmp_path: Path) -> None:
    trainer, stage = make_trainer(tiny, pool, tmp_path / "run"), CONFIG.stages[1]
    trainer.step = CONFIG.stages[0].num_steps + 2
    first = trainer._take_step(stage)
    for _ in range(12):
        last = trainer._take_step(stage)
    for name in ("answer", "recall"):
        assert last[name] < first[name], name


def test_a_run_leaves_the_body_alone_and_is_drawn(tiny: TinyCheckpoint, pool: Pool, tmp_path: Path) -> None:
    trainer = make_trainer(tiny, pool, tmp_path / "run")
    before = {name: x.clone() for name, x in trainer.model.state_dict().items()}
    trainer.train()
    for name, tensor in trainer.model.state_dict().items():
        ours = name.startswith(("memory_layers.", "readout.")) or name in trainer.model.adapted
        assert torch.equal(tensor, before[name]) != ours, name
    assert "generated" in trainer.history[-1]
    again = make_trainer(tiny, pool, tmp_path / "run")
    again.train()  # a finished run comes to the same memory: the strength of its answers is set from what was trained
    assert torch.equal(again.memory.out.weight, trainer.memory.out.weight)
    plot(tmp_path / "run" / "log.json", tmp_path / "run" / "training.png")
    assert (tmp_path / "run" / "training.png").read_bytes().startswith(b"\x89PNG")


def test_the_strength_of_the_answers_is_the_best_on_held_out_facts(
    tiny: TinyCheckpoint, pool: Pool, tmp_path: Path
) -> None:
    trainer = make_trainer(tiny, pool, tmp_path / "run")
    trained = trainer.memory.out.weight.detach().clone()
    batches = [make_batch(pool, CONFIG, CONFIG.stages[1], CONFIG.num_steps + i, held_out=True) for i in range(6)]

    def loss() -> float:
        losses = [trainer.losses(batch).figures() for batch in batches]
        return sum(x["answer"] + CONFIG.text_weight * x["text"] for x in losses)

    strength = trainer._set_strength()
    torch.testing.assert_close(trainer.memory.out.weight, strength * trained)
    best = loss()
    with torch.no_grad():
        for other in (1.0, 1.2, 1.4, 1.6, 1.8):
            trainer.memory.out.weight.copy_(other * trained)
            assert loss() >= best - 1e-4


@pytest.mark.parametrize("step", [3, 5], ids=["the memory alone", "with the body"])
def test_a_resumed_run_is_the_uninterrupted_one(
    tiny: TinyCheckpoint, pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.setattr(loop, "_SAVE_EVERY", 5)
    whole = make_trainer(tiny, pool, tmp_path / "whole")
    whole.train()
    cut = make_trainer(tiny, pool, tmp_path / "cut")
    stop_after(cut, step)
    resumed = make_trainer(tiny, pool, tmp_path / "cut")
    resumed.train()
    assert len(resumed.history) == CONFIG.num_steps
    expected = memory_tensors(whole.model)
    for name, tensor in memory_tensors(resumed.model).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("first_save", [True, False])
@pytest.mark.parametrize(("owner", "name"), [(loop, "save_memory"), (Path, "write_text")])
def test_a_run_that_was_killed_while_it_was_saved_goes_on(
    tiny: TinyCheckpoint,
    pool: Pool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    first_save: bool,
    owner: object,
    name: str,
) -> None:
    cut = make_trainer(tiny, pool, tmp_path / "run")
    if not first_save:
        stop_after(cut, 0)
        cut = make_trainer(tiny, pool, tmp_path / "run")

    def killed(path: object, *_: object) -> None:
        if isinstance(path, Path):
            path.write_bytes(b'{"config":')  # so far it came
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, killed)
        cut.train()
    resumed = make_trainer(tiny, pool, tmp_path / "run")
    resumed.train()
    assert [row["step"] for row in resumed.history] == [*range(1, CONFIG.num_steps + 1)]
    plot(tmp_path / "run" / "log.json", tmp_path / "run" / "training.png")


def stop_after(trainer: Trainer, step: int) -> None:
    save = trainer._save

    def save_and_stop() -> None:
        save()
        if trainer.step == step:
            raise KeyboardInterrupt

    trainer._save = save_and_stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


def test_a_run_goes_on_from_weights(tiny: TinyCheckpoint, pool: Pool, tmp_path: Path) -> None:
    slow, stages = Rates(*[1e-12] * 6), (Stage(400, 4, 1, 2, 0), Stage(400, 4, 1, 2, 4))
    config = replace(CONFIG, key_learning_rate=1e-12, value_learning_rate=1e-12, alone=slow, joint=slow, stages=stages)
    trainer = make_trainer(tiny, pool, tmp_path / "run", config)
    started = {name: x.clone() for name, x in memory_tensors(trainer.model).items()}
    for tensor in memory_tensors(trainer.model).values():
        tensor.data.zero_()
    trainer.train(tiny.memory)
    for name, tensor in memory_tensors(trainer.model).items():
        if not name.endswith("out.weight"):  # whose strength is set
            torch.testing.assert_close(tensor, started[name], rtol=1e-3, atol=1e-6, msg=name)


def test_the_lesson_in_answers_leaves_alone_what_is_written(tiny: TinyCheckpoint, pool: Pool, tmp_path: Path) -> None:
    config = replace(CONFIG.answering(), haystack_tokens=4_096, num_facts=300, stages=(Stage(400, 4, 2, 2, 4),))
    assert all(stage.num_questions for stage in CONFIG.answering().stages)
    trainer = make_trainer(tiny, pool, tmp_path / "run", config)
    before = {name: x.clone() for name, x in trainer.memory.named_parameters()}
    trainer.train(tiny.memory)
    moved = {name for name, x in trainer.memory.named_parameters() if not torch.equal(x, before[name])}
    assert moved and all(kind_of(name) == "answers" for name in moved)
    assert trainer.direct is not None
    assert trainer.step == 2


def test_answers_are_taught_anew_to_a_memory_alone(capsys: pytest.CaptureFixture[str]) -> None:
    parser = ArgumentParser()
    add_arguments(parser)
    assert run(parser.parse_args(["--test-text", str(TEXT), "--answers", "--", str(TEXT)])) == 2
    assert "--start" in capsys.readouterr().err


def test_weights_that_are_none_are_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = ["--start", str(tmp_path / "none"), "--run", str(tmp_path / "run")]
    assert cli.main(["train", str(TEXT), "--test-text", str(TEXT), *start]) == 1
    assert "not a memory checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_layer_that_the_body_has_not_is_told(
    tiny: TinyCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = ["--body", str(tiny.body), "--run", str(tmp_path / "run")]
    for layer in ("18", "-1"):
        assert cli.main(["train", str(TEXT), "--test-text", str(TEXT), "--layer", layer, *rest]) == 1
        assert capsys.readouterr().err == "titans: train: the body has the layers 0 to 3\n"
    assert not (tmp_path / "run").exists()


def test_a_folder_with_a_run_of_other_settings_is_refused_and_left(
    tiny: TinyCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would go on, or be finished, and its weights would bear the names of the new ones."""
    monkeypatch.setattr(training, "save_pool", lambda *given: given[-1].touch())
    monkeypatch.setattr(training, "load_pool", lambda _: None)
    trained: list[Path] = []
    monkeypatch.setattr(training, "plot", lambda log, _: trained.append(log))
    monkeypatch.setattr(training, "Trainer", lambda *_, **given: given["scorer"])
    monkeypatch.setattr(Scorer, "train", lambda *_: None, raising=False)
    text = tmp_path / "text"
    text.write_text("a")
    rest = ["--test-text", str(TEXT), "--body", str(tiny.body), "--run", str(tmp_path / "run")]
    assert cli.main(["train", str(text), "--layer", "2", *rest]) == 0
    assert cli.main(["train", str(text), "--layer", "2", *rest]) == 0
    for change, name in ((["--layer", "1"], "layer"), (["--layer", "2", "--seed", "1"], "config")):
        assert cli.main(["train", str(text), *change, *rest]) == 1
        assert f"another {name}" in capsys.readouterr().err
    text.write_text("b")
    assert cli.main(["train", str(text), "--layer", "2", *rest]) == 1
    assert "another texts" in capsys.readouterr().err
    assert len(trained) == 2


def test_the_mean_of_memories_has_each_by_its_share(tiny: TinyCheckpoint, tmp_path: Path) -> None:
    model = load(tiny.body, tiny.memory, device=torch.device("cpu"), dtype=torch.float32).model
    first = {name: x.clone() for name, x in memory_tensors(model).items()}
    adapted, other = set(model.adapted), tmp_path / "other.safetensors"
    model.load_state_dict({name: x + 1 for name, x in first.items()}, strict=False)
    model.config = replace(model.config, memory=replace(model.config.memory, write_threshold=0.1))
    save_memory(model, digest(tiny.body), other)
    memories = [str(tiny.memory), str(other)]
    body = ["--body", str(tiny.body), "--out", str(tmp_path / "mean.safetensors")]
    assert cli.main(["average", *memories, "--shares", "1", "3", *body]) == 0
    mean = load(tiny.body, tmp_path / "mean.safetensors", device=torch.device("cpu"), dtype=torch.float32).model
    for name, x in memory_tensors(mean).items():
        torch.testing.assert_close(x, first[name] + 0.75, msg=name)
    assert mean.memories[0].config.write_threshold == 0.1, "the last one's"
    assert cli.main(["average", *memories, "--write-threshold", "0.2", *body]) == 0
    assert read_header(tmp_path / "mean.safetensors")[0].memory.write_threshold == 0.2
    plain = replace(model.config, adapted=False)
    unadapted = build(load_backbone(tiny.body), plain)
    ready(unadapted, torch.device("cpu"), torch.float32)
    of_body = {name: x.clone() for name, x in unadapted.state_dict().items() if name in adapted}
    save_memory(unadapted, digest(tiny.body), other)
    assert cli.main(["average", *memories, *body]) == 0
    mean = load(tiny.body, tmp_path / "mean.safetensors", device=torch.device("cpu"), dtype=torch.float32).model
    assert set(mean.adapted) == adapted
    for name, x in mean.adapted.items():
        torch.testing.assert_close(x, (first[name] + of_body[name]) / 2, msg=name)


def test_what_has_no_mean_is_told(
    tiny: TinyCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = write_tiny_checkpoint(tmp_path, seed=1).memory
    rest = ["--body", str(tiny.body), "--out", str(tmp_path / "mean.safetensors")]
    for memories, status, error in (
        ([str(tiny.memory), str(stranger)], 1, "another body"),
        ([str(tmp_path / "none")], 1, "not a memory checkpoint"),
        ([str(tiny.memory), "--shares", "1", "2"], 2, "2 shares for 1 memories"),
        ([str(tiny.memory), "--shares", "-1"], 2, "not a share"),
        ([str(tiny.memory), "--shares", "nan"], 2, "not a share"),
        ([str(tiny.memory), "--write-threshold", "0.5"], 1, "let nothing be written"),
    ):
        assert cli.main(["average", *memories, *rest]) == status
        assert error in capsys.readouterr().err
    monkeypatch.setattr(backbone, "DEFAULT_BODY_PACKAGE", "not_installed")
    assert cli.main(["average", str(tiny.memory), *rest[2:]]) == 1
    assert "no body" in capsys.readouterr().err
    assert not (tmp_path / "mean.safetensors").exists()


def test_documents_that_are_asked_about_have_few_facts_as_often_as_many() -> None:
    rng = random.Random(0)
    counts = [_how_many(Stage(400, 4, 3, 16, 8), rng) for _ in range(4_000)]
    assert min(counts) == 1 and max(counts) == 16
    assert 0.45 < sum(count <= 4 for count in counts) / len(counts) < 0.65
    assert sum(_how_many(Stage(400, 4, 3, 16, 0), rng) <= 4 for _ in range(4_000)) < 1_200


def test_a_text_ends_with_one_of_its_passages_over_and_over() -> None:
    tokens = torch.arange(4_000).view(4, 1_000)
    given = tokens.clone()
    _repeat(tokens, 300, random.Random(0))
    assert torch.equal(tokens[:, :700], given[:, :700])
    for row in tokens:
        passage = row[700:].unique()
        assert len(passage) in (8, 16, 32, 64, 128)
        assert torch.equal(row[700 : 700 + len(passage)], passage) and passage[-1] < row[699]
        assert torch.equal(row[700 : -len(passage)], row[700 + len(passage) :])


def test_some_documents_are_one_passage_over_and_over(pool: Pool) -> None:
    rng, size = random.Random(0), round(CONFIG.repeating_share * pool.haystack.shape[1])
    ends, whole = pool.haystack[:, -size:], 0
    for _ in range(400):
        hay = _hay(pool, CONFIG.repeating_share, 2 * size + 5, rng)
        assert len(hay) == 2 * size + 5
        whole += any(torch.equal(hay, end.repeat(3, 1)[: len(hay)]) for end in ends)
    assert 25 < whole < 80, "an eighth of them"


@torch.no_grad()
def test_what_stands_before_a_question_follows_the_layers_above(tiny: TinyCheckpoint, pool: Pool) -> None:
    model = load_tiny(tiny)
    renewed = pool.renewed(model)
    assert torch.equal(renewed.tails.position, pool.tails.position)
    torch.testing.assert_close(renewed.tails.values, pool.tails.values)
    for parameter in model.adapted.values():
        parameter.add_(0.5)
    changed, i = pool.renewed(model).tails, 1
    text, end = changed.text[i], changed.position[i]
    stream = model.open(model.ingest(pool.haystack_tokens[text, :end][None], model.new_state()))
    for layer, parts in enumerate(stream.upper):
        torch.testing.assert_close(changed.keys[i, layer], parts["keys"][0], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(changed.values, pool.tails.values)


def test_what_no_document_states_is_answered_so(tiny: TinyCheckpoint, pool: Pool) -> None:
    tokenizer = load_backbone(tiny.body).tokenizer
    assert pool.unanswered, "some questions"
    for i, question in pool.unanswered.items():
        answer = question.targets[question.start : question.start + question.answer].tolist()
        assert tokenizer.decode(answer).startswith(f" {NOT_KNOWN}.")
        known = pool.questions[i]
        lead = [targets[targets != -100][: -q.answer] for q, targets in ((x, x.targets) for x in (question, known))]
        assert torch.equal(*lead), "the answer to a question begins alike, whether the fact is known or not"
    stage = CONFIG.stages[1]
    batch = make_batch(pool, replace(CONFIG, unanswered_share=1.0), stage, 0)
    asked = sum(int(rows.is_answer.any(1).sum()) for rows in batch.rows)
    assert asked > sum(int(rows.is_answer.any(1).sum()) for rows in make_batch(pool, CONFIG, stage, 0).rows)


def words_in(facts: list[Fact]) -> set[str]:
    return {word for fact in facts for word in re.split("[ -]", fact.thing)}


def test_training_held_out_and_test_facts_share_no_word() -> None:
    words = words_of([TEXT.read_text(encoding="utf-8")])
    facts = _make_facts(CONFIG, random.Random(0), words)
    train, held_out = facts[: -CONFIG.held_out_facts], facts[-CONFIG.held_out_facts :]
    splits = [words_in(facts) for facts in (train, held_out, make_facts(300, random.Random(0)))]
    assert not any(a & b for a, b in itertools.combinations(splits, 2))


def test_training_says_nothing_as_the_test_does() -> None:
    rng = random.Random(0)
    statements = {a_statement("train", rng) for _ in range(20_000)}
    askings = [an_asking("train", rng) for _ in range(20_000)]
    assert len(statements) > 3_000 and len({asking.question for asking in askings}) > 150, "there are many ways"
    said = {text.lower() for text in (*statements, *(asking.lead for asking in askings))}
    for statement in STATEMENTS["test"]:
        assert not any(statement.lower() in text for text in said), statement
    assert {asking.question for asking in askings}.isdisjoint(asking.question for asking in ASKINGS["test"])
    for _ in range(100):
        assert a_statement("test", rng) in STATEMENTS["test"] and an_asking("test", rng) in ASKINGS["test"]


def test_an_answer_that_is_the_models_own_always_begins_alike() -> None:
    facts = make_families(300, random.Random(0), words_of([TEXT.read_text(encoding="utf-8")]))
    leads = {re.sub("The .* of the .* is", "The a of the t is", fact.answer_lead) for fact in facts}
    assert leads == {"", "The a of the t is"}


def test_facts_that_are_neighbours_in_the_pool_are_easily_confused() -> None:
    facts = make_families(40, random.Random(0), words_of([TEXT.read_text(encoding="utf-8")]))
    things = [fact.thing for fact in facts]
    assert len(set(things)) == len(things)
    alike = [words_in([a]) & words_in([b]) for a, b in itertools.pairwise(facts)]
    assert sum(map(bool, alike)) >= 30


def test_a_share_of_the_recipe_is_the_recipe_with_less_of_everything_that_takes_time() -> None:
    whole, tenth = TrainingConfig(), TrainingConfig().scaled(0.1)
    assert (tenth.key_steps, tenth.num_facts) == (whole.key_steps // 10, whole.num_facts // 10)
    assert [s.num_steps for s in tenth.stages] == [s.num_steps // 10 for s in whole.stages]
    assert whole.scaled(1.0) == whole
    least = whole.scaled(1e-6)
    assert least.num_facts - least.held_out_facts >= least.held_out_facts, "enough to learn from, and to ask for"
    assert least.haystack_tokens > max(stage.num_tokens for stage in least.stages), "a document has room in the texts"
    assert {stage.num_steps for stage in least.stages} == {1}
