"""Tools that people point at OpenAI's API: lm-eval's local-completions and LangChain. `make interop` installs them."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI
from support.models import TinyCheckpoint, write_tiny_checkpoint
from support.servers import LiveServer, free_port
from titans_server.settings import Settings

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / ".venv-interop/bin"
QUESTIONS = [(f"Question {i}: what is the code?\nAnswer:", [" one", " two", " three"], i % 3) for i in range(6)]

pytestmark = pytest.mark.skipif(not (TOOLS / "lm_eval").exists(), reason="the tools are not installed: make interop")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    checkpoint = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    config = checkpoint.body / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token": "<|im_end|>"}))
    return checkpoint


@pytest.fixture(scope="module")
def server(checkpoint: TinyCheckpoint) -> Iterator[LiveServer]:
    own = {"body": checkpoint.body, "memory": checkpoint.memory, "dtype": "float32", "threads": 1}
    with LiveServer(Settings.model_validate({"port": free_port(), "store": "memory://"} | own)) as server:
        yield server


def run(server: LiveServer, folder: Path, *command: str | Path) -> str:
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "NO_PROXY": "*"}
    environment = {**os.environ, **offline, "TITANS_BASE_URL": server.url}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def write_tasks(folder: Path) -> None:
    rows = [{"question": q, "choices": c, "answer": a} for q, c, a in QUESTIONS]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kinds: dict[str, dict[str, object]] = {
        "choose": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}],
        },
        "say": {
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{choices[answer]}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
            "metric_list": [{"metric": "exact_match"}],
        },
        "read": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{question}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
    }
    shared: dict[str, object] = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{folder}/data.jsonl"}},
    }
    for name, kind in kinds.items():  # JSON is YAML
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, "test_split": "test", **shared, **kind}))


def accuracy(server: LiveServer) -> float:
    """By our own sums of what an echo tells of the choices' tokens, which in this model are bytes."""
    with OpenAI(base_url=f"{server.url}/v1", api_key="none") as ai:

        def score(question: str, choice: str) -> float:
            echoed = ai.completions.create(
                model="tiny-0", prompt=question + choice, echo=True, logprobs=0, max_tokens=0, temperature=0
            )
            logprobs = echoed.choices[0].logprobs
            assert logprobs is not None
            assert logprobs.token_logprobs is not None
            return sum(logprobs.token_logprobs[len(question) :])

        right = [max(range(3), key=lambda i: score(q, c[i])) == a for q, c, a in QUESTIONS]
    return sum(right) / len(right)


@pytest.mark.timeout(600)
def test_lm_eval_scores_and_generates(server: LiveServer, checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    write_tasks(tmp_path)
    model = f"model=tiny-0,base_url={server.url}/v1/completions,tokenizer={checkpoint.body},max_length=200"
    options = [
        "--model",
        "local-completions",
        "--model_args",
        f"{model},tokenizer_backend=huggingface,num_concurrent=2",
    ]
    options += ["--include_path", str(tmp_path), "--tasks", "choose,say,read", "--batch_size", "2"]
    run(server, tmp_path, TOOLS / "lm_eval", "run", *options, "--output_path", str(tmp_path / "out"))
    (written,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(written.read_text())["results"]
    assert results["choose"]["acc,none"] == pytest.approx(accuracy(server))
    assert results["say"]["exact_match,none"] == 0.0
    assert results["read"]["word_perplexity,none"] > 1


@pytest.mark.timeout(600)
def test_langchain_asks_in_every_way(server: LiveServer, tmp_path: Path) -> None:
    told = json.loads(run(server, tmp_path, TOOLS / "python", Path(__file__).parent / "langchain_script.py"))
    assert told.pop("tokens") == 8
    assert len(set(told.values())) == 1
    assert told["whole"]
