# Everything a person or a machine does with this repository. Needs Python 3.11 to 3.13 and make, nothing else.
PYTHON ?= python3
BIN := .venv/bin
PACKAGE := src algorithms envs
PROJECT := $(PACKAGE) tests examples benchmarks configs docs
RUN := runs/ppo-cartpole-$(shell date +%Y%m%d-%H%M%S)

.PHONY: train test check docs format install bench wheel-test clean

train: .venv/installed  ## Train PPO on CartPole-v1, plot the learning curve, evaluate.
	$(BIN)/rlx train configs/ppo.yaml --run-dir $(RUN)
	$(BIN)/rlx plot $(RUN) -o $(RUN)/curve.png
	$(BIN)/rlx eval $(RUN) --episodes 30

test: .venv/installed-dev check  ## Every test, slow ones included.
	$(BIN)/python -m pytest -m "slow and not gpu" -n 2

check: .venv/installed-dev  ## What every commit passes: format, lint, types, fast tests.
	$(BIN)/ruff format --check $(PROJECT)
	$(BIN)/ruff check $(PROJECT)
	$(BIN)/pyright
	$(BIN)/python -m pytest -m "not slow and not gpu" -n 2

docs: .venv/installed-dev  ## Write the pages that are made from the code.
	$(BIN)/python docs/generate.py

format: .venv/installed-dev  ## Format and sort imports.
	$(BIN)/ruff format $(PROJECT)
	$(BIN)/ruff check --fix $(PROJECT)

install: .venv/installed-dev  ## Make .venv with rlx (editable) and the development tools.

bench: .venv/installed-dev  ## Measure rlx beside its peers, into docs/benchmarks.md.
	$(BIN)/python benchmarks/ppo.py
	$(BIN)/python benchmarks/asynchronous.py
	$(BIN)/python benchmarks/stays_solved.py
	$(BIN)/python benchmarks/runner.py
	$(BIN)/python benchmarks/core.py
	$(BIN)/python benchmarks/cluster.py --out docs
	$(BIN)/python benchmarks/generation.py
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/sync.py
	$(BIN)/python benchmarks/grpo.py
	$(BIN)/python benchmarks/end_to_end.py
	$(BIN)/python benchmarks/time_to_solved.py
	$(BIN)/python benchmarks/memory.py

wheel-test: .venv/installed-dev  ## Build the wheel, install it elsewhere, train from there.
	$(BIN)/python tests/wheel_check.py

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:  ## Remove everything that can be made again.
	rm -rf .venv build dist *.egg-info src/*.egg-info .pytest_cache .ruff_cache
