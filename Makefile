# Targets set up .venv themselves; a line with ## is what `make` lists.
PYTHON ?= python3
PY := .venv/bin/python
TORCHRUN := .venv/bin/torchrun --local-addr=127.0.0.1
INSTALLED := .venv/.installed
# Two processes share the tests, a file at a time, in the order that tests/conftest.py gives them.
PYTEST := $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help demo test test-slow images gpu lint clean

help:
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

$(INSTALLED): requirements.txt requirements-demo.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet -r requirements.txt -r requirements-dev.txt
	$(PY) -m pip install --quiet --no-deps -r requirements-demo.txt
	touch $@

OUT := demo
DEMO := --demo --dataset_path=$(OUT)/sotu-512 --save_dir=$(OUT)/checkpoints --log_dir=$(OUT)/log --keep_last_n_checkpoints=1

demo: $(INSTALLED)  ## fine-tune a real 135M-parameter Llama on two ranks of this machine's CPU
	rm -rf $(OUT)/checkpoints $(OUT)/log $(OUT)/hf
	$(PY) train.py $(DEMO) --prepare_data
	$(TORCHRUN) --nproc_per_node=2 train.py $(DEMO)
	$(TORCHRUN) --nproc_per_node=2 train.py $(DEMO) --resume_from=last --max_train_steps=14
	$(PY) train.py $(DEMO) --merge_checkpoint
	$(PY) train.py $(DEMO) --resume_from=$(OUT)/checkpoints/merged.ckpt --max_train_steps=16
	$(PY) train.py $(DEMO) --evaluate --resume_from=last
	$(PY) train.py $(DEMO) --export_hf --output_path=$(OUT)/hf
	$(PY) train.py $(DEMO) --model_id=$(OUT)/hf --generate="My fellow Americans, the state of our union"
	$(PY) -m tools.curves $(OUT)/log

test: $(INSTALLED) lint  ## the tests, about eight minutes on two cores
	$(PYTEST) -m "not slow"

test-slow: $(INSTALLED)  ## the tests that take longer: the demo, kills, memory
	$(PYTEST) -m "slow and not alone"
	$(PY) -m pytest -m "slow and alone"

images: $(INSTALLED)  ## draw images/ again, from real runs: about an hour
	$(PY) benchmarks/images.py

# Installs nothing: a GPU machine may have a torch of its own, and no network.
gpu:  ## test and measure everything on this machine's GPUs
	$(or $(wildcard $(PY)),$(PYTHON)) benchmarks/gpu.py

lint: $(INSTALLED)  ## check the style
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

clean:  ## remove what these targets made, except .venv
	rm -rf demo .pytest_cache .ruff_cache
