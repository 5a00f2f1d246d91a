"""Wrong input is one message that says what came, what is needed and the fix, and exit code 2."""

import json
import shutil
import stat
from pathlib import Path

import pytest
from helpers.runs import ROOT, make_text, outputs, python

import train
from cli.config import parse
from cli.settings import batch_sizes
from llama3 import presets

# The flags of every case. The folders and files are those of `place`.
GOOD = "--model_id=model --dataset_id=text.jsonl --max_seq_len=32 --precision=fp32 --global_batch_size=4"
# Flags beside the good ones -> what the message must contain: what came, what is needed, the fix.
WRONG = {
    # values and names of flags
    "--max_train_steps=0": "--max_train_steps must be >= 1 (got 0)",
    "--learning_rate=-1": "--learning_rate must be >= 0 (got -1.0)",
    "--learning_rate=inf": "--learning_rate must be finite (got inf)",
    "--learning_rate=nan": "--learning_rate must be >= 0 (got nan)",
    "--validation_fraction=1": "--validation_fraction must be below 1 (got 1.0)",
    "--recompute=some": "--recompute, 'some', full, a number of layers",
    "--dp_replicate=2": "--dp_replicate=2, does not divide 1 ranks",
    "--precision=fp16": "--precision, 'fp16', 'bf16', 'fp32'",
    "--seed=4294967296": "--seed, below 2^32 (got 4294967296)",
    "--max_train_steps=0 --seed=-1 --recompute=x": "--max_train_steps, --seed, --recompute",
    "--learning_rte=1": "--learning_rte, Use --learning_rate",
    "--lr=1": "--lr, Use --learning_rate",
    "--batch-size=2": "--batch-size, Use --global_batch_size",
    "--deepspeed=x.json": "--deepspeed, FSDP2, Leave it out",
    "--from_scratch=True": "--from_scratch takes no value, Write --from_scratch alone",
    "--prepare_data --evaluate": "--prepare_data, --evaluate, not allowed",
    "--plan_ngpus=2": "--plan_ngpus=2 needs nnScaler, Leave it out, --engine=nnscaler",
    "--engine=native --pas_policy=tp": "--pas_policy=tp needs nnScaler, Leave it out, --engine=nnscaler",
    "--plan_ngpus=0": "--plan_ngpus must be >= 1 (got 0)",
    # batch sizes
    "--global_batch_size=4096": "text-32 has, training samples, 4096, lower, --global_batch_size",
    "--micro_batch_size=1000": "1000, does not divide, 4, Use micro_batch_size 2 or 4",
    "--grad_accumulation_steps=3 --global_batch_size=8": "3, 8, Leave grad_accumulation_steps out",
    "--resume_from=last --grad_accumulation_steps=3": "3, global_batch_size 4, Leave",
    # models
    "--model_id=./gone": "./gone, neither a folder here nor a hub id, Check the name",
    "--model_id=owner/name": "cannot download model owner/name, HF_HUB_OFFLINE, local folder, --demo",
    "--model_id=text.jsonl": "text.jsonl is neither a folder, Check the name",
    "--model_id=checkpoints/last": "--model_id=checkpoints/last, --resume_from, --export_hf",
    "--model_id=checkpoints/merged.ckpt": "merged.ckpt, --resume_from, --export_hf",
    "--model_id=adapter": "adapter is an adapter, --resume_from, --export_hf",
    "--chat --model_id=model": "model has no chat template, --generate",
    "--model_id=gpt2": "gpt2 is a model of type 'gpt2', 'llama'",
    "--model_id=mute": "mute has no tokenizer.json, --tokenizer_id=llama3",
    "--model_id=torn": "torn/model.safetensors cannot be read, Download",
    "--model_id=lists": "lists/model.safetensors.index.json, weight_map, Download",
    "--model_id=more": "more holds no tensor model.layers.3, Give the flags of its model",
    "--model_id=fewer": "fewer holds model.layers.2, lacks, Give the flags of its model",
    "--model_id=narrow": "has shape, Give the flags of the checkpoint's model",
    "--model_id=small": "token id, the model's vocabulary has 96, --tokenizer_id",
    "--model_id=checkpoints/hf": "would be set aside, checkpoints/hf, another --save_dir",
    # prepared data
    "--dataset_path=gone --seed=3": "gone is not prepared, --seed=3, text-32 (text.jsonl, 32 tokens)",
    "--dataset_path=text-32 --max_seq_len=64": "32 tokens, --max_seq_len is 64, Use --max_seq_len=32",
    "--dataset_path=text-32 --dataset_id=other.jsonl": "text.jsonl, other.jsonl, Leave --dataset_id out",
    "--validation_fraction=0.3": "validation_fraction 0.2, 0.3, Leave --validation_fraction out",
    "--dataset_path=rotten-32": "rotten-32, checksum, prepare it again",
    "--tokenizer_id=other": "another tokenizer (model) than other, --tokenizer_id=model",
    # folders
    "--save_dir=notes": "notes is not empty and was not made by a run, --save_dir",
    "--log_dir=notes": "notes is not empty, --log_dir, or an empty folder",
    "--save_dir=text.jsonl/ckpt": "text.jsonl/ckpt cannot be written, another --save_dir",
    "--save_dir=/proc/ckpt": "/proc/ckpt cannot be written, another --save_dir",
    "--log_dir=/proc/log": "/proc/log cannot be written, --log_dir",
    f"--save_dir={'n' * 256}": "nnn, File name too long, Name a folder",
    # resuming
    "--resume_from=gone": "there is no checkpoint gone, Train first, merged file",
    "--resume_from=checkpoints": "checkpoints is a folder of checkpoints, checkpoints/0000-0002, 'last'",
    "--resume_from=model": "model is a model, --model_id=model",
    "--resume_from=checkpoints/last --model_id=more": "num_hidden_layers 3, not 4, Leave out the flags",
    "--resume_from=last --num_hidden_layers=1": "num_hidden_layers 3, not 1, Leave out the flags",
    "--resume_from=last --model_id=theta": "10000.0, not, 500000.0, Leave out the flags, --export_hf",
    "--resume_from=last --dataset_id=other.jsonl": "other-32 holds other data, text-32, --allow_changed_data",
    "--resume_from=last --dataset_path=text-32 --dataset_id=other.jsonl": "Leave --dataset_id out",
    "--resume_from=last --tokenizer_id=other": "another tokenizer (model), --tokenizer_id=model",
    "--resume_from=damaged/0000-0002": "0000-0002/shard, does not match its checksum, Use another",
    "--resume_from=last --save_dir=damaged": "0000-0002/shard, does not match its checksum, Use another",
    "--resume_from=best --save_dir=unlinked": "unlinked holds 0000-0002, no 'best', 'last'",
    "--resume_from=last --save_dir=linked": "linked/last leads to, of another folder, --resume_from=",
    # other modes
    "--evaluate --resume_from=last --save_dir=gone": "not a checkpoint in gone, Train first, --save_dir",
    "--evaluate --resume_from=last --model_id=more": "num_hidden_layers 3, not 4, Leave out the flags",
    "--evaluate --dataset_path=other-32 --dataset_id=other.jsonl": "no validation, --validation_fraction",
    "--prepare_data --dataset_id=gone.txt": "--dataset_id=gone.txt does not exist, a glob",
    "--prepare_data --dataset_id=bad.jsonl": "bad samples (3), :1: column 'text' is, :2: not JSON, --skip",
    "--prepare_data --dataset_id=few.txt": "fewer than one sample of --max_seq_len=32, Give more text",
    "--prepare_data --dataset_id=latin.txt": "latin.txt:1: not UTF-8, save it as UTF-8",
    "--prepare_data --dataset_id=chats.jsonl": "no chat template, --tokenizer_id",
    "--prepare_data --seed=1": "text-32 holds text.jsonl, seed 0, now 1, another --dataset_path",
    "--prepare_data --dataset_path=notes": "notes exists, not a prepared data set, another --dataset_path",
    "--prepare_data --dataset_path=/proc/x/data": "/proc/x, Name a folder that can be written",
    "--merge_checkpoint=text.jsonl": "text.jsonl is not a checkpoint, Name a checkpoint folder",
    "--merge_checkpoint=damaged/0000-0002": "0000-0002/shard, checksum, Use another",
    "--merge_checkpoint --save_dir=unlinked": "no checkpoint unlinked/last, such as unlinked/0000-0002",
    "--merge_checkpoint --output_path=text.jsonl": "text.jsonl exists, Give another --output_path",
    "--merge_checkpoint --output_path=checkpoints/last": "checkpoints/last exists, another --output_path",
    "--merge_checkpoint --output_path=few.txt/x": "few.txt, Name a folder that can be written",
    "--export_hf=new": "there is no checkpoint new, --output_path is where a result goes",
    "--export_hf --output_path=few.txt": "few.txt is a file, another --output_path",
    "--export_hf --output_path=notes": "notes holds something other, another --output_path",
    "--export_hf --output_path=other": "other holds something other than an exported model",
    "--export_hf --output_path=checkpoints": "checkpoints holds something other, another --output_path",
    "--export_hf --model_id=theta": "10000.0, not, 500000.0, Leave out the flags",
    "--generate= --resume_from=last": "--generate got an empty prompt, Give a prompt",
    "--generate=x --resume_from=last --num_hidden_layers=4": "num_hidden_layers 3, not 4, Leave out",
    "--generate=x --model_id=torn": "torn/model.safetensors cannot be read, Download",
    "--generate=x --model_id=fewer": "fewer have a surplus model.layers.2, another model",
    "--verify_resume --resume_from=last": "--verify_resume, Leave --resume_from out",
    "--plan --resume_from=last": "--plan, Leave --resume_from out",
    "--verify_resume --max_train_steps=3": "--max_train_steps=3, at least 4 steps",
}


FILES = {"bad.jsonl": '{"text": 1}\nno JSON\n[]\n', "chats.jsonl": '{"prompt": "x", "completion": "y"}'}
FILES |= {"few.txt": "few", "latin.txt": "caf\xe9", "notes/diary.pdf": "mine"}
FILES |= {"adapter/adapter_config.json": "{}", "torn/model.safetensors": "torn"}
FILES |= {"lists/model.safetensors.index.json": '{"weight_map": ["x"]}'}
THETA = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
CHANGED = {"more": {"num_hidden_layers": 4}, "fewer": {"num_hidden_layers": 2}, "theta": THETA}
CHANGED |= {"gpt2": {"model_type": "gpt2"}, "small": {"vocab_size": 96}, "narrow": {"intermediate_size": 96}}
CHANGED |= dict.fromkeys(("other", "mute", "torn", "lists"), {})


@pytest.fixture(scope="module")
def place(tiny, tmp_path_factory):
    """A user's folder: models, texts, prepared data, a run of two steps, and damaged copies of them."""
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = json.loads(Path(shutil.copytree(tiny, "model"), "config.json").read_text())
        for name, changes in CHANGED.items():
            Path(shutil.copytree(tiny, name), "config.json").write_text(json.dumps(config | changes))
        Path("mute/tokenizer.json").unlink()
        tokenizer = json.loads(Path("other/tokenizer.json").read_text())
        vocabulary = tokenizer["model"]["vocab"]
        del vocabulary[max(vocabulary, key=vocabulary.get)], tokenizer["model"]["merges"][-1]
        Path("other/tokenizer.json").write_text(json.dumps(tokenizer))
        for name, content in FILES.items():
            Path(name).parent.mkdir(exist_ok=True)
            Path(name).write_text(content, "latin-1")
        for seed, name in enumerate(("text.jsonl", "other.jsonl")):
            make_text(Path(name), 60, seed)
            split = f"--validation_fraction={0.2 * (not seed)}"
            assert train.main([*GOOD.split(), "--prepare_data", f"--dataset_id={name}", split]) == 0
        for flag in ("--max_train_steps=2", "--merge_checkpoint", "--export_hf"):
            assert train.main([*GOOD.split(), flag]) == 0
        copies = {"text-32": "rotten-32", "checkpoints": "damaged"}
        copied = [Path(shutil.copytree(*names, symlinks=True)) for names in copies.items()]
        for file in (path for copy in copied for path in [*copy.glob("t*/*.arrow"), *copy.glob("0*/shard*")]):
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
        shutil.copytree("checkpoints", "unlinked", ignore=shutil.ignore_patterns("last", "best"))
        Path("linked").mkdir()
        Path("linked/last").symlink_to("../checkpoints/0000-0002")
    return folder


def everything(folder: Path) -> dict:
    """What each path is, and when a file or link was written; a lock file may say who held it last."""
    found = ((path, path.lstat()) for path in folder.rglob("*") if path.name != ".run.lock")
    return {path: (s.st_mode, s.st_size, stat.S_ISDIR(s.st_mode) or s.st_mtime_ns) for path, s in found}


@pytest.fixture
def refused(flags, capfd):
    """Calls main, which must return 2; returns what it says: a line for each wrong flag at most."""

    def call(*wrong, good=flags):
        assert train.main([*good, *wrong]) == 2
        said = capfd.readouterr().err
        assert "Traceback" not in said and said.count("train.py: ") == 1
        return said.partition("train.py: ")[2]

    return call


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_is_a_sentence_with_the_fix_and_changes_nothing(refused, place, monkeypatch, wrong):
    monkeypatch.chdir(place)
    before = everything(place)
    said = refused(*wrong.split(), good=[*GOOD.split(), "--max_train_steps=4"])
    assert all(word in said for word in WRONG[wrong].split(", ")), said
    after = everything(place)
    if "bad samples" not in said:
        assert said.count("\n") <= len(wrong.split()), "more than one line for each flag"
        assert after == before
    assert before.items() <= after.items() and all(".preparing" in str(new) for new in after.keys() - before)


def test_a_gated_model_without_a_token_names_variable_page_and_demo(prepared, tmp_path):
    run, env = [f"--dataset_path={prepared}", "--max_seq_len=32"], dict(HF_TOKEN="", HF_HOME=str(tmp_path))
    done = python("train.py", *run, check=False, real=True, **env)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    page = "https://huggingface.co/meta-llama/Meta-Llama-3-8B-Instruct"
    assert all(word in done.stderr for word in ("HF_TOKEN", page, "--demo"))


def test_a_missing_last_is_a_warning_and_a_fresh_start(flags, tmp_path, caplog):
    assert train.main([*flags, "--resume_from=last", "--max_train_steps=1", *outputs(tmp_path)]) == 0
    assert "there is no 'last' checkpoint" in caplog.text and (tmp_path / "ckpt" / "last").exists()


def test_an_explicit_flag_beside_a_preset_wins():
    config = parse(["--demo", "--max_seq_len=128", "--learning_rate=1e-3"]).config
    assert (config.max_seq_len, config.learning_rate, config.model_id) == (128, 1e-3, "smollm2-135m")
    mini = parse(["--mini", "--num_hidden_layers=2"]).config
    assert (mini.from_scratch, mini.num_hidden_layers, mini.max_seq_len) == (True, 2, 4096)
    assert mini.dataset_path == "./bookcorpus-4096" and mini.tokenizer_id == "llama3"


def test_an_explicit_batch_flag_wins_over_checkpoint_and_demo():
    def sizes(*given, resumed=None):
        return batch_sizes(parse(given), resumed or {})

    assert sizes("--demo") == {"global_batch_size": presets.DEMO["global_batch_size"]}
    assert sizes("--demo", "--grad_accumulation_steps=3") == {"grad_accumulation_steps": 3}
    assert sizes(resumed={"global_batch_size": 64}) == {"global_batch_size": 64}
    assert sizes("--global_batch_size=16", resumed={"global_batch_size": 64}) == {"global_batch_size": 16}


# Flags, paths and combinations that are answered before torch and the like are imported.
EARLY = [
    "--max_train_steps=0",
    "--lr=1",
    "--demo --mini",
    "--config=gone.yaml",
    "--model_id=./gone",
    "--prepare_data --tokenizer_id=./gone",
    "--dataset_path=gone",
    "--dataset_path=text-32 --max_seq_len=64",
    "--micro_batch_size=1000",
    "--grad_accumulation_steps=3 --global_batch_size=8",
    "--resume_from=new/gone",
    "--merge_checkpoint=new/gone",
    "--export_hf --save_dir=new",
    "--save_dir=text.jsonl/ckpt",
    "--log_dir=/proc/log",
    "--merge_checkpoint=checkpoints/last --output_path=few.txt/x",
    "--plan --resume_from=last",
    "--generate= --resume_from=last",
    "--lora_rank=2 --from_scratch",
]
TRY_EARLY = """
import json, sys
import train
codes = [train.main(words) for words in json.loads(sys.argv[1])]
print(json.dumps([codes, sorted({"torch", "transformers", "datasets", "numpy"} & set(sys.modules))]))
"""


def test_wrong_input_is_answered_before_heavy_imports(place):
    cases = [[*GOOD.split(), *wrong.split()] for wrong in EARLY]
    process = python("-c", TRY_EARLY, json.dumps(cases), cwd=place, real=True, PYTHONPATH=str(ROOT))
    assert json.loads(process.stdout) == [[2] * len(cases), []], process.stderr
