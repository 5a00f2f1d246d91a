"""The plan: its memory is the tracker's and real ranks', it finds what fits, and training follows it."""

import json
import re
from dataclasses import replace

import pytest
import torch
from helpers.runs import HELPERS, make_model, make_text, outputs, prepare, python, torchrun
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

import llama3.model  # noqa: F401  registers its attention
import train
from cli import settings
from cli.config import parse
from cli.plan import planner_run
from errors import UserError
from plan import devices, measure, planner
from trainer import parallel

SIZE_70B = dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)
SIZE_70B |= dict(num_key_value_heads=8, vocab_size=128256, model_type="llama")


def planned(kind: str, ranks: int, *given: str) -> planner.Run:
    command = settings.resolve_precision(parse([*given]), "bf16")
    return planner_run(command, devices.parse_device(kind), ranks, 8, kind == "cpu", {})


def gib(run: planner.Run, plan: planner.Plan) -> float:
    return sum(planner.memory(run, plan)) / planner.GIB


@pytest.mark.parametrize(
    "shards, layout",
    [
        pytest.param(8, dict(recompute="none"), marks=pytest.mark.slow),
        (8, dict(recompute=2, micro_batch_size=4)),
        pytest.param(8, dict(recompute="full", micro_batch_size=4), marks=pytest.mark.slow),
        (8, dict(recompute="none", reshard_after_forward=False)),
        (8, dict(recompute="selective", dp_replicate=2)),
        pytest.param(64, dict(recompute="full"), marks=pytest.mark.slow),
    ],
)
def test_what_three_layers_take_foretells_the_trackers_peak_of_more(shards, layout):
    run = planned("h100-80g", 8, "--max_seq_len=1024", "--num_hidden_layers=6", "--compile=off")
    plan = planner.Plan(dp_shard=shards, **layout)
    mesh = dict(dp_shard=shards, dp_replicate=plan.dp_replicate)
    mesh |= dict(reshard_after_forward=plan.reshard_after_forward)
    found = measure.measure(run.model, plan.recompute, plan.micro_batch_size, mesh, layers=6)
    assert gib(run, plan) == pytest.approx(found["peak"] / planner.GIB, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    "tokens, ranks, recompute", [(8192, 8, "none"), (1024, 64, "selective"), (32768, 64, "full")]
)
def test_the_peak_of_8b_is_the_trackers_at_full_depth(tokens, ranks, recompute):
    run = planned("h100-80g", ranks, f"--max_seq_len={tokens}", "--compile=off")
    plan = planner.Plan(dp_shard=ranks, recompute=recompute)
    found = measure.measure(run.model, recompute, 1, dict(dp_shard=ranks), layers=32)
    assert gib(run, plan) == pytest.approx(found["peak"] / planner.GIB, rel=0.05)


def test_it_finds_what_fits_8b():
    best = planner.search(planned("h100-80g", 8))[0]
    assert best.fits and best.recompute != "full" and best.predicted_peak_gib < 73.7
    best = planner.search(planned("a100-40g", 8))[0]
    assert best.fits and (best.recompute == "full" or best.recompute >= 16)
    small = planned("12:100:1000", 8)
    assert not any(plan.fits for plan in planner.search(small))
    fewest = planner.fewest_devices(small)
    assert fewest > 8 and f"{fewest} such devices" in planner.what_would_fit(small)
    with pytest.raises(UserError, match="8B does not fit: .* 119.7 GiB on each of 1 devices.*--lora_rank"):
        planner.check_state(replace(planned("h100-80g", 8), ranks=1), "8B")


def test_it_finds_what_fits_the_mini_model_and_70b(tmp_path):
    assert planner.search(planned("rtx4090", 2, "--mini"))[0].fits
    (tmp_path / "config.json").write_text(json.dumps(SIZE_70B))
    run = planned("h100-80g", 64, f"--model_id={tmp_path}")
    assert planner.search(run)[0].fits and run.layers == 80
    assert planner.state(run, 1) == pytest.approx(16 * 70.55e9, rel=1e-3)


def test_8b_with_an_adapter_fits_one_card_of_24_gb():
    run = planned("rtx4090", 1, "--lora_rank=16", "--max_seq_len=4096")
    assert planner.search(run)[0].fits
    # Frozen in bf16, and sixteen bytes for each number of A (16, in) and B (out, 16) in all linear layers.
    adapter = 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert planner.state(run, 1) == 2 * 8_030_261_248 + 16 * 32 * adapter
    beyond = planned("rtx4090", 1, "--lora_rank=16", "--max_seq_len=65536")
    assert "--lora_rank" not in planner.what_would_fit(beyond)


def test_no_plan_changes_the_global_batch_and_flags_pin():
    run = planned("a100-40g", 16)
    plans = planner.search(run)
    for p in plans:
        rows = p.dp_shard * p.dp_replicate * p.micro_batch_size * p.grad_accumulation_steps
        assert rows == run.global_batch_size == 128 and p.dp_shard * p.dp_replicate == 16
        assert p.fits == (p.predicted_peak_gib <= run.limit_gib) and p.why
    assert {p.micro_batch_size for p in plans} == {1, 2, 4, 8} and {p.dp_replicate for p in plans} == {1, 2}
    assert {"none", "selective", "full"} < {p.recompute for p in plans}  # and numbers of layers
    flags = "--recompute=selective", "--micro_batch_size=2", "--dp_replicate=4", "--global_batch_size=64"
    pinned = planner.search(planned("a100-40g", 16, *flags))
    found = {(p.recompute, p.micro_batch_size, p.dp_replicate, p.grad_accumulation_steps) for p in pinned}
    assert found == {("selective", 2, 4, 2)}


def test_speed_follows_from_what_is_slow():
    run = planned("h100-80g", 8)
    plans = [p for p in planner.search(run) if p.micro_batch_size == 1 and p.reshard_after_forward]
    fast = {p.recompute: p for p in plans}
    speeds = [fast[mode].predicted_tokens_per_second for mode in planner.MODES]
    assert speeds == sorted(speeds, reverse=True)
    compiled, eager = (
        planner.search(planned("h100-80g", 8, "--micro_batch_size=2", f"--compile={how}", "--recompute=16"))
        for how in ("on", "off")
    )
    assert compiled[0].predicted_tokens_per_second > eager[0].predicted_tokens_per_second
    # A link a hundredth as fast makes larger micro-batches faster.
    slow = planner.search(planned("79.1:989:3350:4.5", 8))[0]
    assert slow.micro_batch_size > 1 and slow.predicted_tokens_per_second < speeds[0]


def test_a_compiled_layer_keeps_the_share_that_the_plan_assumes():
    width, T, results = 576, 256, []
    sizes = dict(hidden_size=width, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3)
    config = LlamaConfig(**sizes)
    config._attn_implementation = "packed"
    layer = LlamaDecoderLayer(config, 0).to(torch.bfloat16)
    x, positions = torch.randn(1, T, width, dtype=torch.bfloat16, requires_grad=True), torch.arange(T)[None]
    angles = LlamaRotaryEmbedding(config=config)(x, positions)
    told = dict(cu_seqlens=torch.tensor([0, T], dtype=torch.int32), longest=torch.empty(T, 0))
    told |= dict(attention_mask=positions, position_ids=positions, position_embeddings=angles)
    weights = {tensor.data_ptr() for tensor in (*layer.parameters(), *angles)}

    def saved_bytes(forward) -> int:
        saved = {}
        hooks = (lambda t: saved.setdefault(t.data_ptr(), t)), lambda t: t
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            forward(x.clone(), **told)
        return sum(t.untyped_storage().nbytes() for at, t in saved.items() if at not in weights)

    def compiled(forward) -> int:
        torch._dynamo.reset()  # the partitioner of this backend, which chooses what to save, is inductor's
        return saved_bytes(torch.compile(forward, backend="aot_eager_decomp_partition"))

    share = compiled(layer.forward) / saved_bytes(layer.forward)
    assert share == pytest.approx(planner.COMPILED_KEEPS["none"], abs=0.03)
    selective = compiled(parallel._recomputing(layer.forward, True))
    for module in layer.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, given, result: results.append(result.nbytes))
    layer(x, **told)
    eager = sum(results) + 2 * x.nbytes  # the products' results, attention's, and the layer's input
    assert selective / eager == pytest.approx(planner.COMPILED_KEEPS["selective"], abs=0.04)


def test_the_command_answers_from_its_cache_and_fails_if_nothing_fits(tiny, tmp_path):
    common = f"--model_id={tiny}", "--max_seq_len=32", "--plan", f"--output_path={tmp_path / 'plan.json'}"
    cache = dict(XDG_CACHE_HOME=str(tmp_path / "cache"))
    device = ["--world_size=2", "--device_type=24:165:1008"]
    said = python("train.py", *common, *device, **cache).stdout
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["chosen"] == written["candidates"][0] and written["chosen"]["fits"]
    assert "the fastest that fits" in said and "the fewest devices that fit: 1" in said
    files = sorted((tmp_path / "cache").rglob("*.json"))
    probe = "import sys, train; code = train.main(sys.argv[1:]); print('transformers' in sys.modules, code)"
    nothing = "--world_size=2", "--mem_constraint=0.1", "--max_seq_len=131072"
    again = python("-c", probe, *common, *device, real=True, **cache)
    assert again.stdout.endswith("False 0\n") and sorted((tmp_path / "cache").rglob("*.json")) == files
    failed = python("train.py", *common, *nothing, check=False, **cache)
    assert failed.returncode == 1 and "no plan fits: use" in failed.stderr
    assert "--max_seq_len=" in failed.stderr
    assert json.loads((tmp_path / "plan.json").read_text())["chosen"] is None


def test_a_model_that_cannot_fit_is_refused_before_its_weights_are_read(tiny, flags, tmp_path):
    sizes = dict(hidden_size=4096, num_hidden_layers=2, intermediate_size=2**20)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny / name).read_bytes())
    config = json.loads((tiny / "config.json").read_text()) | sizes
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = python("train.py", *flags, f"--model_id={tmp_path}", *outputs(tmp_path), check=False)
    assert done.returncode == 2 and "GiB on each of 1 devices, which have" in done.stderr
    assert "adapters only (--lora_rank)" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("how", [["--micro_batch_size=2"], ["--micro_batch_size=8"], ["--recompute=full"]])
def test_real_ranks_take_the_memory_that_the_plan_predicts(large, tmp_path, ranks, how):
    command = [*large, *how, *outputs(tmp_path)]
    python("train.py", *command, "--plan", "--device_type=cpu", f"--world_size={ranks}")
    command.append(f"--world_size={ranks}")
    said = torchrun(ranks, "tests/helpers/tensors.py", tmp_path / "peak", *command, **HELPERS).stderr
    predicted = float(re.search(r"the plan predicted (.*) for its tensors", said)[1])
    measured = max(int((tmp_path / f"peak.{rank}").read_text()) for rank in range(ranks)) / planner.GIB
    print(ranks, how, f"measured {measured:.2f} GiB, predicted {predicted / measured - 1:+.0%} of it")
    assert predicted == pytest.approx(measured, rel=0.15)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A model with 1.4 GiB of state, and its flags."""
    out = tmp_path_factory.mktemp("large")
    sizes = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, vocab_size=8192)
    model = make_model(out / "model", max_position_embeddings=512, **sizes)
    text = prepare(model, make_text(out / "text.jsonl", documents=2000), 0.01, 256)
    common = "--max_seq_len=256", "--global_batch_size=16", "--max_train_steps=2", "--max_val_samples=2"
    return f"--model_id={model}", f"--dataset_path={text}", *common


def test_a_plan_refuses_what_it_would_ignore(capsys):
    for wrong in ("--resume_from=last", "--mem_constraint=200"):
        assert train.main(["--plan", wrong]) == 2
        assert wrong.split("=")[0] in capsys.readouterr().err
