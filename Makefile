# Two commands do everything: `make demo` and `make test`. `make help` lists the rest.
VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PYTEST_ARGS ?=
DEMO_ARGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.klft-installed

export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Nothing here needs a hub: the models and the data of demo and tests are made on the spot.
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Variables: VENV=$(VENV) (where the environment goes), PYTHON=$(PYTHON) (3.11 or newer), PYTEST_ARGS, DEMO_ARGS"

# No index option is passed: pip's own configuration decides where packages come from. The constraints pin torch; without
# that pin pip would take the newest build with gigabytes of CUDA packages. editable_mode=compat: else a folder that holds the
# clone, as the current one, would make `import klft` an empty package.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "klft needs Python 3.11 or newer, and found none. Install it, or say PYTHON=/path/to/python."; exit 2; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("klft needs Python 3.11 or newer; $(PYTHON) is %d.%d. Say PYTHON=/path/to/a/newer/python." % v[:2])' || exit 2
	@test -x "$(BIN)/python" || "$(PYTHON)" -m venv "$(VENV)"
	@echo "Installing klft and the tested set of packages into $(VENV) (once; a minute or two) ..."
	@"$(BIN)/python" -m pip install --quiet -c constraints.txt --config-settings editable_mode=compat -e ".[dev]"
	@touch "$@"

demo: $(STAMP)  ## train a small model with PPO under a KL penalty, on two processes; a few minutes on two cores
	@ACCELERATE_USE_CPU=true "$(BIN)/accelerate" launch --config_file accelerate_config.yaml \
		recipes/ppo_reviews.py --config recipes/ppo_reviews.yaml --use_cpu true --overwrite_output_dir true $(DEMO_ARGS)

test: $(STAMP)  ## run the tests (offline, no GPU, about ten minutes on two cores)
	@"$(BIN)/python" -m pytest $(PYTEST_ARGS)

lint: $(STAMP)  ## ruff and pyright
	@"$(BIN)/ruff" check . && "$(BIN)/ruff" format --check . && "$(BIN)/pyright" --pythonpath "$(BIN)/python"

bench: $(STAMP)  ## side-by-side benchmarks; ratios, never absolute times
	@"$(BIN)/python" benchmarks/divergences.py && "$(BIN)/python" benchmarks/fused.py

clean:  ## remove the environment and what the demo wrote
	rm -rf "$(VENV)" demo_out runs
