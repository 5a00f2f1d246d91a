"""How the model is laid out changes no number: recompute, compile, what is gathered, and replicas."""

import functools

import datasets
import numpy as np
import pytest
import torch
from helpers.runs import column, make_model, outputs, run_cases
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from dataset.batches import Collator
from llama3.model import Llama
from trainer import parallel, ranks, setup
from trainer.tensorfile import Box

LAYERS, T = 12, 32
NAMES = "sharded", "replicated"
CPU, ATTENTION = torch.device("cpu"), "llama3::packed_attention"


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("deep") / "model", num_hidden_layers=LAYERS)


def batches():
    """Batches with documents of other lengths and numbers each time; one of a single document a row."""
    draw = np.random.default_rng(0)
    for count in (4, 0, 12, 3, 30):
        starts = [np.unique([0, *draw.integers(0, T, count)]) for _ in range(2)]
        rows = [{"input_ids": draw.integers(0, 320, T), "document_starts": start} for start in starts]
        yield Collator(T, 2)(rows)


def trained(model_id, recompute="none", compile_layers=False, change=lambda model: None, reshard=True):
    """Losses and the gradients' sums of each batch, and the graphs so far, of the model after plain SGD."""
    torch._dynamo.reset()
    counters.clear()
    found, graphs = [], []
    with ranks.process_group():
        model = Llama(str(model_id))
        parallel.parallelize(model, CPU, "fp32", recompute, compile_layers, reshard_after_forward=reshard)
        setup.fill_weights(model)
        change(model)
        for batch in batches():
            loss = model(batch)["loss_sum"]
            loss.backward()
            found += [loss.item(), *(parallel.local(p.grad).sum().item() for p in model.parameters())]
            graphs.append(counters["stats"]["unique_graphs"])
            torch.optim.SGD(model.parameters(), lr=1e-3).step()
            model.zero_grad()
            with torch.no_grad():
                found.append(model.eval()(batch)["loss_sum"].item())
            model.train()
        graphs.append(counters["stats"]["unique_graphs"])
    return found, graphs


@pytest.fixture(scope="module")
def plain(deep):
    return trained(deep)[0]


@pytest.mark.parametrize("recompute", [1, "selective", "full"])
def test_recompute_changes_no_bit(deep, plain, recompute):
    assert trained(deep, recompute)[0] == plain


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_layers_that_stay_gathered_change_no_bit(deep, plain, recompute):
    assert trained(deep, recompute, reshard=False)[0] == plain


@pytest.mark.parametrize("recompute, graphs", [("none", 1), (2, 2), ("selective", 1), ("full", 1)])
def test_all_layers_share_a_graph_that_documents_do_not_change(deep, plain, monkeypatch, recompute, graphs):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    found, count = trained(deep, recompute, compile_layers=True)
    # The loss has a graph too, and validation its own ones. No batch after the first needs another.
    assert count == [graphs + 1] + 5 * [2 * (graphs + 1)]
    assert not counters["graph_break"] and found == pytest.approx(plain, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
def test_selective_recompute_repeats_neither_matrix_products_nor_attention(deep, monkeypatch, compiled):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    counts = {}
    for recompute in ("none", "selective", "full"):
        torch._dynamo.reset()
        with ranks.process_group():
            model = Llama(str(deep), from_scratch=True, num_hidden_layers=2)
            parallel.parallelize(model, CPU, "fp32", recompute, compiled)
            setup.fill_weights(model)
            model(next(batches()))["loss_sum"].backward()  # compiles
            # The counter of FLOPs keeps Dynamo from compiling; the profiler counts what recompute skips.
            count = profile(activities=[ProfilerActivity.CPU]) if compiled else FlopCounterMode(display=False)
            with count:
                model(next(batches()))["loss_sum"].backward()
        events = count.key_averages() if compiled else ()
        ran = {event.key: event.count for event in events if event.key in ("aten::mm", ATTENTION)}
        counts[recompute] = ran if compiled else {"FLOPs": count.get_total_flops()}
    for name, number in counts["none"].items():
        assert 0 < number == counts["selective"][name] < counts["full"][name]


def test_the_longest_document_is_counted_on_the_host():
    assert all(batch["longest_document"] == batch["cu_seqlens"].diff().max() for batch in batches())


def test_embedding_and_head_are_not_gathered_for_backward_which_does_not_need_them(deep, plain):
    gathered = []

    def gather(model):
        for module in model.sharded_alone:
            gathered.append(module._get_fsdp_state()._fsdp_param_groups[0].unshard_in_backward)
            module.set_unshard_in_backward(True)

    assert trained(deep, change=gather)[0] == plain and gathered == [False, False]


@pytest.fixture(scope="module")
def runs(flags, prepared, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    common = [*flags, "--global_batch_size=8", "--max_train_steps=6", "--save_every_n_train_steps=3"]

    def case(name, *more):
        return {name: [*common, *outputs(out / name), *more]}

    epoch = 2 * 8 // len(datasets.load_from_disk(str(prepared))["train"])
    sharded, replicated = (out / name / "ckpt" / f"{epoch:04d}-0003" for name in NAMES)
    fresh = case("sharded") | case("replicated", "--dp_replicate=2")
    resumed = case("to-replicas", "--dp_replicate=2", f"--resume_from={sharded}")
    run_cases(out, 4, fresh | resumed | case("to-shards", f"--resume_from={replicated}"))
    run_cases(out, 2, case("to-two-ranks", f"--resume_from={replicated}"))
    return out


@pytest.mark.parametrize("name", ["replicated", "to-replicas", "to-shards", "to-two-ranks"])
def test_replicas_have_the_losses_of_full_sharding_and_resume_on_any_layout(runs, name):
    for key in ("train_loss", "gnorm"):
        expected = column(runs / "sharded", key)
        found = column(runs / name, key)
        assert len(found) in (3, 6) and found == pytest.approx(expected[-len(found) :], rel=1e-4)


def test_only_the_first_replica_writes(runs):
    files = {name: (runs / name / "ckpt" / "last").resolve().glob("*.safetensors") for name in NAMES}
    sizes = [sum(file.stat().st_size for file in files[name]) for name in NAMES]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1)


def test_a_fresh_parameter_whose_shard_is_not_whole_rows_is_an_error(tiny):
    model = Llama(str(tiny), from_scratch=True)
    columns = Box(offsets=(0, 4), shape=(8, 4))
    with pytest.raises(ValueError, match="is not a run of whole rows"):
        setup._fill_fresh(model, "a.weight", torch.Size((8, 8)), columns, torch.empty(8, 4))
    rows = Box(offsets=(2, 0), shape=(3, 8))
    out = torch.empty(3, 8)
    setup._fill_fresh(model, "a.weight", torch.Size((8, 8)), rows, out)
    assert torch.equal(out, model.initial_values("a.weight", 0, 64).view(8, 8)[2:5])
