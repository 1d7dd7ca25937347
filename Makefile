# The front door. `make demo` for a first answer, `make test` for everything that proves it.
# What needs more than a line is a script of its own in deploy/dev/; nothing is written outside this clone.

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test lint arm64 board bench bench-serve faults soak bundle deb deb-lock deb-test protos constraints clean setup-daemon setup-dev setup-protos setup-emulator setup-packages setup-export

MODEL := smollm2-135m
STATE := $(CURDIR)/.cache/state
BUNDLE := .cache/state/models/$(MODEL)/manifest.json
# The model is built again when what builds it has changed.
BUILDER := $(shell find daemon/hearthd/build -type f -not -path '*/__pycache__/*') daemon/hearthd/bundles/manifest.py
# Of the Debian release whose package `make deb-test` installs: 3.11 or 3.13.
SUITE_PYTHON := 3.11

help: ## show these lines
	@sed -n 's/^\([a-z0-9-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 22

demo: setup-daemon $(BUNDLE) ## install what is missing, build the default model, ask it a question
	@deploy/dev/demo.sh "$(STATE)"

test: setup-dev setup-protos setup-export lint $(BUNDLE) ## set up likewise, then lint and the whole test suite (ARGS="-k name")
	.venv/bin/python -m pytest $(ARGS)

lint: setup-dev ## ruff and mypy --strict
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

arm64: setup-dev setup-emulator $(BUNDLE) ## the same greedy answer on an emulated Pi 4 and Pi 5 as here
	.venv/bin/python tests/arm64/compare.py

board: setup-dev setup-packages setup-board $(BUNDLE) ## install the packages on an emulated board, pair, chat, freeze it, pull its plug (ARGS="--cpu cortex-a72")
	.venv/bin/python tests/board/scenario.py $(ARGS)

bench: setup-daemon $(BUNDLE) ## the engine beside its peers, which it installs (ARGS="--rounds 1 --only hearth")
	.venv/bin/python benchmarks/compare.py --bundle "$(dir $(BUNDLE))" $(ARGS)

bench-serve: setup-daemon $(BUNDLE) ## a daemon under load, its targets, and llama-cpp-python's server beside it (ARGS="--only flood")
	.venv/bin/python benchmarks/serve.py --bundle "$(dir $(BUNDLE))" $(ARGS)

faults: setup-dev ## kill, cut the power and break the disk, 200 times each: docs/faults.md
	HEARTH_FAULT_ROUNDS=200 HEARTH_STORE_KILLS=500 .venv/bin/python -m pytest tests/faults tests/test_store.py $(ARGS)

soak: setup-dev $(BUNDLE) ## callers of every kind for ten minutes, and what they leave behind (ARGS="--minutes 60")
	PYTHONPATH=tests .venv/bin/python tests/soak.py $(ARGS)

bundle: $(BUNDLE) ## build the default model into .cache/state

$(BUNDLE): $(BUILDER) | setup-daemon
	STATE_DIRECTORY="$(STATE)" .venv/bin/hearthd model add $(MODEL)

deb: setup-dev setup-packages $(BUNDLE) ## Debian packages of daemon and model for arm64 and amd64 in dist/ (ARGS="--arch arm64")
	.venv/bin/python deploy/debian/build.py --lint --bundle "$(dir $(BUNDLE))" $(ARGS)

deb-test: setup-dev setup-packages $(BUNDLE) ## install, upgrade, roll back and purge the packages in a booted Debian root; needs root
	rm -rf .cache/deb/dist
	.venv/bin/python deploy/debian/build.py --arch amd64 --python $(SUITE_PYTHON) --quick --bundle "$(dir $(BUNDLE))" --output .cache/deb/dist
	HEARTH_PACKAGES=.cache/deb/dist .venv/bin/python -m pytest tests/test_deb_install.py $(ARGS)

deb-lock: setup-dev ## write deploy/debian/requirements.lock after a change of the daemon's requirements
	.venv/bin/python deploy/debian/lock.py

protos: setup-protos ## write client/hearth/v1 from protos/
	deploy/dev/protos.sh client

constraints: setup-dev ## write constraints*.txt from the ranges in pyproject.toml
	.venv/bin/python deploy/dev/constraints.py

clean: ## remove the environments, the built model and every cache
	rm -rf .venv .venv-protos .venv-export .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	find client daemon tests -name __pycache__ -type d -prune -exec rm -rf {} +

setup-daemon:
	@deploy/dev/setup.sh daemon

setup-dev:
	@deploy/dev/setup.sh dev

setup-protos:
	@deploy/dev/setup.sh protos

setup-board:
	@deploy/dev/setup.sh board

setup-export:
	@deploy/dev/setup.sh export

setup-emulator:
	@deploy/dev/setup.sh emulator

setup-packages:
	@deploy/dev/setup.sh packages
