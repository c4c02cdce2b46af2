"""What a run learns from: questions answered as a server would, and facts that share no word with the test's."""

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.models import TinyCheckpoint
from support.training import CONFIG, TEXT, WINDOW, load_tiny, make_trainer
from titans.architecture import _state_of
from titans.backbone import load_backbone
from titans.evaluation.facts import NOT_KNOWN, Fact, fewest_words, make_facts, make_families, words_of
from titans.evaluation.wording import ASKINGS, FULL_ANSWER, STATEMENTS, a_statement, an_asking
from titans.memory import neural
from titans.model import next_token_loss
from titans.state import Parts
from titans.tokenizer import Tokenizer
from titans.training.average import average
from titans.training.batch import LEADING, _fitting, _hay, _how_many, _rows, make_batch, make_recalls, make_text_rows
from titans.training.config import Stage, TrainingConfig
from titans.training.keys import _disturbed
from titans.training.pool import Pool
from titans.training.states import _breaths, _make_facts, _repeat, _shares, _stated, cache_states
from torch.nn import functional as F


def test_cached_states_are_those_of_a_server(tiny: TinyCheckpoint, pool: Pool) -> None:
    model = load_tiny(tiny)
    state = model.ingest(pool.haystack_tokens[:1, :300], model.new_state())
    slots = torch.arange(300 - WINDOW, 300) % WINDOW
    torch.testing.assert_close(state.tail[0, slots], pool.haystack[0, 300 - WINDOW : 300], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("doubted", [False, True])
def test_a_cached_question_is_answered_as_a_server_would(
    tiny: TinyCheckpoint, pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, doubted: bool
) -> None:
    if doubted:
        body, doubting = tiny.body, tmp_path / "memory.safetensors"
        average(body, [tiny.memory], [1.0], doubting, read_threshold=0.01, margin_threshold=0.4, protected_keys=8)
        tiny = replace(tiny, memory=doubting)
        monkeypatch.setattr(neural, "told", lambda margins, _: torch.full_like(margins, 0.25))
    trainer = make_trainer(tiny, pool, tmp_path / "run")
    tokenizer = load_backbone(tiny.body).tokenizer
    made = _make_facts(CONFIG, random.Random(CONFIG.seed), words_of([TEXT.read_text(encoding="utf-8")] * 2))
    facts = [fact for fact in made if fact.holds]
    assert len(facts) == len(pool.statements) == len(pool.questions) == CONFIG.num_facts
    i, tokens = next(
        (i, asked)
        for i, fact in reversed([*enumerate(facts)])
        if len(asked := asked_alone(tokenizer, fact)) == len(pool.questions[i].targets)
    )
    model, question = trainer.model, pool.questions[i]
    text, end = pool.tails.text[question.tail], pool.tails.position[question.tail]
    state = model.ingest(pool.haystack_tokens[text, :end][None], model.new_state())
    stream = model.open(state)
    memory = _state_of(stream.state.layers[-1], state.position)
    hidden, _ = model(torch.tensor([tokens]), stream)
    logits = model.logits(hidden[:, -question.answer - 1 : -1])
    expected = next_token_loss(logits, torch.tensor([tokens[-question.answer :]]))
    loss, *_ = trainer._answer(memory, [_rows(pool, [question], [0], CONFIG.context)])
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)


def asked_alone(tokenizer: Tokenizer, fact: Fact) -> list[int]:
    lead = f" {fact.answer_lead}" if fact.answer_lead else ""
    prompt = f"\n\nQuestion: {fact.question}\nAnswer:" if fact.form == "question" else fact.prompt
    return tokenizer.encode(f"{prompt}{lead} {fact.value}.\n")


def test_lists_are_cached_as_a_text_has_them_and_read_in_one_piece(tiny: TinyCheckpoint) -> None:
    tokenizer = load_backbone(tiny.body).tokenizer
    facts = make_families(2_000, random.Random(0), words_of([TEXT.read_text(encoding="utf-8")]))
    shares = [*_shares(facts, 60)]
    groups = [group for share in shares for group in _breaths(share)]
    assert [fact for share in shares for fact in share] == [fact for group in groups for fact in group] == facts
    lists = [group for group in groups if group[0].before.startswith("\n")]
    assert {len(group) for group in groups if group not in lists} == {1, 2, 3, 4}
    assert {len(group) for group in lists} >= {1, 2, 5, 10}, "longer and shorter ones"
    assert any(fact.gap == "" for group in lists for fact in group) and any(fact.gap for fact in lists[0])
    for group in lists:
        assert not group[0].continues and all(fact.continues for fact in group[1:])
        stated = [_stated(tokenizer, fact) for fact in group]
        joined = tokenizer.encode("".join(fact.statement for fact in group))
        assert [token for run, _, _ in stated for token in run] == joined
        for fact, (run, start, size) in zip(group, stated, strict=True):
            answer = tokenizer.encode(f" {fact.value}.")[:size]
            assert run[start : start + size][not fact.gap :] == answer[not fact.gap :]
            assert fact.gap or fact.before.endswith(tokenizer.decode(run[start : start + 1])), "the separator"


def test_what_stands_before_a_value_is_what_is_not_to_be_written(pool: Pool) -> None:
    recalls = make_recalls(pool, [(fact, 0) for fact in range(len(pool.statements))], CONFIG.context, random.Random(0))
    for fact, leading in enumerate(recalls.leading):
        statement = pool.statements[fact]
        before = statement.hidden[max(0, statement.start - CONFIG.context - LEADING) : statement.start]
        torch.testing.assert_close(leading[-len(before) :], before, rtol=0, atol=0)
        assert len(leading) == CONFIG.context + LEADING


@torch.no_grad()
def test_what_a_list_told_before_is_cached_as_the_list_has_it(tiny: TinyCheckpoint, pool: Pool) -> None:
    made = _make_facts(CONFIG, random.Random(CONFIG.seed), words_of([TEXT.read_text(encoding="utf-8")] * 2))
    holding = [i for i, fact in enumerate(made) if fact.holds]
    assert pool.replaced, "some lists tell of a thing more than once"
    assert sum(len(told) for told in pool.replaced.values()) == len(made) - len(holding)
    tokenizer = load_backbone(tiny.body).tokenizer
    for fact, told in pool.replaced.items():
        end = holding[fact]
        start = max(i for i in range(end + 1) if not made[i].continues)
        before = [i for i in range(start, end) if made[i].thing == made[end].thing]
        assert len(before) == len(told) and not any(made[i].holds for i in before)
        sizes = [len(_stated(tokenizer, made[i])[0]) for i in range(start, end + 1)]
        since = next((i for i in range(end - 1, start - 1, -1) if made[i].holds), start - 1)
        statement = pool.statements[fact]
        assert len(statement.hidden) >= sum(sizes[since - start + 1 :]), "from the last line that holds"
        for i, value in zip(before, told, strict=True):
            assert value.size == _stated(tokenizer, made[i])[2] and len(value.hidden) == value.start + value.size
            if i <= since:
                continue
            at = sum(sizes[since - start + 1 : i - start]) + _stated(tokenizer, made[i])[1]
            torch.testing.assert_close(value.hidden[value.start :], statement.hidden[at : at + value.size])
    recalls = make_recalls(pool, [(fact, 0) for fact in range(len(holding))], CONFIG.context, random.Random(0))
    assert recalls.replaced_by.tolist() == sorted(pool.replaced)
    for fact, hidden, counts in zip(sorted(pool.replaced), recalls.replaced, recalls.replaced_counts, strict=True):
        read = hidden[CONFIG.context :][counts]
        values = [told.hidden[told.start : told.start + len(read)] for told in pool.replaced[fact]]
        assert any(torch.equal(read, value) for value in values)
    plain = next(fact for fact in range(len(holding)) if fact not in pool.replaced)
    assert not make_recalls(pool, [(plain, 0)], CONFIG.context, random.Random(0)).replaced_counts.any()


def test_what_is_told_anew_is_read_more_clearly_where_it_has_the_key_of_what_it_replaces() -> None:
    torch.manual_seed(0)
    queries, counts, owners = (
        F.normalize(torch.randn(1, 8, 64), dim=-1),
        torch.ones(8, 1, dtype=torch.bool),
        torch.arange(8),
    )
    noise = F.normalize(torch.randn(1, 8, 64), dim=-1)
    one, other = (F.normalize(queries + sign * noise, dim=-1) for sign in (0.5, -0.5))
    nothing, no_owners = queries[:, :0], owners[:0]
    alone, same, apart = (
        torch.stack([_disturbed(queries, one, counts, *told) for _ in range(40)]).mean().item()
        for told in ((nothing, no_owners), (one, owners), (other, owners))
    )
    assert alone < same < apart


def test_statements_leave_a_document_some_text(pool: Pool) -> None:
    runs = [[i] for i in range(100)]
    fitting = _fitting(pool, runs, 512)
    assert 0 < sum(len(pool.statements[i].hidden) for [i] in fitting) <= 384
    assert _fitting(pool, runs, 4) == runs[:1], "one is stated all the same"
    assert _fitting(pool, runs, 1_000_000) == runs


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


def test_a_text_beside_a_document_counts_past_its_window_and_has_a_name_that_is_not_in_it(pool: Pool) -> None:
    haystack, tokens, names = (x.flatten(0, 1) for x in (pool.haystack, pool.haystack_tokens, pool.names))
    size = WINDOW + CONFIG.text_tokens
    places = set()
    for seed in range(20):
        rows = make_text_rows(pool, CONFIG, 4, random.Random(seed))
        assert rows.hidden.shape[:2] == rows.targets.shape == (CONFIG.text_rows, size)
        assert (rows.targets[:, :WINDOW] == -100).all()
        assert rows.is_name.any(1).all()
        for hidden, before, targets, is_name in zip(rows.hidden, rows.before, rows.targets, rows.is_name, strict=True):
            alike = (haystack == hidden[0]).all(-1).nonzero().flatten().tolist()
            place = next(x for x in alike if torch.equal(haystack[x : x + size], hidden))
            assert torch.equal(haystack[place - CONFIG.context : place], before)
            after = slice(place + WINDOW + 1, place + size + 1)
            assert torch.equal(targets[WINDOW:], tokens[after])
            assert torch.equal(is_name[WINDOW:], names[after])
            places.add(place)
    assert len(places) > 5


def test_as_many_texts_as_there_is_room_for_are_read_beside_documents(tiny: TinyCheckpoint) -> None:
    """Each has windows enough for a stretch of it, with what its first tokens are told from."""
    model, tokenizer = load_tiny(tiny), load_backbone(tiny.body).tokenizer
    pool = cache_states(model, tokenizer, [TEXT] * 5, CONFIG)
    assert pool.haystack_tokens.shape == (5, 4 * WINDOW)
    for names in (pool.names, torch.zeros_like(pool.names)):
        for seed in range(20):
            rows = make_text_rows(replace(pool, names=names), CONFIG, 4, random.Random(seed))
            assert rows.before.shape[:2] == (CONFIG.text_rows, CONFIG.context)
            assert (rows.targets != -100).sum() == CONFIG.text_rows * CONFIG.text_tokens
    with pytest.raises(ValueError, match="of 6 texts 576 tokens each are read, 580 are needed: give fewer texts"):
        cache_states(model, tokenizer, [TEXT] * 6, CONFIG)


def test_a_text_beside_a_document_is_read_as_a_server_would(tiny: TinyCheckpoint, pool: Pool, tmp_path: Path) -> None:
    """But for what layers above the memory would have seen of its beginning: nothing is there before it."""
    trainer = make_trainer(tiny, pool, tmp_path / "run")
    rows, model = make_text_rows(pool, CONFIG, 1, random.Random(0)), trainer.model
    memory = trainer.memory.new_state(1, torch.float32)
    memory = memory._replace(weights=torch.randn_like(memory.weights))
    _, _, text, names, _ = trainer._answer(memory, [rows])
    nats, of_names = [], []
    for i in range(CONFIG.text_rows):
        recent = torch.zeros_like(memory.recent)
        y, _ = trainer.memory.read(torch.cat((rows.before[i], rows.hidden[i]))[None], memory.weights, recent)
        h, pieces = rows.hidden[i][None] + y[:, CONFIG.context :], []
        parts: Sequence[Parts] = [x.new_parts(1, torch.float32) for x in model.upper]
        for start in range(0, h.shape[1], 64):
            call = model.place(torch.tensor([start]), None, len(h[0, start : start + 64]))
            piece, parts = model._walk(model.upper, h[:, start : start + 64], call, parts)
            pieces.append(model.finish(piece, y[:, CONFIG.context :][:, start : start + 64]))
        loss = F.cross_entropy(model.logits(torch.cat(pieces, dim=1)[0]), rows.targets[i], reduction="none")
        nats.append(loss[rows.targets[i] != -100])
        of_names.append(loss[rows.is_name[i]])
    torch.testing.assert_close(text, torch.cat(nats).mean())
    torch.testing.assert_close(names, torch.cat(of_names).mean())


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
    leads = {len(question.targets[question.targets != -100]) > question.answer for question in pool.unanswered.values()}
    assert leads == {True, False}, "what a reader has begun to say is not known, either"
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
    ends = [i for i, fact in enumerate(facts, 1) if fact.holds]
    first = ends[-CONFIG.held_out_facts - 1]  # what a list of those held out told before is with them
    train, held_out = facts[:first], facts[first:]
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
    known = {asking.lead for asking in ASKINGS["test"]} & {FULL_ANSWER, *(asking.lead for asking in askings)}
    assert known == {"The {a} of the {t} is", "The {t}'s {a} was"}, "docs/evaluation.md names them"
    for _ in range(100):
        assert a_statement("test", rng) in STATEMENTS["test"] and an_asking("test", rng) in ASKINGS["test"]


@pytest.mark.parametrize("count", [1, 16, 17, 400])
def test_the_fewest_words_make_as_many_facts_as_they_are_for(count: int) -> None:
    """The last one of all there can be is drawn, too."""
    words = words_of([TEXT.read_text(encoding="utf-8")])[: fewest_words(count)]
    facts = make_families(count, random.Random(0), words, listed=False)
    assert len({re.sub("-", " ", fact.thing) for fact in facts}) == count
    with pytest.raises(AssertionError):
        make_families(count, random.Random(0), words[1:], listed=False)


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


def test_a_memory_is_fixed_where_nothing_of_it_learns() -> None:
    whole = TrainingConfig()
    assert whole.adapting().is_memory_fixed
    assert not any(each.is_memory_fixed for each in (whole, whole.going_on(), whole.finding(), whole.answering()))


def test_a_share_of_the_recipe_is_the_recipe_with_less_of_everything_that_takes_time() -> None:
    whole, tenth = TrainingConfig(), TrainingConfig().scaled(0.1)
    assert (tenth.key_steps, tenth.num_facts) == (whole.key_steps // 10, whole.num_facts // 10)
    assert [s.num_steps for s in tenth.stages] == [s.num_steps // 10 for s in whole.stages]
    assert whole.scaled(1.0) == whole
    for lesson in (whole.answering(), whole.adapting()):
        assert lesson.scaled(1.0) == lesson, "without the lessons before it"
        assert (lesson.scaled(0.1).key_steps, lesson.scaled(0.1).value_steps) == (0, 0)
    least = whole.scaled(1e-6)
    assert least.num_facts - least.held_out_facts >= least.held_out_facts, "enough to learn from, and to ask for"
    assert least.haystack_tokens > max(stage.num_tokens for stage in least.stages), "a document has room in the texts"
    assert {stage.num_steps for stage in least.stages} == {1}
