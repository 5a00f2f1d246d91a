# make demo: fine-tunes a real model on two ranks, on this machine's CPU.  make test: the tests.  Both set up .venv themselves.
# make gpu: tests and measures everything on this machine's GPUs.
PYTHON ?= python3
PY := .venv/bin/python
TORCHRUN := .venv/bin/torchrun --standalone
INSTALLED := .venv/.installed

.PHONY: demo test test-slow gpu lint clean

$(INSTALLED): requirements.txt requirements-demo.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet -r requirements.txt -r requirements-dev.txt
	$(PY) -m pip install --quiet --no-deps -r requirements-demo.txt
	touch $@

OUT := demo
DEMO := --demo --dataset_path=$(OUT)/sotu-512 --save_dir=$(OUT)/checkpoints --log_dir=$(OUT)/log --keep_last_n_checkpoints=1

demo: $(INSTALLED)
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

test: $(INSTALLED) lint
	$(PY) -m pytest -m "not slow"

test-slow: $(INSTALLED)
	$(PY) -m pytest -m slow

# Installs nothing: a GPU machine may have a torch of its own, and no network.
gpu:
	$(or $(wildcard $(PY)),$(PYTHON)) benchmarks/gpu.py

lint: $(INSTALLED)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

clean:
	rm -rf demo .pytest_cache .ruff_cache
