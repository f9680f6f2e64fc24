# make setup | check | test | quickstart | smoke | results-quickstart
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# More threads slow small models down and starve the second process of multi-process runs.
export OMP_NUM_THREADS ?= 1
LAUNCH := $(BIN)/accelerate launch --config_file recipes/accelerate/cpu.yaml -m siesta.rl.train

.PHONY: setup check test quickstart smoke results-quickstart clean

setup: $(VENV)/.installed build/typing/siesta

# torch first and on its own: with it in place no other package asks for a larger build.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "torch>=2.11,<2.14"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

# The type checker does not follow the editable install's import hook; links give it plain folders.
build/typing/siesta:
	mkdir -p $@
	ln -sfn ../../../rl $@/rl
	ln -sfn ../../../rewards $@/rewards
	ln -sfn ../../../data $@/data
	ln -sfn ../../../recipes $@/recipes

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: setup
	$(BIN)/pytest

quickstart: setup
	$(LAUNCH) recipes/quickstart.yaml

smoke: setup
	$(LAUNCH) recipes/smoke.yaml

results-quickstart: setup
	$(BIN)/python -m benchmarks.warmup
	$(BIN)/python -m benchmarks.mode_selection

clean:
	rm -rf build outputs $(VENV)
