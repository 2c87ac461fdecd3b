# make reproduce   set up and run the main job on the embedded default
# make test        set up and pass the tests
# make lint        style, types and generated pages, as make test begins
# make docs        write the generated pages of docs/ anew
# make ui          open the MLflow UI on what was run
# make clean       remove results (not the environment)

PYTHON ?= python3
CORES ?= all
CONFIG ?= config.yaml
RESULTS ?= results
VENV := .venv
RUN := $(VENV)/bin/python

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Nothing is sent anywhere by any library used.
export DO_NOT_TRACK := true
export MLFLOW_DISABLE_TELEMETRY := true
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: reproduce test lint docs ui clean

reproduce: $(VENV)/.ready
	$(RUN) -m snakemake --cores $(CORES) --configfile "$(CONFIG)"

test: lint
	$(RUN) -m pytest

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
