"""Out of training: a Hugging Face folder from an iterator of named tensors, and a sample of text."""

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, set_seed
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

DTYPE = "torch_dtype" if transformers.__version__.startswith("4.") else "dtype"
MARK = {"exported_by": "train.py --export_hf"}  # in the metadata of the weights
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "none": torch.float32}


def export_hf(
    folder: Path,
    config: dict,
    tokenizer: PreTrainedTokenizerBase,
    shapes: dict[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, torch.Tensor]],
    dtype: str,
    writer: Callable,
) -> Path:
    """Writes config, weights, tokenizer and generation config to `folder`, which appears when it is whole.

    `writer(path, {name: (dtype, shape)}, metadata)` writes a safetensors file one tensor at a time, so that no more than one is in
    memory. An earlier export in `folder` is replaced; anything else there is refused with a ValueError.
    """
    if folder.exists() and any(folder.iterdir()) and not _is_export(folder):
        raise ValueError(
            f"{folder} holds something other than an exported model: choose another --output_path"
        )
    temporary = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with writer(
            temporary / "model.safetensors",
            {name: (DTYPES[dtype], shape) for name, shape in shapes.items()},
            MARK,
        ) as file:
            for name, tensor in tensors:
                file.add(name, tensor.to(DTYPES[dtype]))
            file.finish()
        hf_config = model_config(config)
        hf_config.architectures, hf_config.use_cache = ["LlamaForCausalLM"], True
        setattr(hf_config, DTYPE, DTYPES[dtype])
        hf_config.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        generation_config(hf_config, tokenizer).save_pretrained(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _is_export(folder: Path) -> bool:
    """Whether this function wrote the folder: only then may it be replaced."""
    if not (folder / "model.safetensors").is_file():
        return False
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return MARK.items() <= (file.metadata() or {}).items()


def model_config(values: dict) -> LlamaConfig:
    """The configuration that a checkpoint carries."""
    return LlamaConfig.from_dict(values)


def generation_config(config: LlamaConfig, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Generation stops at the end of a turn and at the end of a document, whichever of them the tokenizer has."""
    stops = [config.eos_token_id] if isinstance(config.eos_token_id, int) else list(config.eos_token_id or [])
    vocabulary = tokenizer.get_vocab()
    stops += [
        vocabulary[token]
        for token in ("<|end_of_text|>", "<|endoftext|>", "<|eot_id|>", "<|im_end|>")
        if token in vocabulary
    ]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0] if stops else None
    return GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=sorted(set(stops)) or None, pad_token_id=pad
    )


def load_model(
    source: Path | dict, tensors: Iterable[tuple[str, torch.Tensor]] | None, dtype: str
) -> LlamaForCausalLM:
    """transformers' model from its folder, or from a configuration and named tensors."""
    if tensors is None:
        return LlamaForCausalLM.from_pretrained(source, **{DTYPE: DTYPES[dtype]}).eval()
    config = model_config(source)
    config.use_cache = True
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    missing = model.load_state_dict(
        {name: tensor.to(DTYPES[dtype]) for name, tensor in tensors}, strict=False, assign=True
    ).missing_keys
    if config.tie_word_embeddings:
        missing = [name for name in missing if name != "lm_head.weight"]
        model.lm_head.weight = model.model.embed_tokens.weight
    if missing:
        raise ValueError(f"the checkpoint holds no {', '.join(missing[:3])}: it was saved from another model")
    model.model.rotary_emb = LlamaRotaryEmbedding(config=config)
    return model.eval()


def generate_text(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int, seed: int
) -> str:
    """The prompt and its continuation, sampled with the seed (temperature 0.7, nucleus 0.9)."""
    set_seed(seed)
    ids = tokenizer(prompt, return_tensors="pt", split_special_tokens=True).input_ids
    if not ids.shape[1]:
        raise ValueError("--generate needs a prompt of at least one token")
    config = generation_config(model.config, tokenizer)
    config.do_sample, config.temperature, config.top_p, config.max_new_tokens = True, 0.7, 0.9, max_new_tokens
    with torch.no_grad():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return tokenizer.decode(output[0], skip_special_tokens=True)
