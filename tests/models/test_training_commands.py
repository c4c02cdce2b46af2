"""`train` refuses what cannot be trained and leaves the rest alone; `average` makes a mean of memories."""

import json
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.models import TinyCheckpoint, write_tiny_checkpoint
from support.training import TEXT
from titans import backbone
from titans.backbone import load_backbone
from titans.checkpoint import build, digest, load, memory_tensors, read_header, ready, save_memory
from titans.config import MemoryConfig, TitansConfig
from titans.evaluation.facts import words_of
from titans.model import TitansModel
from titans.training import __main__ as training
from titans.training.__main__ import add_arguments, run
from titans.training.config import MEMORY
from titans.training.score import Scorer
from titans.training.states import cache_states
from titans_client import cli
from torch import Tensor


@pytest.mark.parametrize("lesson", ["--keys", "--answers", "--norms"])
def test_a_lesson_by_itself_is_for_a_memory_that_is_there(lesson: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = ArgumentParser()
    add_arguments(parser)
    assert run(parser.parse_args(["--test-text", str(TEXT), lesson, "--", str(TEXT)])) == 2
    assert "--start" in capsys.readouterr().err


def test_weights_that_are_none_are_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = ["--start", str(tmp_path / "none"), "--run", str(tmp_path / "run")]
    assert cli.main(["train", str(TEXT), "--test-text", str(TEXT), *start]) == 1
    assert "not a memory checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_weights_to_go_on_from_are_of_this_body_and_shape_or_refused_before_any_work(
    tiny: TinyCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = run_nothing(monkeypatch)
    body, start = load_backbone(tiny.body), tmp_path / "start.safetensors"
    thresholds = replace(MEMORY, write_threshold=0.0, read_threshold=0.1, protected_keys=3)
    memory = replace(thresholds, margin_threshold=0.1)  # which may be any
    shape = TitansConfig(body.config, memory, memory_layers=(2,), readout=True)
    files = ["--body", str(tiny.body), "--run", str(tmp_path / "run"), "--start", str(start)]
    train = ["train", str(TEXT), "--test-text", str(TEXT), *files, "--layer"]
    for config, of_body, layer, error in (
        (shape, "another", "2", "another body"),
        (shape, digest(tiny.body), "1", "another shape"),
        (replace(shape, readout=False), digest(tiny.body), "2", "another shape"),
    ):
        save_memory(build(body, config), of_body, start)
        assert cli.main([*train, layer]) == 1
        assert error in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
    save_memory(build(body, shape), digest(tiny.body), start)
    assert cli.main([*train, "2"]) == 0
    assert ended == [tmp_path / "run" / "log.json"]


@pytest.mark.parametrize(
    ("lessons", "kept"),
    [
        (["--answers"], (0.3, 0.2, 0.1, 9)),
        (["--norms"], (0.3, 0.2, 0.1, 9)),
        (["--keys"], (0.02, 0.0, 0.0, 0)),
        ([], (0.02, 0.0, 0.0, 0)),
    ],
)
def test_what_is_not_taught_to_write_keeps_its_settings(
    lessons: list[str],
    kept: tuple[float, float, float, int],
    tiny: TinyCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_nothing(monkeypatch)
    body, start = load_backbone(tiny.body), tmp_path / "start.safetensors"
    memory = replace(MEMORY, write_threshold=0.3, read_threshold=0.2, margin_threshold=0.1, protected_keys=9)
    save_memory(build(body, TitansConfig(body.config, memory, (2,), readout=True)), digest(tiny.body), start)
    files = ["--body", str(tiny.body), "--run", str(tmp_path / "run"), "--start", str(start)]
    assert cli.main(["train", str(TEXT), "--test-text", str(TEXT), *files, "--layer", "2", *lessons]) == 0
    memory = MemoryConfig(**json.loads((tmp_path / "run" / "run.json").read_text())["config"]["memory"])
    assert (memory.write_threshold, memory.read_threshold, memory.margin_threshold, memory.protected_keys) == kept


def test_a_layer_that_the_body_has_not_is_told(
    tiny: TinyCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = ["--body", str(tiny.body), "--run", str(tmp_path / "run")]
    for layer in ("18", "-1"):
        assert cli.main(["train", str(TEXT), "--test-text", str(TEXT), "--layer", layer, *rest]) == 1
        assert capsys.readouterr().err == "titans: train: the body has the layers 0 to 3\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("Käse, und so weiter. ".encode("latin-1"), "is not a text in UTF-8"),
        (b"Too short. " * 2_000, "has 12000 tokens after its first 10,000 characters, 65536 are needed: give a longer"),
    ],
)
def test_a_text_that_cannot_be_scored_on_is_refused_before_any_work(
    tiny: TinyCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: bytes, error: str
) -> None:
    """It is first asked for at the end of a lesson, after hours; and another one would be another run."""
    (tmp_path / "test").write_bytes(text)
    rest = ["--layer", "2", "--body", str(tiny.body), "--run", str(tmp_path / "run")]
    assert cli.main(["train", str(TEXT), "--test-text", str(tmp_path / "test"), *rest]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"titans: train: {tmp_path}/test {error}")
    assert not (tmp_path / "run").exists()


def test_what_a_run_is_drawn_with_is_asked_for_before_any_work(
    tiny: TinyCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    rest = ["--layer", "2", "--body", str(tiny.body), "--run", str(tmp_path / "run")]
    assert cli.main(["train", str(TEXT), "--test-text", str(TEXT), *rest]) == 1
    assert 'pip install "titans-server[train]"' in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_folder_with_a_run_of_other_settings_is_refused_and_left(
    tiny: TinyCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would go on, or be finished, and its weights would bear the names of the new ones."""
    trained = run_nothing(monkeypatch)
    text, test_text = tmp_path / "text", tmp_path / "test"
    text.write_text("a")
    test_text.write_text(TEXT.read_text())
    rest = ["--test-text", str(test_text), "--body", str(tiny.body), "--run", str(tmp_path / "run")]
    assert cli.main(["train", str(text), "--layer", "2", *rest]) == 0
    assert cli.main(["train", str(text), "--layer", "2", *rest]) == 0
    for change, name in ((["--layer", "1"], "layer"), (["--layer", "2", "--seed", "1"], "config")):
        assert cli.main(["train", str(text), *change, *rest]) == 1
        assert f"another {name}" in capsys.readouterr().err
    text.write_text("b")
    assert cli.main(["train", str(text), "--layer", "2", *rest]) == 1
    assert "another texts" in capsys.readouterr().err
    text.write_text("a")
    test_text.write_text(TEXT.read_text() + "b")
    assert cli.main(["train", str(text), "--layer", "2", *rest]) == 1
    assert "another test_text" in capsys.readouterr().err
    assert len(trained) == 2


def run_nothing(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Let runs make an empty pool and train nothing. Returns where those that end have their logs."""
    ended: list[Path] = []
    monkeypatch.setattr(training, "cache_states", lambda *_: None)
    monkeypatch.setattr(training, "save_pool", lambda _, path: path.touch())
    monkeypatch.setattr(training, "load_pool", lambda _: None)
    monkeypatch.setattr(training, "plot", lambda log, _: ended.append(log))
    monkeypatch.setattr(training, "Trainer", lambda *_, **given: given["scorer"])
    monkeypatch.setattr(Scorer, "train", lambda *_: None, raising=False)
    return ended


def test_a_run_that_was_killed_has_its_folder_as_soon_as_there_is_a_pool(
    tiny: TinyCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_nothing(monkeypatch)

    def killed(_: None, path: Path) -> None:
        path.touch()
        raise KeyboardInterrupt

    train = ["train", str(TEXT), "--test-text", str(TEXT), "--body", str(tiny.body), "--run", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(training, "save_pool", killed)
        assert cli.main([*train, "--layer", "2"]) == 130
    assert cli.main([*train, "--layer", "1"]) == 1
    assert "another layer" in capsys.readouterr().err
    assert cli.main([*train, "--layer", "2"]) == 0


def test_a_folder_in_which_another_process_trains_is_refused_and_left(
    tiny: TinyCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both would write one run, and a run of no pool yet would be taken for one of other settings."""
    ended, refused = run_nothing(monkeypatch), list[int]()
    train = ["train", str(TEXT), "--test-text", str(TEXT), "--body", str(tiny.body), "--run", str(tmp_path / "run")]

    def meanwhile(_: None, path: Path) -> None:
        refused.extend(cli.main([*train, "--layer", layer]) for layer in ("1", "2"))
        path.touch()

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_pool", meanwhile)
        assert cli.main([*train, "--layer", "2"]) == 0
    assert refused == [1, 1]
    error = f"titans: train: another process is at work in {tmp_path}/run: name another folder with --run\n"
    assert capsys.readouterr().err == 2 * error
    assert cli.main([*train, "--layer", "2"]) == 0
    assert len(ended) == 2


@pytest.mark.parametrize("command", ["train", "scratch"])
@pytest.mark.parametrize("seed", ["-1", str(1 << 64), "some"])
def test_a_seed_is_one_that_every_generator_takes(command: str, seed: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "mac", "--seed", seed]) == 2
    assert "--seed: not a number from 0 to 4294967295" in capsys.readouterr().err


def test_a_run_that_finds_its_pool_draws_what_the_one_that_made_it_drew(
    tiny: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A readout's first weights and the values that keys are taught with are drawn by torch."""
    run_nothing(monkeypatch)
    begun: list[list[Tensor]] = []

    def begin(model: TitansModel, *_: object, scorer: Scorer, **rest: object) -> Scorer:
        begun.append([*memory_tensors(model).values(), torch.rand(4)])
        return scorer

    monkeypatch.setattr(training, "Trainer", begin)
    rest = ["--layer", "2", "--body", str(tiny.body), "--run", str(tmp_path / "run")]
    for _ in range(2):
        assert cli.main(["train", str(TEXT), "--test-text", str(TEXT), *rest]) == 0
    for first, second in zip(*begun, strict=True):
        assert torch.equal(first, second)


def test_a_run_whose_texts_were_too_short_leaves_its_folder_to_one_of_longer_texts(
    tiny: TinyCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = run_nothing(monkeypatch)
    (tmp_path / "short").write_text("short")
    rest = ["--test-text", str(TEXT), "--layer", "2", "--body", str(tiny.body), "--run", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(training, "cache_states", cache_states)
        assert cli.main(["train", str(tmp_path / "short"), *rest]) == 1
    assert "give more or longer texts" in capsys.readouterr().err
    assert cli.main(["train", str(TEXT), *rest]) == 0
    assert len(ended) == 1


def test_more_texts_than_the_lessons_have_room_for_are_refused_before_any_work(
    tiny: TinyCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = ["--test-text", str(TEXT), "--layer", "2", "--body", str(tiny.body), "--run", str(tmp_path / "run")]
    assert cli.main(["train", *[str(TEXT)] * 180, "--share", "1e-6", *rest]) == 1
    error = "of 180 texts 512 tokens each are read, 652 are needed: give fewer texts"
    assert capsys.readouterr().err == f"titans: train: {error}\n"
    assert not [*(tmp_path / "run").glob("*.pt")]


@pytest.mark.parametrize("count", [0, 3, 190])
def test_texts_with_too_few_words_to_make_facts_of_are_refused_before_any_work(
    tiny: TinyCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int
) -> None:
    line = " ".join([*words_of([TEXT.read_text(encoding="utf-8")])[:count], "и так далее. "])
    (tmp_path / "text").write_text(line * (140_000 // len(line)), encoding="utf-8")
    rest = ["--test-text", str(TEXT), "--layer", "2", "--body", str(tiny.body), "--run", str(tmp_path / "run")]
    assert cli.main(["train", str(tmp_path / "text"), "--share", "1e-6", *rest]) == 1
    what = "words of 4 to 10 letters, a to z, that are there three times"
    error = f"the texts have {count} {what}, 191 are needed: give more or other texts"
    assert capsys.readouterr().err == f"titans: train: {error}\n"
    assert not [*(tmp_path / "run").glob("*.pt")]


@pytest.mark.parametrize("settings", [None, "", '{"layer": 2', "[2]", "2"])
def test_a_folder_that_does_not_tell_what_its_run_is_of_is_refused(
    tiny: TinyCheckpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    settings: str | None,
) -> None:
    run_nothing(monkeypatch)
    (tmp_path / "pool.pt").touch()
    if settings is not None:
        (tmp_path / "run.json").write_text(settings)
    rest = ["--layer", "2", "--body", str(tiny.body), "--run", str(tmp_path)]
    assert cli.main(["train", str(TEXT), "--test-text", str(TEXT), *rest]) == 1
    error = f"{tmp_path}/run.json does not tell what the run is of: name another folder with --run"
    assert capsys.readouterr().err == f"titans: train: {error}\n"


def test_the_mean_of_memories_has_each_by_its_share(tiny: TinyCheckpoint, tmp_path: Path) -> None:
    model = load(tiny.body, tiny.memory, device=torch.device("cpu"), dtype=torch.float32).model
    first = {name: x.clone() for name, x in memory_tensors(model).items()}
    adapted, other = set(model.adapted), tmp_path / "other.safetensors"
    model.load_state_dict({name: x + 1 for name, x in first.items()}, strict=False)
    choosy = replace(model.config.memory, write_threshold=0.1, read_threshold=0.4, protected_keys=2)
    choosy = replace(choosy, margin_threshold=0.1)
    model.config = replace(model.config, memory=choosy)
    save_memory(model, digest(tiny.body), other)
    memories = [str(tiny.memory), str(other)]
    body = ["--body", str(tiny.body), "--out", str(tmp_path / "mean.safetensors")]
    assert cli.main(["average", *memories, "--shares", "1", "3", *body]) == 0
    mean = load(tiny.body, tmp_path / "mean.safetensors", device=torch.device("cpu"), dtype=torch.float32).model
    for name, x in memory_tensors(mean).items():
        torch.testing.assert_close(x, first[name] + 0.75, msg=name)
    assert cli.main(["average", *memories, "--shares", "5e307", "1.5e308", *body]) == 0
    mean = load(tiny.body, tmp_path / "mean.safetensors", device=torch.device("cpu"), dtype=torch.float32).model
    for name, x in memory_tensors(mean).items():
        torch.testing.assert_close(x, first[name] + 0.75, msg=name)
    assert mean.memories[0].config == choosy, "the last one's"
    thresholds = ["--write-threshold", "0.2", "--read-threshold", "0.3", "--margin-threshold", "0.2"]
    settings = [*thresholds, "--protected-keys", "4"]
    assert cli.main(["average", *memories, *settings, *body]) == 0
    set_ones = replace(choosy, write_threshold=0.2, read_threshold=0.3, margin_threshold=0.2, protected_keys=4)
    assert read_header(tmp_path / "mean.safetensors")[0].memory == set_ones
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


def test_a_memory_writes_more_evenly_and_strongly_where_it_is_told_to(tiny: TinyCheckpoint, tmp_path: Path) -> None:
    out = tmp_path / "mean.safetensors"
    options = ["--write-scale", "0.5", "--write-bias", "1.5", "--answer-scale", "0.5", "--body", str(tiny.body)]
    assert cli.main(["average", str(tiny.memory), *options, "--out", str(out)]) == 0
    before, after = (
        load(tiny.body, path, device=torch.device("cpu"), dtype=torch.float32).model for path in (tiny.memory, out)
    )
    changed = memory_tensors(after)
    for name, x in memory_tensors(before).items():
        expected, of_theta = x.clone(), slice(before.config.memory.num_heads)  # of a memory of one layer
        if name.endswith(".memory.gates.weight"):
            expected[of_theta] *= 0.5
        elif name.endswith(".memory.gates.bias"):
            expected[of_theta] = expected[of_theta] * 0.5 + 1.5
        elif name.endswith(".memory.out.weight"):
            expected *= 0.5
        torch.testing.assert_close(changed[name], expected, msg=name)


def test_what_has_no_mean_is_told(
    tiny: TinyCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = write_tiny_checkpoint(tmp_path, seed=1).memory
    rest = ["--body", str(tiny.body), "--out", str(tmp_path / "mean.safetensors")]
    for memories, status, error in (
        ([str(tiny.memory), str(stranger)], 1, "another body"),
        ([str(tmp_path / "none")], 1, "not a memory checkpoint"),
        ([str(tiny.memory), "--shares", "1", "2"], 2, "2 shares for 1 memories"),
        ([str(tiny.memory), "--shares", "-1"], 2, "not a number above 0"),
        ([str(tiny.memory), "--shares", "nan"], 2, "not a number above 0"),
        ([str(tiny.memory), "--write-bias", "inf"], 2, "not a number"),
        ([str(tiny.memory), "--write-threshold", "0.5"], 1, "let nothing be written"),
        ([str(tiny.memory), "--read-threshold=-1"], 1, "threshold of answers"),
        ([str(tiny.memory), "--answer-scale", "1e300"], 1, "out.weight of the mean would not be finite"),
        ([str(tiny.memory), "--write-scale", "1e300"], 1, "gates.weight of the mean would not be finite"),
        ([str(tiny.memory), "--write-bias", "1e308"], 1, "gates.bias of the mean would not be finite"),
    ):
        assert cli.main(["average", *memories, *rest]) == status
        assert error in capsys.readouterr().err
    assert cli.main(["average", str(tiny.memory), *rest[:2], "--out", "/nowhere/mean.safetensors"]) == 1
    assert "/nowhere/mean.safetensors.part: No such file" in capsys.readouterr().err
    monkeypatch.setattr(backbone, "DEFAULT_BODY_PACKAGE", "not_installed")
    assert cli.main(["average", str(tiny.memory), *rest[2:]]) == 1
    assert "no body" in capsys.readouterr().err
    assert not (tmp_path / "mean.safetensors").exists()
