"""What is counted, kept in a file, and shown as a table or a picture."""

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from titans.evaluation import table
from titans.evaluation.__main__ import add_arguments, run
from titans.evaluation.names import met_again
from titans.evaluation.perplexity import Perplexity
from titans.evaluation.plot import by_depth, check, plot
from titans.evaluation.results import Results, read_results
from titans.evaluation.scoring import cells, wilson
from titans.evaluation.task import EvaluationError
from titans.tokenizer import Tokenizer


def graded(task: str, tokens: int, index: int, rights: Sequence[bool], *, depth: float = 0.1) -> dict[str, Any]:
    def answer(right: bool) -> dict[str, Any]:
        return {"answer": "", "right": right, "share": float(right)}

    questions = [
        {"depths": [depth], "values": ["1"], "memory": answer(right), "off": answer(False)} for right in rights
    ]
    absent = [{"answer": "", "value": right, "planted": False} for right in rights]
    return {
        "task": task, "tokens": tokens, "index": index, "read": tokens, "questions": questions, "absent": absent
    }  # fmt: skip


def test_cells_count_over_their_documents() -> None:
    first, second = cells(
        [graded("facts", 100, 0, [True, False]), graded("facts", 200, 0, [True]), graded("facts", 100, 1, [True])]
    )
    assert (first.task, first.tokens, first.num_documents) == ("facts", 100, 2)
    assert (first.tallies["memory"].asked, first.tallies["memory"].right) == (3, 2)
    assert first.tallies["memory"].share == pytest.approx(2 / 3)
    assert first.absent == (3, 2, 0)
    assert "full" not in first.tallies
    assert second.tokens == 200


@pytest.mark.parametrize(
    ("right", "asked", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_wilsons_interval(right: int, asked: int, low: float, high: float) -> None:
    assert wilson(right, asked) == pytest.approx((low, high), abs=5e-5)


def test_results_go_on_where_they_ended(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    first = Results(path, {"model": "tiny", "seed": 0})
    first.add([graded("facts", 100, 0, [True])])
    nats = Perplexity({"memory": 3.5, "off": 3.75}, {"memory": 1.0, "off": 2.0}, 7)
    first.add_perplexity(100, nats)
    second = Results(path, {"model": "tiny", "seed": 0})
    assert second.documents == first.documents
    assert second.perplexity == {100: nats}
    second.add([graded("facts", 100, 1, [False])])
    (row,) = json.loads(path.read_text())["cells"]
    assert (row["task"], row["memory"]["asked"], row["memory"]["right"], row["off"]["right"]) == ("facts", 2, 1, 0)
    assert [cell.num_documents for cell in second.cells([("facts", 100, 1), ("facts", 100, 7)])] == [1]
    assert list(tmp_path.iterdir()) == [path]


def test_results_are_durable_before_they_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file before it takes its place, its folder after that: else a power failure may undo what was said."""
    path, synced = tmp_path / "results.json", []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append((os.fstat(file).st_ino, path.exists())))
    Results(path, {"seed": 0}).add([graded("facts", 100, 0, [True])])
    assert synced == [(path.stat().st_ino, False), (tmp_path.stat().st_ino, True)]


def test_two_runs_at_once_leave_what_both_have_measured(tmp_path: Path) -> None:
    """Of two tasks, say. Each had begun before the other wrote anything."""
    path, nats = tmp_path / "results.json", Perplexity({"memory": 1.5}, {}, 0)
    one, other = Results(path, {"seed": 0}), Results(path, {"seed": 0})
    one.add([graded("facts", 100, 0, [True])])
    other.add([graded("varied", 100, 0, [True])])
    one.add_perplexity(100, nats)
    other.add([graded("varied", 100, 1, [True])])
    found = Results(path, {"seed": 0})
    assert list(found.documents) == [("facts", 100, 0), ("varied", 100, 0), ("varied", 100, 1)]
    assert found.perplexity == {100: nats}


def test_of_two_runs_of_other_settings_the_second_to_write_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    one, other = Results(path, {"seed": 0}), Results(path, {"seed": 1})
    one.add([graded("facts", 100, 0, [True])])
    before = path.read_bytes()
    with pytest.raises(EvaluationError, match=r"results of another seed \(0, not 1\)"):
        other.add([graded("facts", 100, 0, [True])])
    assert path.read_bytes() == before


def test_results_of_other_settings_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    Results(path, {"model": "tiny", "seed": 0}).add([graded("facts", 100, 0, [True])])
    before = path.read_bytes()
    with pytest.raises(EvaluationError, match=r"results of another seed \(0, not 1\)"):
        Results(path, {"model": "tiny", "seed": 1})
    assert path.read_bytes() == before
    path.write_text("[1, 2]")
    with pytest.raises(EvaluationError, match="not a file of results"):
        Results(path, {"seed": 1})


def test_where_no_results_can_be_kept_nothing_is_measured() -> None:
    with pytest.raises(OSError):
        Results(Path("/proc/results.json"), {"seed": 0})


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole["documents"][0].pop("questions"),
        lambda whole: whole["documents"][0]["questions"].clear(),
        lambda whole: whole["documents"][0]["questions"][0].pop("memory"),
        lambda whole: whole["documents"][0]["questions"][0]["memory"].pop("right"),
        lambda whole: whole["documents"][0].update(task=["facts"]),
        lambda whole: whole["documents"].append(1),
        lambda whole: whole["perplexity"].append(1),
        lambda whole: whole["perplexity"].append({"tokens": 1, "nats": None, "names": {}, "num_names": 0}),
        lambda whole: whole.pop("settings"),
    ],
)
def test_results_that_are_not_whole_are_refused_before_any_work(
    tmp_path: Path, damage: Callable[[Any], object]
) -> None:
    path = results_file(tmp_path / "results.json", graded("facts", 100, 0, [True, False]))
    whole = json.loads(path.read_bytes())
    damage(whole)
    path.write_text(json.dumps(whole))
    with pytest.raises(EvaluationError, match="not a file of results"):
        read_results([path])


def test_results_that_are_nested_too_deep_are_none(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("[" * 100_000)
    with pytest.raises(EvaluationError, match="not a file of results"):
        read_results([tmp_path / "results.json"])


def results_file(
    path: Path, *documents: dict[str, Any], perplexity: Mapping[int, Perplexity] = {}, **settings: object
) -> Path:
    results = Results(path, {"fingerprint": "f", "text": "t"} | settings)
    results.add(documents)
    for tokens, nats in perplexity.items():
        results.add_perplexity(tokens, nats)
    return path


def run_eval(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args(argv))


def test_several_files_are_shown_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = results_file(tmp_path / "short.json", graded("facts", 100, 0, [True, False]), samples=2)
    long = results_file(tmp_path / "long.json", graded("facts", 200, 0, [True]), graded("varied", 100, 0, [False]))
    assert [x["task"] for x in read_results([short, long])[0]] == ["facts", "facts", "varied"]
    picture = tmp_path / "recall.png"
    assert run_eval("--results", str(short), str(long), "--plot", str(picture)) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head == table.HEAD
    assert [row.split()[:4] for row in rows] == [
        ["facts", "100", "2", "1"],
        ["varied", "100", "1", "0"],
        ["facts", "200", "1", "1"],
    ]
    assert picture.exists()


def test_perplexity_is_shown_beside_what_is_recalled_or_by_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every, one, two = (Perplexity({"memory": nats, "off": 4.0}, {}, 0) for nats in (3.0, 2.0, 1.0))
    both = results_file(tmp_path / "both.json", graded("facts", 100, 0, [True]), perplexity={100: every})
    alone = results_file(tmp_path / "alone.json", perplexity={8_192: one, 2_048: two})
    assert run_eval("--results", str(both), str(alone)) == 0
    nats = [
        "",
        table.perplexity_head(),
        *(table.perplexity_rows(tokens, x) for tokens, x in ((100, every), (2_048, two), (8_192, one))),
    ]
    assert capsys.readouterr().out.splitlines() == [table.HEAD, *map(table.row, cells(read_results([both])[0])), *nats]
    assert run_eval("--results", str(alone)) == 0
    assert capsys.readouterr().out.splitlines() == [*nats[:2], *nats[3:]]


@pytest.mark.filterwarnings("error")
def test_of_perplexity_there_is_no_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = results_file(tmp_path / "alone.json", perplexity={100: Perplexity({"memory": 3.0, "off": 4.0}, {}, 0)})
    picture = tmp_path / "recall.png"
    with pytest.raises(SystemExit) as refused:
        run_eval("--results", str(alone), "--plot", str(picture))
    assert refused.value.code == "--plot draws what tasks recall, and there is none"
    capsys.readouterr()
    local = ["--in-process", "--body", "/nowhere", "--tasks", "perplexity"]
    assert run_eval(*local, "--plot", str(picture)) == 2, "before any work"
    assert capsys.readouterr().err == f"titans: eval: {refused.value.code}\n"
    assert not picture.exists()


def test_files_that_do_not_belong_together_are_not_shown_as_one(tmp_path: Path) -> None:
    ours = results_file(tmp_path / "ours.json", graded("facts", 100, 0, [True]))
    same = results_file(tmp_path / "same.json", graded("facts", 100, 1, [True]))
    other = results_file(tmp_path / "other.json", graded("facts", 200, 0, [True]), fingerprint="g")
    with pytest.raises(EvaluationError, match=r"both have facts at 100 tokens"):
        read_results([ours, same])
    with pytest.raises(EvaluationError, match=r"both have facts at 100 tokens"):
        read_results([ours, ours])
    nats = [results_file(tmp_path / name, perplexity={100: Perplexity({}, {}, 0)}) for name in ("one.json", "two.json")]
    with pytest.raises(EvaluationError, match=r"one.json and .*two.json both have perplexity at 100 tokens"):
        read_results(nats)
    with pytest.raises(EvaluationError, match=r"results of another fingerprint than"):
        read_results([ours, other])
    with pytest.raises(EvaluationError, match=r"missing.json cannot be read: No such file"):
        read_results([tmp_path / "missing.json"])


def test_the_table_is_aligned() -> None:
    (cell,) = cells([graded("multikey_1", 1_048_576, 0, [True] * 99 + [False])])
    row = table.row(cell)
    assert len(row) == len(table.HEAD)
    assert row.split() == [
        *("multikey_1", "1,048,576", "100", "99", "94.6%", "-", "99.8%", "99.0%"),
        *("0", "of", "100", "-", "99", "of", "100", "0", "of", "100"),
    ]
    found = Perplexity({"memory": 3.0, "off": 4.0}, {"memory": 1.0, "off": 2.0, "full": 0.5}, 1_234)
    every, names = table.perplexity_rows(1_048_576, found).splitlines()
    assert len(every) == len(names) == len(table.perplexity_head())
    assert every.split() == ["all", "1,048,576", "3.000", "4.000", "-", "-", "-"]
    assert names.split() == ["1,234", "of", "names", "1,048,576", "1.000", "2.000", "0.500", "-", "-"]
    found = Perplexity({"memory": 3.0, "off": 4.0, "full": 2.0, "body": 5.0, "body_full": 2.5}, {}, 0)
    assert table.perplexity_rows(8, found).split() == ["all", "8", "3.000", "4.000", "2.000", "5.000", "2.500"]
    assert table.perplexity_rows(8, Perplexity({"memory": 3.0, "off": 4.0}, {}, 0)).count("\n") == 0


def test_a_name_is_met_again_past_the_window(tokenizer: Tokenizer) -> None:
    far = " and so on" * 12  # 36 tokens
    text = f"Then Irene came.{far} Irene and Irene went. Then Adler came,{far} then Mrs Adler, the Then of it."
    tokens = tokenizer.encode(text)
    assert [tokenizer.decode([tokens[i]]) for i in met_again(tokens, tokenizer, 30)] == [" Ire", "ne", " Adler"]
    assert met_again(tokens, tokenizer, 60) == []


def test_recall_by_depth_counts_fifths_and_is_drawn(tmp_path: Path) -> None:
    documents = [graded("facts", 100, 0, [True, False], depth=1.0), graded("facts", 200, 0, [True], depth=0.2)]
    assert by_depth(documents) == {100: [(0, 0)] * 4 + [(1, 2)], 200: [(0, 0), (1, 1), (0, 0), (0, 0), (0, 0)]}
    plot(cells(documents), documents, tmp_path / "recall.png")
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_is_where_it_was_asked_for_whatever_its_name(tmp_path: Path) -> None:
    documents = [graded("facts", 100, 0, [True, False])]
    del documents[0]["questions"][0]["off"], documents[0]["questions"][1]["off"]
    for name in ("recall", "recall.foo"):
        plot(cells(documents), documents, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(EvaluationError, match="is a folder"):
        check(tmp_path)
