"""Writes named tensors as a Hugging Face folder, and samples text from such a folder."""

import contextlib
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, set_seed

from llama3.assets import DOCUMENT_SEPARATORS, document_separator

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
EXPORT_MARK = {"exported_by": "train.py --export_hf"}  # in the metadata of the weights


def export_hf(
    folder: Path, config: dict, tokenizer, shapes: dict, tensors: Iterable, dtype: str, writer: Callable
) -> None:
    """Write config, weights, tokenizer and generation config to `folder`, which appears when it is whole.

    `shapes` are {name: shape}, `tensors` pairs (name, tensor). `writer(path, {name: (dtype, shape)}, mark)`
    writes a safetensors file one tensor at a time, so that memory holds no more than one.
    An export replaces an earlier one; raises ValueError if `folder` holds anything else.
    """
    folder, mark = folder.resolve(), None
    with contextlib.suppress(SafetensorError, FileNotFoundError):
        mark = safe_open(folder / "model.safetensors", "pt").metadata()
    if folder.exists() and any(folder.iterdir()) and not EXPORT_MARK.items() <= (mark or {}).items():
        raise ValueError(f"{folder} holds something other than an exported model: give another --output_path")
    temporary = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        torch_dtype = getattr(torch, DTYPES[dtype])
        specs = {name: (torch_dtype, shape) for name, shape in shapes.items()}
        with writer(temporary / "model.safetensors", specs, EXPORT_MARK) as file:
            for name, tensor in tensors:
                file.add(name, tensor.to(torch_dtype))
            file.finish()
        # transformers 5 reads `dtype`, and transformers 4 `torch_dtype`.
        saved = {"use_cache": True, "dtype": DTYPES[dtype], "torch_dtype": DTYPES[dtype]}
        hf_config = LlamaConfig.from_dict(config | saved)
        for part in (hf_config, tokenizer, _generation_config(hf_config, tokenizer)):
            part.save_pretrained(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _generation_config(config: LlamaConfig, tokenizer) -> GenerationConfig:
    """Generation stops at the end of a turn and of a document: at every such token that the tokenizer has."""
    vocabulary, eos = tokenizer.get_vocab(), config.eos_token_id
    names = (*DOCUMENT_SEPARATORS, "<|eot_id|>", "<|im_end|>")
    stops = [vocabulary[name] for name in names if name in vocabulary]
    stops = {*stops, document_separator(tokenizer), *(eos if isinstance(eos, list) else [eos])}
    stops = sorted(stops - {None})
    pad = (stops or [None])[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=stops or None, pad_token_id=pad)


def generate_text(folder: Path, tokenizer, prompt: str, max_new_tokens: int, seed: int, dtype: str) -> str:
    """Return the prompt and its continuation, sampled with temperature 0.7 and top-p 0.9."""
    ids = tokenizer(prompt, return_tensors="pt", split_special_tokens=True).input_ids  # (1, T)
    if not ids.shape[1]:
        raise ValueError("--generate needs a prompt of at least one token")
    # A .bin file would be a pickle, so only safetensors are read.
    options = {"torch_dtype": DTYPES[dtype], "use_safetensors": True, "output_loading_info": True}
    model, loading = LlamaForCausalLM.from_pretrained(folder, **options)
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"the weights lack {', '.join(missing[:3])}: they were saved from another model")
    config = _generation_config(model.config, tokenizer)
    config.do_sample, config.temperature, config.top_p, config.max_new_tokens = True, 0.7, 0.9, max_new_tokens
    set_seed(seed)
    with torch.no_grad():
        output = model.eval().generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return tokenizer.decode(output[0], skip_special_tokens=True)
