"""The answer to a flag that does not exist: what other trainers call ours, and what this program lacks."""

import difflib
from collections.abc import Iterable

from errors import UserError

CLOSE = 0.8  # difflib's ratio from which a spelling is close
HELP_FIX = "List the flags with `python train.py --help`"

# Another trainer's name -> our flag. From transformers, TRL, Axolotl, LLaMA-Factory, torchtune, nanochat.
ALIASES = {
    "adapter": "lora_rank",
    "base_model": "model_id",
    "batch_size": "global_batch_size",
    "bf16": "precision",
    "block_size": "max_seq_len",
    "bs": "global_batch_size",
    "checkpoint": "resume_from",
    "checkpoint_path": "resume_from",
    "clip_grad": "clip_gnorm",
    "clip_grad_norm": "clip_gnorm",
    "context_length": "max_seq_len",
    "cutoff_len": "max_seq_len",
    "data": "dataset_id",
    "data_path": "dataset_id",
    "data_seed": "seed",
    "dataset": "dataset_id",
    "dataset_name": "dataset_id",
    "dataset_prepared_path": "dataset_path",
    "dataset_text_field": "text_column",
    "datasets": "dataset_id",
    "ddp_timeout": "timeout_seconds",
    "depth": "num_hidden_layers",
    "device_batch_size": "micro_batch_size",
    "do_eval": "evaluate",
    "dtype": "precision",
    "enable_activation_checkpointing": "recompute",
    "epochs": "max_epochs",
    "eval_every": "val_every_n_train_steps",
    "eval_interval": "val_every_n_train_steps",
    "eval_steps": "val_every_n_train_steps",
    "eval_strategy": "val_every_n_train_steps",
    "evals_per_epoch": "val_every_n_train_steps",
    "evaluation_strategy": "val_every_n_train_steps",
    "finetuning_type": "lora_rank",
    "full_determinism": "deterministic",
    "grad_clip": "clip_gnorm",
    "grad_norm": "clip_gnorm",
    "gradient_accumulation_steps": "grad_accumulation_steps",
    "gradient_checkpointing": "recompute",
    "gradient_clipping": "clip_gnorm",
    "logging_dir": "log_dir",
    "lora_r": "lora_rank",
    "lora_target": "lora_targets",
    "lora_target_linear": "lora_targets",
    "lora_target_modules": "lora_targets",
    "lr": "learning_rate",
    "lr_scheduler_type": "lr_scheduler",
    "max_grad_norm": "clip_gnorm",
    "max_length": "max_seq_len",
    "max_seq_length": "max_seq_len",
    "max_steps": "max_train_steps",
    "max_steps_per_epoch": "max_train_steps",
    "max_tokens": "max_new_tokens",
    "mixed_precision": "precision",
    "model": "model_id",
    "model_max_length": "max_seq_len",
    "model_name": "model_id",
    "model_name_or_path": "model_id",
    "n_layer": "num_hidden_layers",
    "num_epochs": "max_epochs",
    "num_iterations": "max_train_steps",
    "num_layers": "num_hidden_layers",
    "num_train_epochs": "max_epochs",
    "out_dir": "save_dir",
    "output_dir": "save_dir",
    "per_device_eval_batch_size": "micro_batch_size",
    "per_device_train_batch_size": "micro_batch_size",
    "prompt": "generate",
    "rank": "lora_rank",
    "resume": "resume_from",
    "resume_from_checkpoint": "resume_from",
    "resume_from_step": "resume_from",
    "save_every": "save_every_n_train_steps",
    "save_interval": "save_every_n_train_steps",
    "save_steps": "save_every_n_train_steps",
    "save_strategy": "save_every_n_train_steps",
    "save_total_limit": "keep_last_n_checkpoints",
    "saves_per_epoch": "save_every_n_train_steps",
    "scheduler": "lr_scheduler",
    "seq_len": "max_seq_len",
    "sequence_len": "max_seq_len",
    "sequence_length": "max_seq_len",
    "steps": "max_train_steps",
    "tensor_parallel_degree": "plan_ngpus",
    "tensor_parallel_size": "plan_ngpus",
    "tokenizer": "tokenizer_id",
    "tokenizer_name": "tokenizer_id",
    "tokenizer_name_or_path": "tokenizer_id",
    "torch_compile": "compile",
    "torch_dtype": "precision",
    "total_batch_size": "global_batch_size",
    "train_batch_size": "global_batch_size",
    "train_file": "dataset_id",
    "val_set_size": "validation_fraction",
    "val_size": "validation_fraction",
    "warmup": "warmup_steps",
    "warmup_iters": "warmup_steps",
    "warmup_ratio": "warmup_steps",
    "wd": "weight_decay",
}

_ADAMW = ("the optimizer is always AdamW", "Leave it out; CONTRIBUTING.rst says where to change it")
_PACKED = ("samples are always packed without padding", "Leave it out")
_QUANTIZED = ("quantized weights are not supported", "Use --lora_rank, whose frozen weights are in bf16")
_SHARDED = ("FSDP2 always shards weights, gradients and optimizer state", "Leave it out")
_UPLOAD = ("this program never uploads", "Export with --export_hf, then upload the folder with `hf upload`")
_SECRET = ("a token is never a flag", "Set the environment variable HF_TOKEN")
_WANDB = ("wandb's own settings are environment variables", "Set WANDB_PROJECT, and --report_to=wandb")
# A name of another trainer for which there is no flag -> the reason and the way out.
LACKING = {
    "deepspeed": _SHARDED,
    "fsdp": _SHARDED,
    "fsdp_config": _SHARDED,
    "zero_stage": _SHARDED,
    "push_to_hub": _UPLOAD,
    "hub_model_id": _UPLOAD,
    "hub_token": _SECRET,
    "hf_token": _SECRET,
    "token": _SECRET,
    "fp16": ("fp16 is not supported", "Use --precision=bf16 or --precision=fp32"),
    "load_in_4bit": _QUANTIZED,
    "load_in_8bit": _QUANTIZED,
    "qlora": _QUANTIZED,
    "quantization_bit": _QUANTIZED,
    "optim": _ADAMW,
    "optimizer": _ADAMW,
    "packing": _PACKED,
    "sample_packing": _PACKED,
    "group_by_length": _PACKED,
    "pad_to_sequence_len": _PACKED,
    "lora_dropout": ("adapters have no dropout", "Leave it out"),
    "dropout": ("Llama has no dropout", "Leave it out"),
    "trust_remote_code": ("this program never runs code from a model's repository", "Leave it out"),
    "overwrite_output_dir": (
        "nothing is overwritten: a fresh start sets the earlier run aside",
        "Leave it out",
    ),
    "do_train": ("training is what happens without a mode", "Leave it out"),
    "logging_steps": ("every step is logged", "Leave it out"),
    "dataloader_num_workers": (
        "batches are made from prepared data in the run's own process",
        "Leave it out",
    ),
    "flash_attn": ("attention always uses torch's fused kernels", "Leave it out"),
    "flash_attention": ("attention always uses torch's fused kernels", "Leave it out"),
    "attn_implementation": ("attention always uses torch's fused kernels", "Leave it out"),
    "use_liger_kernel": ("the loss never holds all logits; no kernel needs to be chosen", "Leave it out"),
    "template": ("the chat template is the tokenizer's", "Choose the tokenizer with --tokenizer_id"),
    "chat_template": ("the chat template is the tokenizer's", "Choose the tokenizer with --tokenizer_id"),
    "stage": ("only pretraining and supervised fine-tuning are supported", "Leave it out"),
    "rl": ("only pretraining and supervised fine-tuning are supported", "Leave it out"),
    "run_name": ("a run is named by its folder", "Name it with --save_dir"),
    "wandb_project": _WANDB,
    "wandb_run_name": _WANDB,
}


def unknown_flag(name: str, flags: Iterable[str]) -> UserError:
    """Return the error for a flag that does not exist.

    name: as it was written, such as --batch-size. flags: the names that may stand there.
    """
    word = name.strip("-").replace("-", "_")
    if word in LACKING:
        reason, fix = LACKING[word]
        return UserError(f"there is no flag {name}: {reason}", fix)
    flags = list(flags)
    if ALIASES.get(word) in flags:
        return UserError(f"unknown flag {name}", f"Use --{ALIASES[word]}")
    matches = difflib.get_close_matches(word, flags, n=1, cutoff=CLOSE)
    if matches:
        return UserError(f"unknown flag {name}", f"Use --{matches[0]}, if that is meant")
    return UserError(f"unknown flag {name}", HELP_FIX)
