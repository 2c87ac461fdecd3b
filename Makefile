# make reproduce   set up and run the main job on the embedded default
# make check       between two edits: style, types and every test that takes a moment (six of seven)
# make test        everything: make lint and all tests
# make lint        style, types and generated pages, as both begin
# make docs        write the generated pages of docs/ anew
# make ui          open the MLflow UI on what was run
# make clean       remove results (not the environment)

PYTHON ?= python3
CORES ?= all
CONFIG ?= config.yaml
RESULTS ?= results
# Processes that share the tests, one for each core; the tests of a file stay together, where its fixtures are.
WORKERS ?= logical
VENV := .venv
RUN := $(VENV)/bin/python
PYTEST := $(RUN) -m pytest -n $(WORKERS) --maxprocesses 16 --dist loadfile --no-loadscope-reorder

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Hundreds of processes start: without bytecode each would compile the library anew.
unexport PYTHONDONTWRITEBYTECODE
# Nothing is sent anywhere by any library used.
export DO_NOT_TRACK := true
export MLFLOW_DISABLE_TELEMETRY := true
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: reproduce check test lint docs ui clean

reproduce: $(VENV)/.ready
	$(RUN) -m snakemake --cores $(CORES) --configfile "$(CONFIG)"

check: lint
	$(PYTEST) -m "not workflow and not families and not slow"

test: lint
	$(PYTEST)

lint: $(VENV)/.ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m snakefmt --check Snakefile rules
	$(RUN) docs/generate.py --check

docs: $(VENV)/.ready
	$(RUN) docs/generate.py

ui: $(VENV)/.ready
	$(RUN) workflow_scripts/ui.py --results "$(RESULTS)"

clean:
	rm -rf results

# torch first and alone: plain "torch" in a list of requirements may bring a build for graphics cards of several gigabytes.
$(VENV)/.ready: pyproject.toml envs/requirements.lock
	test -x "$(RUN)" || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet torch==2.13.0
	$(RUN) -m pip install --quiet --constraint envs/requirements.lock --editable '.[dev]'
	touch $@
