"""Wraps transformers' Llama so that it returns the loss, and tells a Trainer what it must know, as data.

Shapes: B rows of T tokens, N query heads and K key-value heads of size H, hidden size D.
"""

import hashlib
import math
from collections.abc import Callable
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from llama3 import assets
from llama3.loss import chunked_cross_entropy, loss_and_gradient
from tokens import IGNORED
from trainer.trainable import TrainableModel

RANDOM_BLOCK = 2**16  # fresh weights that one random generator draws


def packed_attention(
    module, query, key, value, attention_mask=None, scaling=None, cu_seqlens=None, longest=None, **_
):
    """Causal attention inside each document: query (B, N, T, H), key and value (B, K, T, H) -> (B, T, N, H).

    `cu_seqlens` are the document boundaries over the B * T tokens, with every row's start. No document has
    more tokens than `longest` has rows, or than T.
    """
    B, N, T, H = query.shape
    if query.is_cuda and query.dtype != torch.float32:
        from torch.nn.attention.varlen import varlen_attn

        # Contiguous, as torch.compile takes the kernel's results to lie in memory like its arguments.
        q, k, v = (x.transpose(1, 2).reshape(B * T, -1, H).contiguous() for x in (query, key, value))
        most = T if longest is None else longest.shape[0]
        options = dict(scale=scaling, window_size=(-1, 0), enable_gqa=N != key.shape[1])
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, most, most, **options).view(B, T, N, H), None
    if query.is_cuda:  # no variable-length kernel takes fp32
        tokens = torch.arange(B * T, dtype=cu_seqlens.dtype, device=query.device)
        document = torch.bucketize(tokens, cu_seqlens, right=True).view(B, 1, T)
        options = dict(scale=scaling, enable_gqa=N != key.shape[1])
        options["attn_mask"] = (document[..., None] == document[..., None, :]).tril()
        return F.scaled_dot_product_attention(query, key, value, **options).transpose(1, 2), None
    q, k, v = (x.transpose(1, 2).reshape(B * T, -1, H) for x in (query, key, value))
    return attention_by_document(q, k, v, cu_seqlens, scaling or H**-0.5)[0].view(B, T, N, H), None


# On a CPU, document after document is faster than a mask. As the lengths of documents change from batch to
# batch, operators hide them from torch.compile, which would give up here, and trace no checkpoint around it.
@torch.library.custom_op("llama3::packed_attention", mutates_args=())
def attention_by_document(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, N, H) and two (tokens, K, H) -> the result, and what backward needs, (tokens, N)."""
    attend = partial(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, is_causal=True, scale=scale)
    return _by_document(attend, cu_seqlens, [query, *_for_each_query(query, key, value)])


@torch.library.custom_op("llama3::packed_attention_backward", mutates_args=())
def _attention_by_document_backward(
    tensors: list[torch.Tensor], cu_seqlens: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad, query, key, value, *rest = tensors
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    attend = partial(attend, dropout_p=0.0, is_causal=True, scale=scale)
    tensors = [grad, query, *_for_each_query(query, key, value), *rest]
    grad_query, *grads = _by_document(attend, cu_seqlens, tensors)
    return grad_query, *(x.unflatten(1, (key.shape[1], -1)).sum(2) for x in grads)


def _for_each_query(query, *tensors):
    """Repeat key and value heads, (tokens, K, H), for each of their query heads, (tokens, N, H)."""
    return (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in tensors)


def _by_document(attend, cu_seqlens, tensors):
    """Apply to the (D, N, t, ...) of D documents of one length; tensors and results are (tokens, N, ...)."""
    lengths = (stop - start for start, stop in pairwise(cu_seqlens.tolist()))
    runs = [(len(list(run)), length) for length, run in groupby(lengths)]
    split = [x.split([count * length for count, length in runs]) for x in tensors]
    results = []
    for run, parts in zip(runs, zip(*split, strict=True), strict=True):
        found = attend(*(x.unflatten(0, run).transpose(1, 2) for x in parts))
        results.append([x.transpose(1, 2).flatten(0, 1) for x in found])
    return tuple(torch.cat(parts) for parts in zip(*results, strict=True))


def _save_for_backward(ctx, inputs, output):
    *tensors, cu_seqlens, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output, cu_seqlens)


def _backward(ctx, grad, _):
    *tensors, cu_seqlens = ctx.saved_tensors
    return *_attention_by_document_backward([grad, *tensors], cu_seqlens, ctx.scale), None, None


attention_by_document.register_autograd(_backward, setup_context=_save_for_backward)
attention_by_document.register_fake(
    lambda query, *_: (query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=torch.float32))
)
_attention_by_document_backward.register_fake(
    lambda tensors, *_: tuple(x.new_empty(x.shape) for x in tensors[1:4])
)
ALL_ATTENTION_FUNCTIONS["packed"] = packed_attention


def weight_files(model_id: str, config) -> dict[str, Path]:
    """Return the safetensors file of each parameter that a Llama of this configuration has, by its name."""
    # Older files hold the frequencies too, and some hold tied embeddings twice.
    unused = ".rotary_emb.inv_freq", "lm_head.weight" if config.tie_word_embeddings else "."
    return {name: file for name, file in assets.weight_files(model_id).items() if not name.endswith(unused)}


class LossHead(nn.Linear):
    """The output projection with the loss: hidden (B, T, D) and shifted labels (B, T) -> the loss's sum."""

    loss_and_grad = None

    def forward(self, hidden, labels):
        return chunked_cross_entropy(hidden, self.weight, labels, self.loss_and_grad)


class Llama(TrainableModel):
    """LlamaForCausalLM whose forward takes a batch and returns its loss.

    Parameters start on the meta device. The Trainer shards them, then fills each shard from `weight_files`
    or, when it trains from scratch, from `initial_values`. lora: the arguments of adapters.lora_config; then
    only the adapter is trained.
    """

    layer_class = LlamaDecoderLayer
    head_class = LossHead
    traced_class = "llama3.traced.TracedLlama"

    def __init__(
        self, model_id: str, from_scratch=False, num_hidden_layers=None, seed=0, lora: dict | None = None
    ):
        super().__init__()
        self.model_id, self.from_scratch, self.seed = model_id, from_scratch, seed
        config = assets.load_config(model_id, num_hidden_layers)
        with torch.device("meta"):
            self.model = LlamaForCausalLM(config)
            self.model.lm_head = self.head_class(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.model.lm_head.weight = self.model.model.embed_tokens.weight
        if lora:
            from llama3 import adapters

            with torch.device("meta"):
                adapters.adapt(self.model, adapters.lora_config(**lora))
        # The frequencies are buffers, which the Trainer does not fill: they are made here, in fp32.
        self.model.model.rotary_emb = LlamaRotaryEmbedding(config=config)
        config._attn_implementation = "packed"

    @property
    def sharded_alone(self) -> list[nn.Module]:
        """The large modules besides the layers that are sharded alone; tied ones stay with the root."""
        tied = self.model.config.tie_word_embeddings
        return [] if tied else [self.model.model.embed_tokens, self.model.lm_head]

    @property
    def longest_sample(self) -> int:
        """The number of tokens that the model was made for."""
        return self.model.config.max_position_embeddings

    def compile_loss(self, compile: Callable) -> None:
        """Compile what the loss computes between its matrix products."""
        self.model.lm_head.loss_and_grad = compile(loss_and_gradient)

    def forward(self, batch: dict) -> dict[str, torch.Tensor]:
        """Return the loss summed over a Collator's batch, and the number of targets."""
        positions = batch["position_ids"]  # (B, T)
        # transformers 4 would build a (T, T) mask if it got none; it passes on a mask of four dims unchanged.
        hidden = self.model.model(
            input_ids=batch["input_ids"],
            attention_mask=positions[:, None, None, :],
            position_ids=positions,
            use_cache=False,
            **self.documents(batch),
        ).last_hidden_state  # (B, T, D)
        loss_sum = self.model.lm_head(hidden, batch["labels"])
        return {"loss_sum": loss_sum, "targets": (batch["labels"] != IGNORED).sum()}

    def documents(self, batch: dict) -> dict[str, torch.Tensor]:
        """Return what `packed_attention` is told of a batch's documents; no batch compiles a layer again."""
        # The longest is a tensor's shape, as an integer cannot be dynamic.
        told = dict(cu_seqlens=batch["cu_seqlens"], longest=torch.empty(batch["longest_document"], 0))
        for tensor in told.values():
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return told

    def flops_per_token(self, batch: dict) -> float:
        """Floating-point operations of a training step by PaLM's convention (2204.02311, appendix B).

        Six times the parameters of matrix products, four times those without a gradient of their own, and
        attention over the whole row, without its causal or document mask; recompute does not count.
        """
        config, T = self.model.config, batch["input_ids"].shape[1]
        # The output projection counts; the embedding has no product.
        matrices = [*self.model.model.layers.parameters(), self.model.lm_head.weight]
        flops = sum((6 if p.requires_grad else 4) * math.prod(p.shape) for p in matrices if p.ndim == 2)
        width = config.num_attention_heads * self.model.model.layers[0].self_attn.head_dim
        return flops + 12 * config.num_hidden_layers * width * T

    def checkpoint_name(self, name: str) -> str:
        """Return a parameter's Hugging Face name, without what peft's classes put between its parts."""
        return name.removeprefix("model.").replace(".base_layer.", ".").replace(".default.", ".")

    def weight_files(self) -> dict[str, Path] | None:
        """Return the safetensors file of each parameter by its Hugging Face name; None from scratch."""
        return None if self.from_scratch else weight_files(self.model_id, self.model.config)

    def initial_values(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return elements [start, stop) of a fresh parameter, flattened, in fp32.

        They depend on the seed and the name only: ones for norms, zeros for biases and an adapter's B,
        otherwise normal; an adapter's A is uniform, as peft's. Each block has its own generator, so that a
        shard draws little more than it holds.
        """
        if name.endswith("norm.weight"):
            return torch.ones(stop - start)
        if name.endswith(("bias", "lora_B.weight")):
            return torch.zeros(stop - start)
        draw, scale, shift, blocks = torch.randn, self.model.config.initializer_range, 0.0, []
        if name.endswith("lora_A.weight"):
            width = self.model.get_submodule(name.replace("lora_A.weight", "base_layer")).in_features
            draw, scale, shift = torch.rand, 2 * width**-0.5, -(width**-0.5)
        for index in range(start // RANDOM_BLOCK, stop // RANDOM_BLOCK + 1):
            digest = hashlib.sha256(f"{self.seed}/{name}/{index}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
            blocks.append(draw(RANDOM_BLOCK, generator=generator) * scale + shift)
        skipped = start % RANDOM_BLOCK
        return torch.cat(blocks)[skipped : skipped + stop - start]
