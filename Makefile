# `make demo` and `make test` need Python 3.11 or newer and nothing else: they make their own environment in .venv.
# From another folder: make -C path/to/ecvae-diffusers demo

ROOT := $(dir $(abspath $(lastword $(MAKEFILE_LIST))))
VENV := $(ROOT).venv
BIN := $(VENV)/bin
PYTHON ?= python3
INSTALLED := $(VENV)/.installed

.PHONY: demo test quality style pipelines environment clean

demo: environment  ## Train a VAE and an EC-VAE on digits and compare them: look at demo/comparison.png
	cd "$(ROOT)" && "$(BIN)/python" training/demo.py --output_dir demo

test: environment  ## Run the test suite
	cd "$(ROOT)" && "$(BIN)/python" -m pytest -q --durations=10

quality: environment  ## Check style, and that generated files are up to date
	cd "$(ROOT)" && "$(BIN)/ruff" check . && "$(BIN)/ruff" format --check . && "$(BIN)/python" pipelines/generate.py --check

style: environment  ## Mend style
	cd "$(ROOT)" && "$(BIN)/ruff" check --fix . && "$(BIN)/ruff" format .

pipelines: environment  ## Generate the single-file pipelines from src
	cd "$(ROOT)" && "$(BIN)/python" pipelines/generate.py

environment: $(INSTALLED)

# The tested set of versions, whatever is newest today.
$(INSTALLED): $(ROOT)pyproject.toml $(ROOT)constraints.txt
	"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	"$(PYTHON)" -m venv "$(VENV)"
	cd "$(ROOT)" && "$(BIN)/python" -m pip install --disable-pip-version-check --progress-bar on -c constraints.txt -e ".[all]"
	touch "$(INSTALLED)"

clean:  ## Remove the environment and the demo
	rm -rf "$(VENV)" "$(ROOT)demo"
