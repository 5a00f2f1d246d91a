"""Writes named tensors as a Hugging Face folder, whole or not at all."""

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from errors import UserError, naming
from tokens import DOCUMENT_SEPARATORS, document_separator

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
EXPORT_MARK = {"exported_by": "train.py --export_hf"}  # in the metadata of the weights
# What an export holds, by the file of its tensors.
EXPORTED = {
    "model.safetensors": {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    | {"special_tokens_map.json", "chat_template.jinja"},
    "adapter_model.safetensors": {"adapter_config.json"},
}


def export_hf(
    folder: Path, config: dict, tokenizer, shapes: dict, tensors: Iterable, dtype: str, writer: Callable
) -> None:
    """Write config, weights, tokenizer and generation config to `folder`; `exported` says how.

    `shapes` are {name: shape}, `tensors` pairs (name, tensor). Raises ValueError if they are not those of the
    configuration.
    """
    torch_dtype = getattr(torch, DTYPES[dtype])
    # transformers 5 reads `dtype`, and transformers 4 `torch_dtype`. A Llama needs no code of its own.
    saved = {"use_cache": True, "dtype": DTYPES[dtype], "torch_dtype": DTYPES[dtype]}
    hf_config = LlamaConfig.from_dict({name: config[name] for name in config if name != "auto_map"} | saved)
    tokenizer.init_kwargs.pop("auto_map", None)
    _check_shapes(hf_config, shapes)
    specs = {name: (torch_dtype, shape) for name, shape in shapes.items()}
    with exported(folder, "model.safetensors", specs, tensors, writer) as new:
        for part in (hf_config, tokenizer, generation_config(hf_config, tokenizer)):
            with naming(folder):
                part.save_pretrained(new)


@contextlib.contextmanager
def exported(folder: Path, weights: str, specs: dict, tensors: Iterable, writer: Callable) -> Iterator[Path]:
    """Write the tensors, and yield the folder for the other files, which then becomes `folder`.

    `specs` are {name: (dtype, shape)}, `tensors` pairs (name, tensor). `writer(path, specs, mark)` writes a
    safetensors file one tensor at a time, so that memory holds no more than one. An export replaces an
    earlier one of its kind; raises ValueError if `folder` holds anything else.
    """
    folder = folder.resolve()
    _check_folder(folder, weights)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        new = Path(temporary, "new")
        new.mkdir()
        with writer(new / weights, specs, EXPORT_MARK) as file:
            for name, tensor in tensors:
                file.add(name, tensor.to(specs[name][0]))
            file.finish()
        yield new
        if folder.exists():
            folder.rename(Path(temporary, "old"))
        new.rename(folder)


def _check_folder(folder: Path, weights: str) -> None:
    """Raises UserError if the folder is there and holds anything but an export with that file."""
    if folder.is_file():
        raise UserError(f"{folder} is a file, and an export is a folder", "Give another --output_path")
    found, mark = {path.name for path in folder.glob("*")}, None
    with contextlib.suppress(SafetensorError, FileNotFoundError):
        mark = safe_open(folder / weights, "pt").metadata()
    foreign = found - EXPORTED[weights] - {weights} if EXPORT_MARK.items() <= (mark or {}).items() else found
    if foreign:
        kind = weights.split(".")[0].removesuffix("_model")
        names = ", ".join(sorted(foreign)[:3])
        raise UserError(
            f"{folder} holds something other than an exported {kind} ({names})", "Give another --output_path"
        )


def _check_shapes(config: LlamaConfig, shapes: dict) -> None:
    """Raises UserError if a Llama of this configuration has other parameters."""
    with torch.device("meta"):
        state = LlamaForCausalLM(config).state_dict()
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    needed = {(name, tuple(tensor.shape)) for name, tensor in state.items() if name not in tied}
    given = {(name, tuple(shape)) for name, shape in shapes.items() if name not in tied}
    for name, shape in sorted(needed ^ given)[:1]:
        difference = "lacks" if (name, shape) in needed else "has a surplus"
        raise UserError(
            f"the checkpoint {difference} {name} {shape}",
            "Give the --model_id and --num_hidden_layers that it was trained with",
        )


def generation_config(config: LlamaConfig, tokenizer) -> GenerationConfig:
    """Generation stops at the end of a turn and of a document: at every such token that the tokenizer has."""
    vocabulary, eos = tokenizer.get_vocab(), config.eos_token_id
    names = (*DOCUMENT_SEPARATORS, "<|eot_id|>", "<|im_end|>")
    stops = [vocabulary[name] for name in names if name in vocabulary]
    stops = {*stops, document_separator(tokenizer), *(eos if isinstance(eos, list) else [eos])}
    stops = sorted(stops - {None})
    pad = (stops or [None])[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=stops or None, pad_token_id=pad)
