"""What one step costs, without a clock: operations, bytes that it holds, and bytes that it copies."""

import contextlib
import math
from itertools import accumulate

import numpy as np
import pytest
import torch
from helpers.runs import make_model
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from dataset.batches import Collator
from llama3.model import Llama
from trainer import parallel, ranks, setup
from trainer.args import Layout, NativeOptions, OptimizerConfig
from trainer.trainer import Trainer

ROWS, T, VOCABULARY, LAYERS, HIDDEN, INNER, HEADS, KV_HEADS = 2, 256, 4096, 3, 64, 128, 4, 2
SHAPE = dict(vocab_size=VOCABULARY, num_hidden_layers=LAYERS, hidden_size=HIDDEN, intermediate_size=INNER)
SHAPE |= dict(num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def model_id(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("cost") / "model", **SHAPE)


def batch(seed):
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, (ROWS, T))
    return Collator(T, ROWS)([{"input_ids": row, "document_starts": [0, 100]} for row in ids])


@contextlib.contextmanager
def trainer_of(model_id, recompute="none"):
    """A Trainer on one rank, in bf16, after a step of two micro-batches."""
    with ranks.process_group():
        trainer = object.__new__(Trainer)  # without a run's data and folders
        trainer.model, trainer.device, trainer.world_size = Llama(str(model_id)), torch.device("cpu"), 1
        trainer.options = NativeOptions(layout=Layout(reshard_after_forward=False))
        how = dict(precision="bf16", recompute=recompute, compile_layers=False, reshard_after_forward=False)
        parallel.parallelize(trainer.model, trainer.device, **how)
        trainer.names = setup.fill_weights(trainer.model)
        trainer.optimizer = torch.optim.AdamW(trainer.model.parameters(), fused=True)
        trainer.args = type("Args", (), {"optimizer": OptimizerConfig(torch.optim.AdamW, clip_gnorm=1.0)})
        trainer._train_step([batch(0), batch(1)])
        yield trainer


@pytest.mark.parametrize("recompute, passes", [("none", 3), ("full", 4)])
def test_no_product_is_computed_twice(model_id, recompute, passes):
    counter = FlopCounterMode(display=False)  # it does not see inside attention
    with trainer_of(model_id, recompute) as trainer, counter:
        trainer._train_step([batch(2), batch(3)])
    parameters = trainer.model.model.model.layers.parameters()
    layers = sum(math.prod(p.shape) for p in parameters if p.ndim == 2)
    products = passes * layers - (passes - 3) * LAYERS * HIDDEN * INNER  # a layer needs its last one no more
    targets = ROWS * (T - 2)  # a document's last token has none
    expected = 2 * 2 * (products * ROWS * T + 3 * VOCABULARY * HIDDEN * targets)
    assert counter.get_total_flops() == expected


def profiled(trainer, micro_batches: int) -> tuple[int, int]:
    """Return the bytes that a step holds at its peak, and the elements that it copies."""
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=True)
    with profiler:
        trainer._train_step([batch(seed) for seed in range(2, 2 + micro_batches)])
    events = profiler.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    copies = [event.input_shapes[0] for event in profiler.events() if event.name == "aten::copy_"]
    return max(accumulate(sizes)), sum(math.prod(shape) for shape in copies)


def bytes_for_backward(trainer) -> int:
    """Return what autograd keeps of a micro-batch, with the gathered weights in bf16."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # whose memory nothing else takes then
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer.model(batch(2))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_a_step_holds_one_copy_of_the_logits_in_each_precision(model_id):
    with trainer_of(model_id) as trainer:
        peak, _ = profiled(trainer, 2)
        kept = bytes_for_backward(trainer)
    gradients = 4 * sum(parameter.numel() for parameter in trainer.model.parameters())
    logits = VOCABULARY * ROWS * (T - 2)
    head = 4 * VOCABULARY * HIDDEN  # the sum of the head's gradient over chunks
    print(peak, kept, gradients, logits, head)
    assert 6 * logits < peak < kept + gradients + head + (2 + 4) * logits + logits


def test_a_step_casts_each_parameter_once_for_all_micro_batches(model_id):
    with trainer_of(model_id) as trainer:
        _, one = profiled(trainer, 1)
        _, two = profiled(trainer, 2)
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    of_each_micro_batch = two - one
    assert one - of_each_micro_batch >= parameters
