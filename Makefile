# Everything here sets itself up: a fresh machine needs Python 3.11 or newer, and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint docs docs-output test-vllm test-llama-cpp test-mlx conformance clean

# So small a model is fastest on one thread, above all where other programs want the cores too.
demo: export OMP_NUM_THREADS ?= 1
demo: export HF_HUB_OFFLINE = 1
demo: $(VENV)/ready
	$(BIN)/python -m demo.build_model runs/demo-base
	$(BIN)/python -m demo.texts runs/demo-text
	$(BIN)/qpa run demo/telegrams.yaml
	$(BIN)/python -m demo.table runs/demo

test: $(VENV)/ready
	HF_HUB_OFFLINE=1 $(BIN)/pytest -n 2 --dist loadfile

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Into site/: open site/index.html.
docs: $(VENV)/ready
	$(BIN)/python -m properdocs build --strict -f mkdocs.yml

# Writes what the commands of these pages print into the pages.
docs-output: $(VENV)/ready
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.docs_output docs/quickstart.md docs/troubleshooting.md

test-vllm: $(VENV)/ready
	HF_HUB_OFFLINE=1 bash tests/vllm/run.sh

# Builds llama.cpp from source: it needs a C++ compiler, and minutes.
test-llama-cpp: $(VENV)/ready
	HF_HUB_OFFLINE=1 sh tests/llama_cpp/run.sh

test-mlx: $(VENV)/ready
	HF_HUB_OFFLINE=1 sh tests/mlx/run.sh

# Half an hour, most of it vLLM's.
conformance: test-vllm test-llama-cpp test-mlx
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.conformance.run --out docs/conformance.md \
		--vllm .venv-vllm/bin/python --llama-cpp .venv-llama-cpp/bin/python --mlx .venv-mlx/bin/python

# torch first: constraints.txt names the CPU build's version, and a later resolver keeps it.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .venv-vllm .venv-llama-cpp .venv-mlx build site *.egg-info
