# Everything here needs only python3 (3.10 to 3.13) and make; each target installs what it needs.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
PEERS := .venv-peers/bin

help:            ## what can be made
	@grep -hE '^[a-z-]+:.*##' Makefile | sed 's/:[^#]*## */\t/' | expand -t 14

train: .venv/run ## align the built-in base model with ORPO (ARGS="--seed 43" for other flags)
	$(BIN)/python train.py $(ARGS)

test: .venv/dev  ## the tests, a few minutes on two cores
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadgroup -m "not slow"

test-slow: .venv/dev ## the heavy cases
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadgroup -m slow

test-peers: .venv-peers/peers ## our numbers beside TRL's and transformers'
	$(PEERS)/python -m pytest -q tests/peers

gradcheck: .venv/dev ## the gradient, level by level, as a table
	$(BIN)/python -m tests.gradcheck

bench: .venv-peers/peers ## time and memory of a step beside TRL's, and what each idea is worth
	$(PEERS)/python -m bench.peers
	$(PEERS)/python -m bench.ideas --ratios 1:4 4:1 --rounds 2

conformance: .venv-peers/peers ## ours, TRL's, Liger's and others' ORPO against the golden vectors
	$(PEERS)/python -m conformance.run $(ARGS)

lint: .venv/dev  ## ruff, formatting included
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

task: .venv/run  ## rebuild the built-in task: facts, tokenizer, base model, pairs
	$(BIN)/python -m examples.task

plot: .venv/dev  ## draw the figure of the last built-in run
	$(BIN)/python -m tools.plot out/builtin

compare: .venv/dev ## SFT, DPO, ORPO and the probability ratio on the built-in pairs (docs/evidence.md)
	$(BIN)/python -m experiments.compare $(ARGS)

clean:           ## remove environments, caches and runs
	rm -rf .venv .venv-peers out .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/run: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements.txt
	touch $@

.venv/dev: requirements-dev.txt requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements-dev.txt
	touch $@

.venv-peers/peers: requirements-peers.txt requirements-dev.txt requirements.txt
	test -x $(PEERS)/python || $(PYTHON) -m venv .venv-peers
	$(PEERS)/python -m pip install -r requirements-peers.txt
	$(PEERS)/python -m pip install --no-deps liger-kernel
	touch $@

.PHONY: help train test test-slow test-peers gradcheck bench conformance compare lint task plot clean
