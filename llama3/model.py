"""Wraps transformers' Llama so that it returns the loss, and tells a Trainer what it must know, as data.

Shapes: B rows of T tokens, N query heads and K key-value heads of size H, hidden size D.
"""

import hashlib
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from llama3 import assets
from llama3.loss import IGNORED, chunked_cross_entropy

RANDOM_BLOCK = 2**16  # fresh weights that one random generator draws


def packed_attention(module, query, key, value, attention_mask=None, scaling=None, cu_seqlens=None, **_):
    """Causal attention inside each document: query (B, N, T, H), key and value (B, K, T, H) -> (B, T, N, H).

    `cu_seqlens` are the document boundaries over the B * T tokens, with every row's start.
    One kernel computes all documents in half precision on CUDA. Elsewhere one by one is faster than a mask.
    """
    B, N, T, H = query.shape
    if not query.is_cuda or query.dtype == torch.float32:
        return _attend_to_each_document(query, key, value, scaling, cu_seqlens), None
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x.transpose(1, 2).reshape(B * T, -1, H) for x in (query, key, value))
    options = dict(scale=scaling, window_size=(-1, 0), enable_gqa=N != key.shape[1])
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, T, T, **options).view(B, T, N, H), None


@torch.compiler.disable  # the lengths of documents change from batch to batch
def _attend_to_each_document(query, key, value, scaling, cu_seqlens):
    B, N, T, H = query.shape
    key, value = (x.repeat_interleave(N // x.shape[1], dim=1) for x in (key, value))
    lengths = [stop - start for start, stop in pairwise(cu_seqlens.tolist()) if start < stop]
    # (B, N, T, H) -> the (t, N, H) of each document
    documents = zip(
        *(x.transpose(1, 2).flatten(0, 1).split(lengths) for x in (query, key, value)), strict=True
    )
    attend = partial(F.scaled_dot_product_attention, is_causal=True, scale=scaling)
    outputs = [attend(*(x.transpose(0, 1)[None] for x in document)) for document in documents]  # (1, N, t, H)
    return torch.cat(outputs, dim=2).view(N, B, T, H).permute(1, 2, 0, 3)


def _padded(cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Append empty documents up to a power of two, so that a compiled layer rarely meets a new length."""
    length = max(64, 1 << (len(cu_seqlens) - 1).bit_length())
    return torch.cat([cu_seqlens, cu_seqlens[-1:].expand(length - len(cu_seqlens))])


ALL_ATTENTION_FUNCTIONS["packed"] = packed_attention


class LossHead(nn.Linear):
    """The output projection with the loss: hidden (B, T, D) and shifted labels (B, T) -> the loss's sum."""

    def forward(self, hidden, labels):
        return chunked_cross_entropy(hidden, self.weight, labels)


class Llama(nn.Module):
    """LlamaForCausalLM whose forward takes a batch and returns its loss.

    Parameters start on the meta device. The Trainer shards them, then fills each shard from `weight_files`
    or, when it trains from scratch, from `initial_values`.
    """

    name_prefix = "model."  # in front of the Hugging Face names of parameters
    layer_class = LlamaDecoderLayer
    for_tracing = "llama3.traced.TracedLlama"

    def __init__(self, model_id: str, from_scratch=False, num_hidden_layers: int | None = None, seed=0):
        super().__init__()
        self.model_id, self.from_scratch, self.seed = model_id, from_scratch, seed
        config = assets.load_config(model_id, num_hidden_layers)
        with torch.device("meta"):
            self.model = LlamaForCausalLM(config)
            self.model.lm_head = LossHead(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.model.lm_head.weight = self.model.model.embed_tokens.weight
        # The frequencies are buffers, which the Trainer does not fill: they are made here, in fp32.
        self.model.model.rotary_emb = LlamaRotaryEmbedding(config=config)
        config._attn_implementation = "packed"

    @property
    def sharded_alone(self) -> list[nn.Module]:
        """The large modules besides the layers that are sharded alone; tied ones stay with the root."""
        tied = self.model.config.tie_word_embeddings
        return [] if tied else [self.model.model.embed_tokens, self.model.lm_head]

    def forward(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the loss summed over a Collator's batch, the same detached, and the number of targets."""
        positions = batch["position_ids"]  # (B, T)
        # transformers 4 would build a (T, T) mask if it got none; it passes on a mask of four dims unchanged.
        hidden = self.model.model(
            input_ids=batch["input_ids"],
            attention_mask=positions[:, None, None, :],
            position_ids=positions,
            cu_seqlens=_padded(batch["cu_seqlens"]),
            use_cache=False,
        ).last_hidden_state  # (B, T, D)
        loss_sum = self.model.lm_head(hidden, batch["labels"])
        return loss_sum, loss_sum.detach(), (batch["labels"] != IGNORED).sum()

    def weight_files(self) -> dict[str, Path] | None:
        """Return the safetensors file of each parameter by its Hugging Face name; None from scratch."""
        return None if self.from_scratch else assets.weight_files(self.model_id)

    def initial_values(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return elements [start, stop) of a fresh parameter, flattened, in fp32.

        They depend on the seed and the name only: ones for norms, zeros for biases, otherwise normal.
        Each block has its own generator, so that a shard draws little more than it holds.
        """
        if name.endswith("norm.weight"):
            return torch.ones(stop - start)
        if name.endswith("bias"):
            return torch.zeros(stop - start)
        blocks, deviation = [], self.model.config.initializer_range
        for index in range(start // RANDOM_BLOCK, stop // RANDOM_BLOCK + 1):
            digest = hashlib.sha256(f"{self.seed}/{name}/{index}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
            blocks.append(torch.randn(RANDOM_BLOCK, generator=generator) * deviation)
        skipped = start % RANDOM_BLOCK
        return torch.cat(blocks)[skipped : skipped + stop - start]
