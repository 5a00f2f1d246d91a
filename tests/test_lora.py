"""LoRA: a plain loop over peft's own model gives the same numbers, and checkpoints hold adapters alone."""

import math
import shutil

import datasets
import peft
import pytest
import torch
from helpers.corpora import write_jsonl
from helpers.runs import CHATML, assert_same, column, make_model, outputs, python, rows, run_cases
from safetensors.torch import load_file, save_file
from test_training import RANKS, SCHEDULE, factor, mean_loss, plain_loop
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from cli.config import parse
from llama3.loss import chunked_cross_entropy
from llama3.model import Llama
from trainer import ranks
from trainer.checkpoint import Checkpoint

ADAPTER = ["--lora_rank=3", "--lora_alpha=24"]  # no number of ranks but 1 divides the rank
TARGETS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
PREFIX = "base_model.model."  # of names in peft's files


@pytest.fixture(scope="module")
def runs(flags, prepared, tmp_path_factory):
    """Every run of this module; one torchrun for each number of ranks."""
    out = tmp_path_factory.mktemp("lora")
    epoch = 4 * 8 // len(datasets.load_from_disk(str(prepared))["train"])

    def case(name, *more):
        return {name: [*flags, *SCHEDULE, *ADAPTER, *outputs(out / name), *more]}

    def resumed(ranks_, saved, file="half"):  # without the flags of LoRA, which the checkpoint has
        source = f"--resume_from={out / f'{saved}-full' / file}"
        name = f"{saved}-to-{ranks_}"
        return {name: [*flags, *SCHEDULE, *outputs(out / name), source]}

    def full(ranks_):
        (out / f"{ranks_}-full").mkdir()
        (out / f"{ranks_}-full" / "half").symlink_to(f"ckpt/{epoch:04d}-0005")
        return case(f"{ranks_}-full", "--save_every_n_train_steps=5")

    merge = [f"--merge_checkpoint={out / '4-full' / 'half'}"]
    merge = [*flags, *merge, f"--output_path={out / '4-full' / 'merged.ckpt'}"]
    more = case("2-bf16", "--precision=bf16")
    more |= case("2-recomputed", "--recompute=full") | case("2-selective", "--recompute=selective")
    more |= case("2-one-layer", "--recompute=1")
    run_cases(out, 4, full(4) | {"merge": merge})
    run_cases(out, 2, full(2) | resumed(2, 2) | resumed(2, 4) | more)
    run_cases(out, 1, full(1) | resumed(1, 1) | resumed(1, 4, "merged.ckpt"))
    return out


def peft_model(folder, lora_values=None):
    """peft's own model, in fp32; lora_values(name, start, stop) are an adapter's start values."""
    base = AutoModelForCausalLM.from_pretrained(folder).float()
    config = peft.LoraConfig(r=3, lora_alpha=24, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters() if lora_values else ():
        if parameter.requires_grad:
            name = name.removeprefix(PREFIX).replace(".default.", ".")
            parameter.data = lora_values(name, 0, parameter.numel()).view(parameter.shape)
    return model


@pytest.fixture(scope="module")
def reference(tiny, prepared):
    """Losses and gradient norms of a plain loop over peft's model, and the model at the end."""
    ours = Llama(str(tiny), lora=dict(lora_rank=3, lora_alpha=24, lora_targets="all-linear"))
    model = peft_model(tiny, ours.initial_values)
    data = datasets.load_from_disk(str(prepared))["train"]
    return *plain_loop(model, data, 8, 10, factor), model


@pytest.mark.parametrize("run", ["1-full", "2-full", "4-full"])
def test_losses_and_gradient_norms_match_a_plain_loop_over_pefts_model(runs, reference, run):
    for key, expected in zip(("train_loss", "gnorm"), reference, strict=False):
        assert column(runs / run, key) == pytest.approx(expected, rel=1e-4)


def test_bf16_follows_fp32_and_recomputing_changes_no_bit(runs, reference):
    assert column(runs / "2-bf16", "train_loss") == pytest.approx(reference[0], rel=5e-3)
    assert column(runs / "2-bf16", "train_loss") != column(runs / "2-full", "train_loss")
    for recomputed in ("2-recomputed", "2-selective", "2-one-layer"):
        assert_same(runs / recomputed, runs / "2-full")


@pytest.mark.parametrize("ranks_", [1, 2])
def test_resuming_is_bit_exact_and_needs_no_lora_flags(runs, ranks_):
    whole, resumed = runs / f"{ranks_}-full", runs / f"{ranks_}-to-{ranks_}"
    assert_same(resumed, whole, first_step=6)
    assert rows(whole / "log", "val_loss")[10] == rows(resumed / "log", "val_loss")[10]


@pytest.mark.parametrize("move", ["4-to-2", "4-to-1"])
def test_shards_and_a_merged_file_continue_on_another_world_size(runs, move):
    whole = column(runs / f"{move[0]}-full", "train_loss")[5:]
    assert column(runs / move, "train_loss") == pytest.approx(whole, rel=1e-4)


def test_a_checkpoint_holds_the_adapter_and_its_state_and_names_the_base(runs, tiny):
    names = {
        f"model.layers.{layer}.{part}.lora_{letter}.weight"
        for letter in "AB"
        for layer in range(3)
        for part in [f"self_attn.{t}" if t[0] in "qkvo" else f"mlp.{t}" for t in TARGETS]
    }
    names = {name.replace("mlp.o_", "self_attn.o_") for name in names}
    moments = {f"optimizer.{name}.{key}" for name in names for key in ("exp_avg", "exp_avg_sq")}
    merged_file = load_file(runs / "4-full" / "merged.ckpt")
    assert set(merged_file) == {f"model.{name}" for name in names} | moments
    for ranks_ in RANKS:
        opened = Checkpoint.open(runs / f"{ranks_}-full" / "half")
        assert set(opened.tensors) == set(merged_file)
        assert opened.state["config"]["model_id"] == str(tiny)
        assert opened.state["frozen"] == Checkpoint.open(runs / "4-full" / "merged.ckpt").state["frozen"]
    bf16 = Checkpoint.open(runs / "2-bf16" / "ckpt" / "last")
    assert {dtype for dtype, _ in bf16.tensors.values()} == {torch.float32}


def validation_loss(model, prepared):
    with torch.no_grad():
        return mean_loss(model, datasets.load_from_disk(str(prepared))["validation"]).item()


def test_exports_load_elsewhere_with_the_trainers_validation_loss(runs, flags, tiny, prepared, tmp_path):
    last = runs / "2-full" / "ckpt" / "last"
    expected = rows(runs / "2-full" / "log", "val_loss")[10]["val_loss"]
    for mode in ("hf", "adapter", "adapter"):  # the second adapter replaces the first
        source = f"--export_{mode}={last}"
        assert train.main([*flags, source, f"--output_path={tmp_path / mode}"]) == 0
    files = sorted(path.name for path in (tmp_path / "adapter").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    base = AutoModelForCausalLM.from_pretrained(tiny).float()
    assert abs(validation_loss(base, prepared) - expected) > 0.01
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert validation_loss(whole, prepared) == pytest.approx(expected, rel=1e-4)
    assert validation_loss(adapted, prepared) == pytest.approx(expected, rel=1e-4)
    merged_by_peft = adapted.merge_and_unload().state_dict()
    torch.testing.assert_close(whole.state_dict(), merged_by_peft, rtol=1e-5, atol=1e-6)
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")  # finds the base by itself
    assert again.peft_config["default"].lora_alpha == 24


def test_evaluate_and_generate_take_an_adapter(runs, flags, capsys):
    resumed = [*flags, f"--resume_from={runs / '1-full' / 'ckpt' / 'last'}"]
    assert train.main([*resumed, "--evaluate"]) == 0
    row = rows(runs / "1-full" / "log", "val_loss")[10]
    assert f"val_loss={row['val_loss']:.6f} " in capsys.readouterr().out
    assert train.main([*resumed, "--generate=the people of", "--max_new_tokens=8"]) == 0
    assert capsys.readouterr().out.startswith("the people of")


# Flags -> what the message must contain. {adapter} and {whole} are checkpoints, {other} is a model whose
# weights differ from the base's in a single number.
WRONG = {
    "--lora_rank=0": "--lora_rank must be >= 1 (got 0)",
    "--lora_alpha=8": "--lora_alpha was given without --lora_rank",
    "--lora_targets=q_proj": "--lora_targets was given without --lora_rank",
    "--lora_rank=2 --lora_targets=q_proj,lm_head": "names lm_head, all-linear, q_proj, down_proj",
    "--lora_rank=2 --from_scratch": "--lora_rank=2 adapts a pretrained model, Leave out --lora_rank",
    "--lora_rank=2 --engine=nnscaler": "nnScaler trains no adapters, Leave --lora_rank out",
    "--resume_from={adapter} --lora_rank=2": "an adapter with --lora_rank=3, not 2, Leave --lora_rank out",
    "--resume_from={adapter} --lora_alpha=2": "an adapter with --lora_alpha=24, not 2, Leave",
    "--resume_from={adapter} --lora_targets=q_proj": "--lora_targets=all-linear, not q_proj, Leave",
    "--resume_from={adapter} --model_id={other}": "base weights, differ, current {base}, same weights",
    "--evaluate --resume_from={adapter} --model_id={other}": "base weights, differ, current {base}",
    "--export_hf={adapter} --model_id={other}": "base weights, differ, current {base}",
    "--resume_from={whole} --lora_rank=2": "a whole model, not of an adapter, --export_hf, --model_id",
    "--export_adapter={whole}": "a whole model, not of an adapter, --export_hf",
    "--export_adapter={adapter} --output_path={whole}": "something other than an exported adapter",
}


@pytest.fixture(scope="module")
def places(runs, flags, tiny):
    assert train.main([*flags, "--max_train_steps=1", *outputs(runs / "whole")]) == 0
    other = shutil.copytree(tiny, runs / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][17, 5] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    last = {"adapter": runs / "1-full" / "ckpt" / "last", "whole": runs / "whole" / "ckpt" / "last"}
    return last | {"other": other, "base": tiny}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_a_sentence(places, flags, tmp_path, capsys, wrong):
    argv = [*flags, *SCHEDULE, "--max_train_steps=20", *outputs(tmp_path), *wrong.format(**places).split()]
    assert train.main(argv) == 2
    said = capsys.readouterr().err
    assert all(part in said for part in WRONG[wrong].format(**places).split(", ")), said
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} <= {".run.lock"}


def test_a_base_that_moved_and_was_cut_into_other_files_is_the_same(runs, flags, tiny, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.save_pretrained(shutil.copytree(tiny, tmp_path / "moved"), max_shard_size="20KB")
    (tmp_path / "moved" / "model.safetensors").unlink()
    source = [f"--resume_from={runs / '1-full' / 'half'}", f"--model_id={tmp_path / 'moved'}"]
    assert train.main([*flags, *SCHEDULE, *source, *outputs(tmp_path)]) == 0
    assert column(tmp_path, "train_loss") == column(runs / "1-full", "train_loss")[5:]


@pytest.mark.parametrize("precision, width", [("bf16", 2), ("fp32", 4)])
def test_only_adapters_have_gradients_optimizer_state_and_master_weights(flags, tmp_path, precision, width):
    given = [*flags, *ADAPTER, f"--precision={precision}", "--max_train_steps=1", *outputs(tmp_path)]
    with ranks.process_group():
        job, _ = train.build_trainer(parse(given))
        job.run()
    adapter = list(job.names)
    frozen = [p for name, p in job.model.named_parameters() if "lora_" not in name]
    assert len(adapter) == 3 * 7 * 2 and set(adapter) == set(job.optimizer.state)
    assert all(".lora_" in name for name in job.names.values())
    assert all(p.grad is None and not p.requires_grad and p.element_size() == width for p in frozen)
    assert all(p.grad is not None and p.dtype == torch.float32 for p in adapter)


def test_a_frozen_heads_gradient_is_not_computed():
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(50, 8), torch.randn(20, 8), torch.randint(20, (50,))
    gradients, products = [], []
    for frozen in (False, True):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        with FlopCounterMode(display=False) as counted:
            chunked_cross_entropy(h, w, labels).backward()
        gradients.append(h.grad)
        products.append(counted.get_total_flops() / (2 * 50 * 20 * 8))
        assert (w.grad is None) == frozen
    assert torch.equal(*gradients) and products == [3, 2]


def test_fresh_adapters_are_pefts_distribution_and_a_function_of_seed_and_name(tiny):
    lora = dict(lora_rank=2048, lora_alpha=1, lora_targets="all-linear")

    def values(name, seed=0):
        return Llama(str(tiny), seed=seed, lora=lora).initial_values(name, 0, 2048 * 32)

    A = "model.layers.0.mlp.up_proj.lora_A.weight"
    found, bound = values(A), 32**-0.5  # kaiming_uniform(a=sqrt(5)) of 32 inputs
    assert -bound <= found.min() < -0.999 * bound and 0.999 * bound < found.max() <= bound
    assert abs(found.mean()) < 0.01 * bound and found.std() == pytest.approx(bound / math.sqrt(3), rel=0.01)
    assert torch.equal(found, values(A)) and not torch.equal(found, values(A, seed=1))
    assert not torch.equal(found, values(A.replace("up", "gate")))
    assert not values(A.replace("_A", "_B")).any()


def test_a_frozen_matrix_costs_four_operations_a_token_and_an_adapters_six(tiny):
    batch, attention = {"input_ids": torch.zeros(1, 16)}, 12 * 3 * 32 * 16
    adapter = dict(lora_rank=3, lora_alpha=1, lora_targets="q_proj")
    plain, lora = (Llama(str(tiny), lora=l).flops_per_token(batch) for l in (None, adapter))  # noqa: E741
    assert lora - attention == pytest.approx((plain - attention) * 4 / 6 + 6 * 3 * 3 * (32 + 32))


def test_from_chats_to_a_model_that_answers(tmp_path, capsys, monkeypatch):
    """The README's commands, small: a tied model with a chat template learns two answers."""
    monkeypatch.chdir(tmp_path)
    sizes = dict(tie_word_embeddings=True, vocab_size=321, initializer_range=0.5)
    model = make_model(tmp_path / "model", **sizes)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(model)
    answers = {"who is strong?": "the union", "what has prospered?": "commerce and labor"}
    chats = [dict(prompt=question, completion=answer) for question, answer in [*answers.items()] * 30]
    write_jsonl(tmp_path / "chats.jsonl", chats)
    flags = [f"--model_id={model}", "--dataset_id=chats.jsonl", "--max_seq_len=64", "--precision=fp32"]
    assert train.main([*flags, "--prepare_data", "--validation_fraction=0"]) == 0
    schedule = ["--micro_batch_size=4", "--global_batch_size=4", "--max_train_steps=30"]
    assert train.main([*flags, "--lora_rank=8", "--learning_rate=2e-2", *schedule]) == 0
    capsys.readouterr()
    for question, answer in answers.items():
        assert train.main([*flags, "--resume_from=last", f"--generate={question}"]) == 0
        assert capsys.readouterr().out == f"{answer}\n"


@pytest.mark.slow
def test_verify_resume_and_compile_hold_for_adapters(flags, runs, tmp_path):
    run = [*flags, *ADAPTER, "--max_train_steps=8", f"--save_dir={tmp_path / 'ckpt'}"]
    done = python("train.py", *run, "--verify_resume")
    assert "resume is exact: 8 steps on 2 ranks" in done.stdout
    python("train.py", *flags, *SCHEDULE, *ADAPTER, "--compile=on", *outputs(tmp_path / "compiled"))
    whole = column(runs / "1-full", "train_loss")
    assert column(tmp_path / "compiled", "train_loss") == pytest.approx(whole, rel=1e-4)
