"""What one step costs, without a clock: operations, bytes that it holds, and bytes that it copies."""

import math

import numpy as np
import pytest
import torch
from helpers.runs import make_model
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from llama3.data import Collator
from llama3.model import Llama
from trainer import parallel, ranks, setup
from trainer.args import NativeOptions, OptimizerConfig
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


def one_step(model_id, counter, recompute="none"):
    """A step of our Trainer on one rank, of two micro-batches in bf16, after one that is not counted."""
    with ranks.process_group():
        trainer = object.__new__(Trainer)  # without a run's data and folders
        trainer.model, trainer.device, trainer.world_size = Llama(str(model_id)), torch.device("cpu"), 1
        trainer.options = NativeOptions(reshard_after_forward=False)
        how = dict(precision="bf16", recompute=recompute, compile_layers=False, reshard_after_forward=False)
        parallel.parallelize(trainer.model, trainer.device, **how)
        trainer.names = setup.fill_weights(trainer.model)
        trainer.optimizer = torch.optim.AdamW(trainer.model.parameters(), fused=True)
        trainer.args = type("Args", (), {"optimizer": OptimizerConfig(torch.optim.AdamW, clip_gnorm=1.0)})
        trainer._train_step([batch(0), batch(1)])
        with counter:
            trainer._train_step([batch(2), batch(3)])
    return trainer.model


@pytest.mark.parametrize("recompute, passes", [("none", 3), ("full", 4)])
def test_no_product_is_computed_twice(model_id, recompute, passes):
    counter = FlopCounterMode(display=False)  # it does not see inside attention
    model = one_step(model_id, counter, recompute)
    layers = sum(math.prod(p.shape) for p in model.model.model.layers.parameters() if p.ndim == 2)
    products = passes * layers - (passes - 3) * LAYERS * HIDDEN * INNER  # a layer needs its last one no more
    targets = ROWS * (T - 2)  # a document's last token has none
    expected = 2 * 2 * (products * ROWS * T + 3 * VOCABULARY * HIDDEN * targets)
    assert counter.get_total_flops() == expected


def test_a_step_holds_and_copies_no_more_than_it_must(model_id):
    seen = profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=True)
    model = one_step(model_id, seen)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    sizes = [event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    copied = sum(math.prod(event.input_shapes[0]) for event in seen.events() if event.name == "aten::copy_")
    # Measured 20.0e6; logits of a micro-batch in fp32 once more would be 8.4e6.
    assert 18e6 < np.cumsum(sizes).max() < 21e6
    # Measured 27.8e6 elements; casting the parameters in each micro-batch would be 0.7e6 more.
    assert 26e6 < copied < 27.8e6 + parameters
