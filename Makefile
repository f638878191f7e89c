# `make demo` and `make test` need Python 3.11 or newer and nothing else: they make their own environment in .venv.
# From another folder: make -C path/to/ecvae-diffusers demo

# The shell finds the path, since make's functions can't handle spaces in it.
ROOT := $(shell list='$(MAKEFILE_LIST)'; cd "$$(dirname "$${list# }")" && pwd)
$(if $(ROOT),,$(error The path of this Makefile can't be determined: call make with -C))
PYTHON ?= python3
IN_ROOT := cd "$(ROOT)" && .venv/bin/python

.PHONY: demo test test-slow docs quality style pipelines notebook cards environment clean

demo: environment  ## Train a VAE and an EC-VAE on digits and compare them: look at demo/comparison.png
	@$(IN_ROOT) examples/demo.py --output_dir demo

test: environment  ## Run the tests, one file at a time on each core
	@cd "$(ROOT)" && OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q --durations=10 --ignore tests/slow -n logical --dist loadfile

test-slow: environment  ## Run the slow tests (several processes, kills), one file at a time on each core
	@cd "$(ROOT)" && OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q --durations=10 -n logical --dist loadfile tests/slow

docs: environment  ## Build the site, docs/_build/html/index.html, with every warning an error
	@cd "$(ROOT)" && .venv/bin/python -m sphinx -q -W -b html -d docs/_build/doctrees docs docs/_build/html

quality: environment  ## Check style and types, and that generated files are up to date
	@$(IN_ROOT) -m ruff check .
	@$(IN_ROOT) -m ruff format --check .
	@$(IN_ROOT) -m mypy
	@$(IN_ROOT) pipelines/generate.py --check
	@$(IN_ROOT) benchmarks/common/results.py --check
	@$(IN_ROOT) docs/notebooks.py --check
	@$(IN_ROOT) docs/check_prose.py

style: environment  ## Fix style
	@$(IN_ROOT) -m ruff check --fix .
	@$(IN_ROOT) -m ruff format .

pipelines: environment  ## Generate the single-file pipelines from src
	@$(IN_ROOT) pipelines/generate.py

notebook: environment  ## Write the notebook of the quickstart from its page
	@$(IN_ROOT) docs/notebooks.py

cards: environment  ## Write the code files of model_cards, so that its models load without the package
	@$(IN_ROOT) pipelines/generate.py --cards

environment:  ## Create .venv with the tested versions of constraints.txt
	@cd "$(ROOT)" && if [ ! -e .venv/.installed ] || [ pyproject.toml -nt .venv/.installed ] || [ constraints.txt -nt .venv/.installed ]; then \
		"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 demo")' && \
		"$(PYTHON)" -m venv .venv && \
		.venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[all]" && \
		touch .venv/.installed; \
	fi

clean:  ## Remove the environment and the demo
	@rm -rf "$(ROOT)/.venv" "$(ROOT)/demo"
