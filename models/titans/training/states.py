"""Cached hidden states: what the layers below the memory make of the texts, computed once.

Nothing below the memory depends on it. So a training document is put together from states that are there
already, and a step runs the memory, and the layers above it over the questions alone. Everything is computed as a
server would: the texts are streams, and every `stride` tokens a stream branches, into what it would be if a fact
stood there, and into what it would be if the text ended there and a reader asked.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from titans.evaluation.facts import NOT_KNOWN, Fact, fewest_words, make_families, words_of
from titans.evaluation.names import met_again
from titans.files import read_text
from titans.model import TitansModel
from titans.state import State
from titans.tokenizer import Tokenizer
from titans.training.config import TrainingConfig
from titans.training.pool import Pool, Question, Statement, Tails, joined, tails_of

_BRANCHES = 128  # computed at once
_BREATH = 4  # facts that are stated together, at most
_SAID_JUST_NOW = 0.1  # share of questions about what attention still sees
_OTHER_SAID = 0.15  # share of questions before which it sees another fact
_UNANSWERED = 5  # one question of so many is also not answered
_PASSAGES = (8, 16, 32, 64, 128)  # tokens of one that is repeated
_HELD_OUT_WORDS = 10  # one word of so many is kept for the facts that are held out


@torch.no_grad()
def cache_states(model: TitansModel, tokenizer: Tokenizer, texts: list[Path], config: TrainingConfig) -> Pool:
    """What a run trains on. Which memory the model has does not matter, and it may be packed.

    Raises ValueError for texts that are too short or too many, or have too few words.
    """
    window, num_texts = model.config.window, len(texts)
    each = _tokens_each(config, num_texts, window)
    tokens = torch.tensor([_take(tokenizer, path, each) for path in texts])
    _repeat(tokens, round(config.repeating_share * each), random.Random(config.seed))
    rng = random.Random(config.seed)
    words = words_of([read_text(path) for path in texts])
    facts = _make_facts(config, rng, words)
    ends = range(window, each - window + 1, window)  # where streams branch; the text must go on for a window
    asked_ends = ends[:: config.asking_stride]
    stating = _shares(facts, num_texts * len(ends))
    asking = _shares([fact for fact in facts if fact.holds], num_texts * len(asked_ends))

    state = model.new_state(num_texts)
    hidden: list[Tensor] = []
    statements: list[Statement] = []
    replaced: dict[int, list[Statement]] = {}
    questions: list[Question] = []
    unanswered: dict[int, Question] = {}
    tails: list[Tails] = []
    for end in tqdm(range(window, each + 1, window), desc="pool", unit="window"):
        state = model.ingest(tokens[:, end - window : end].to(model.device), state)
        hidden.append(state.tail.cpu())
        if end in ends:
            after = tokens[:, end : end + config.after_tokens]
            for statement, told_before in _state_facts(model, tokenizer, state, stating, after, context=config.context):
                if told_before:
                    replaced[len(statements)] = told_before
                statements.append(statement)
        if end in asked_ends:
            first = num_texts * len(tails)
            asked, unknown = _ask_facts(model, tokenizer, state, asking, first, rng=rng)
            unanswered |= {len(questions) + i: question for i, question in unknown.items()}
            questions += asked
            tails.append(tails_of(model.open(state), end))
    names = _names(tokens, tokenizer, window)
    haystack = torch.cat(hidden, dim=1)
    return Pool(haystack, tokens, names, statements, replaced, questions, unanswered, joined(tails))


def _tokens_each(config: TrainingConfig, num_texts: int, window: int) -> int:
    """Of each text, whole windows. Raises ValueError where a text would have too few to branch from, or to be read."""
    each = config.haystack_tokens // num_texts // window * window
    needed = window + max(window, config.context + config.text_tokens + 1)
    if each < needed:
        raise ValueError(f"of {num_texts} texts {each} tokens each are read, {needed} are needed: give fewer texts")
    return each


def _make_facts(config: TrainingConfig, rng: random.Random, words: list[str]) -> list[Fact]:
    """Those to train on, then those held out, which share no word with them.

    Raises ValueError where the texts have too few `words` for so many that are held out.
    """
    needed = _HELD_OUT_WORDS * (fewest_words(config.held_out_facts) - 1) + 1
    if len(words) < needed:
        what = "words of 4 to 10 letters, a to z, that are there three times"
        raise ValueError(f"the texts have {len(words)} {what}, {needed} are needed: give more or other texts")
    known = [word for i, word in enumerate(words) if i % _HELD_OUT_WORDS]
    facts = make_families(config.num_facts - config.held_out_facts, rng, known)
    return facts + make_families(config.held_out_facts, rng, words[::_HELD_OUT_WORDS], listed=False)


def _shares(facts: Sequence[Fact], count: int) -> Iterator[list[Fact]]:
    """The facts in order, in `count` nearly equal shares; a list is in one of them."""
    bounds = [i * len(facts) // count for i in range(count + 1)]
    bounds = [next((j for j in range(bound, len(facts)) if not facts[j].continues), len(facts)) for bound in bounds]
    for start, stop in itertools.pairwise(bounds):
        yield list(facts[start:stop])


def _take(tokenizer: Tokenizer, path: Path, count: int) -> list[int]:
    """`count` tokens from the middle of a text."""
    text = read_text(path)
    spare = max(0, len(text) - 6 * count) // 2
    tokens = tokenizer.encode(text[spare:])[:count]
    if len(tokens) < count:
        raise ValueError(f"{path} has {len(tokens)} tokens, {count} are needed: give more or longer texts")
    return tokens


def _repeat(tokens: Tensor, count: int, rng: random.Random) -> None:
    """Let the last `count` tokens of each text be one of its passages, over and over; in place."""
    for row in tokens:
        length = rng.choice(_PASSAGES)
        start = rng.randrange(len(row) - count - length)
        row[len(row) - count :] = row[start : start + length].repeat(-(-count // length))[:count]


def _names(tokens: Tensor, tokenizer: Tokenizer, window: int) -> Tensor:
    """Which tokens of each text are of names that a window does not show."""
    names = torch.zeros_like(tokens, dtype=torch.bool)
    for text, row in enumerate(tokens.tolist()):
        names[text, met_again(row, tokenizer, window)] = True
    return names


def _state_facts(
    model: TitansModel,
    tokenizer: Tokenizer,
    state: State,
    shares: Iterator[list[Fact]],
    after: Tensor,
    *,
    context: int,
) -> list[tuple[Statement, list[Statement]]]:
    """What each text would be if facts of its share stood here: one at a time, or a few in one breath.

    Of all that hold, each with what was told of the same thing before.
    """
    rows, runs, groups, places = [], [], [], []
    for text in range(state.batch_size):
        for group in _breaths(next(shares)):
            stated = [_stated(tokenizer, fact) for fact in group]
            rows.append(text)
            runs.append([token for run, _, _ in stated for token in run] + after[text].tolist())
            groups.append(group)
            places.append([(len(run), start, size) for run, start, size in stated])
    branches = zip(_branch(model, state, rows, runs), groups, places, strict=True)
    return [statement for h, group, each in branches for statement in _those_that_hold(h, group, each, context)]


def _those_that_hold(
    hidden: Tensor, facts: list[Fact], places: list[tuple[int, int, int]], context: int
) -> Iterator[tuple[Statement, list[Statement]]]:
    """Of a run of facts; `places`: the tokens of each, where its value begins, and the value's tokens."""
    told_before: dict[str, list[Statement]] = {}
    begun = end = 0
    for i, (fact, (length, start, size)) in enumerate(zip(facts, places, strict=True), 1):
        value, end = end + start, end + length
        told = told_before.setdefault(fact.thing, [])
        if fact.holds:
            stop = len(hidden) if i == len(facts) else end
            yield Statement(hidden[begun:stop].clone(), value - begun, size), told
            begun = stop
        else:
            first = max(0, value - context)
            told.append(Statement(hidden[first : value + size].clone(), value - first, size))


def _stated(tokenizer: Tokenizer, fact: Fact) -> tuple[list[int], int, int]:
    """A statement's tokens, where its value begins, and the value's tokens, with the full stop where one follows.

    What stands in the place of a space before the value, such as a comma, is one of these.
    """
    before = tokenizer.encode(fact.before if _in_list(fact) else f" {fact.before}")
    value, answer = tokenizer.encode(f"{fact.gap}{fact.value}"), tokenizer.encode(f" {fact.value}")
    assert answer[len(answer) - len(value) :] == value, f"{fact.value!r} is made of other tokens in an answer"
    start = len(before) + len(value) - len(answer)
    return before + value + tokenizer.encode(fact.after), start, len(answer) + fact.after.startswith(".")


def _breaths(facts: list[Fact]) -> Iterator[list[Fact]]:
    """The facts in order: mostly one at a time, then some together; a list as it is."""
    alone, group = -(-len(facts) * 2 // 3), list[Fact]()
    for i, fact in enumerate(facts):
        goes_on = fact.continues if _in_list(fact) else i > alone and len(group) < _BREATH and not _in_list(group[0])
        if group and not goes_on:
            yield group
            group = []
        group.append(fact)
    if group:
        yield group


def _in_list(fact: Fact) -> bool:
    return fact.before.startswith("\n")


def _ask_facts(
    model: TitansModel,
    tokenizer: Tokenizer,
    state: State,
    shares: Iterator[list[Fact]],
    first_tail: int,
    *,
    rng: random.Random,
) -> tuple[list[Question], dict[int, Question]]:
    """What would follow if each text ended here and facts of its share were asked for, one at a time.

    Some texts end with a fact: the one that is asked for, or one like it. Some questions come once more, by index, as
    if the fact were not known.
    """
    rows, runs, targets, places, unknown = [], [], [], [], []
    for text in range(state.batch_size):
        facts = next(shares)
        for i, fact in enumerate(facts):
            said = _said_last(tokenizer, facts, i, rng)
            prompt, end = _prompt(tokenizer, fact)
            lead = tokenizer.encode(f" {fact.answer_lead}") if fact.answer_lead else []
            for before, value in ((said, fact.value), ([], NOT_KNOWN)):
                if value is NOT_KNOWN and i % _UNANSWERED:
                    continue
                answer = tokenizer.encode(f" {value}") + tokenizer.encode(".") + end
                rows.append(text)
                runs.append(before + prompt + lead + answer)
                targets.append(torch.tensor([-100] * (len(before + prompt) - 1) + lead + answer + [-100]))
                places.append((len(before + prompt + lead) - 1, len(answer)))
                unknown.append(value is NOT_KNOWN)
    hidden = _branch(model, state, rows, runs)
    asked: list[Question] = []
    unanswered: dict[int, Question] = {}
    for h, target, place, text, is_unknown in zip(hidden, targets, places, rows, unknown, strict=True):
        question = Question(h, target, *place, first_tail + text)
        if is_unknown:
            unanswered[len(asked) - 1] = question
        else:
            asked.append(question)
    return asked, unanswered


def _said_last(tokenizer: Tokenizer, facts: list[Fact], asked: int, rng: random.Random) -> list[int]:
    """The tokens of a statement that stands just before the question, of mostly none."""
    draw = rng.random()
    if draw < _SAID_JUST_NOW:
        return _stated(tokenizer, facts[asked])[0]
    if draw < _SAID_JUST_NOW + _OTHER_SAID and len(facts) > 1:
        return _stated(tokenizer, facts[asked - 1])[0]
    return []


def _prompt(tokenizer: Tokenizer, fact: Fact) -> tuple[list[int], list[int]]:
    """The tokens of what is put to the model, and of what ends its answer."""
    if fact.form == "chat" and tokenizer.has_chat_template:
        return tokenizer.encode_chat([{"role": "user", "content": fact.prompt}]), [tokenizer.eos_token]
    return tokenizer.encode(fact.prompt), tokenizer.encode("\n")


def _branch(model: TitansModel, state: State, rows: list[int], runs: list[list[int]]) -> list[Tensor]:
    """[T, D] for each run of tokens, as if it followed what its row of the states has read."""
    hidden: dict[int, Tensor] = {}
    order = sorted(range(len(runs)), key=lambda i: len(runs[i]))  # padding costs what tokens cost
    for start in range(0, len(runs), _BRANCHES):
        some = order[start : start + _BRANCHES]
        part = [torch.tensor(runs[i]) for i in some]
        hidden |= dict(zip(some, _continue(model, state.select([rows[i] for i in some]), part), strict=True))
    return [hidden[i] for i in range(len(runs))]


def _continue(model: TitansModel, state: State, runs: list[Tensor]) -> list[Tensor]:
    """[T, D] for each run, one a row; a window of tokens at a time."""
    window, pieces = model.config.window, []
    tokens_BT = pad_sequence(runs, batch_first=True)
    for start in range(0, tokens_BT.shape[1], window):
        counts = [min(max(len(run) - start, 0), window) for run in runs]
        part = tokens_BT[:, start : start + window].to(model.device)
        slots = (state.position[:, None] + torch.arange(part.shape[1], device=model.device)) % window
        state = model.ingest(part, state, counts)
        pieces.append(state.tail.take_along_dim(slots[..., None], dim=1).cpu())
    joined = torch.cat(pieces, dim=1)
    return [row[: len(run)].clone() for row, run in zip(joined, runs, strict=True)]
