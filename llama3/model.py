"""transformers' Llama, wrapped to return the loss, and what a Trainer must know of it, as data."""

import hashlib
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from llama3 import assets
from llama3.loss import IGNORED, chunked_cross_entropy

# Shapes: B rows of T tokens, N query heads and K key-value heads of size H.


def packed_attention(module, query, key, value, attention_mask=None, scaling=None, cu_seqlens=None, **_):
    """Causal attention that stays inside each document: query (B, N, T, H), key and value (B, K, T, H) -> (B, T, N, H).

    `cu_seqlens` are the document boundaries over the B * T tokens, every row's start among them. In half precision on CUDA one
    variable-length kernel does it; elsewhere piece by piece, which on a CPU is faster than a mask (benchmarks/attention.py).
    """
    B, N, T, H = query.shape
    if query.is_cuda and query.dtype != torch.float32:
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (x.transpose(1, 2).reshape(B * T, -1, H) for x in (query, key, value))
        grouped = N != key.shape[1]
        out = varlen_attn(
            q, k, v, cu_seqlens, cu_seqlens, T, T, scale=scaling, window_size=(-1, 0), enable_gqa=grouped
        )
        return out.view(B, T, N, H), None
    return _attend_by_pieces(query, key, value, scaling, cu_seqlens), None


@torch.compiler.disable  # the lengths of the pieces change from batch to batch
def _attend_by_pieces(query, key, value, scaling, cu_seqlens):
    B, N, T, H = query.shape
    groups = N // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    bounds = sorted(set(cu_seqlens.tolist()))
    if len(bounds) == B + 1:  # no boundary inside a row
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return out.transpose(1, 2)  # (B, T, N, H)
    rows = []
    for row in range(B):
        starts = [b - row * T for b in bounds if row * T <= b <= (row + 1) * T]
        lengths = [stop - start for start, stop in zip(starts, starts[1:], strict=False)]
        pieces = zip(*(x[row : row + 1].split(lengths, dim=2) for x in (query, key, value)), strict=True)
        rows.append(
            torch.cat(
                [
                    F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
                    for q, k, v in pieces
                ],
                dim=2,
            )
        )
    return torch.cat(rows).transpose(1, 2)  # (B, T, N, H)


def _padded(cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Empty documents at the end, up to a power of two: a compiled layer sees few lengths, and seldom a new one."""
    length = max(64, 1 << (len(cu_seqlens) - 1).bit_length())
    return torch.cat([cu_seqlens, cu_seqlens[-1:].expand(length - len(cu_seqlens))])


ALL_ATTENTION_FUNCTIONS["packed"] = packed_attention


class LossHead(nn.Linear):
    """The output projection, fused with the loss: (B, T, D) hidden states and (B, T) shifted labels -> the summed loss."""

    def forward(self, hidden, labels):
        return chunked_cross_entropy(hidden, self.weight, labels)


class Llama(nn.Module):
    """LlamaForCausalLM whose forward takes a batch and returns its loss.

    Parameters are created on the meta device: the Trainer shards them first, and fills each shard from `weight_files` or, from
    scratch, from `initial_values`.
    """

    name_prefix = "model."  # ours, in front of the Hugging Face names
    layer_class = LlamaDecoderLayer
    for_tracing = "llama3.traced.TracedLlama"

    def __init__(
        self, model_id: str, from_scratch: bool = False, num_hidden_layers: int | None = None, seed: int = 0
    ):
        super().__init__()
        self.model_id, self.from_scratch, self.seed = model_id, from_scratch, seed
        config = assets.load_config(model_id, num_hidden_layers)
        config.use_cache = False
        with torch.device("meta"):
            self.model = LlamaForCausalLM(config)
            self.model.lm_head = LossHead(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.model.lm_head.weight = self.model.model.embed_tokens.weight
        self.model.model.rotary_emb = LlamaRotaryEmbedding(
            config=config
        )  # its frequencies are buffers: real ones, in fp32
        config._attn_implementation = "packed"

    @property
    def sharded_alone(self) -> list[nn.Module]:
        """Large modules beside the decoder layers that are gathered one at a time; tied ones stay with the root."""
        if self.model.config.tie_word_embeddings:
            return []
        return [self.model.model.embed_tokens, self.model.lm_head]

    def forward(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The loss summed over the batch's valid targets, the same detached, and their number (llama3.data.Collator makes batches)."""
        positions = batch["position_ids"]
        # A mask of four dims reaches the attention function as it is; without one, transformers 4 would build one of T x T.
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
        """The safetensors file of each pretrained parameter, by its Hugging Face name; None when training from scratch."""
        return None if self.from_scratch else assets.weight_files(self.model_id)

    def initial_values(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of a fresh parameter, flattened, in fp32: a function of the seed and the name only.

        Normal with transformers' `initializer_range`, ones for the norms. Drawn in blocks, each with a generator of its own, so that
        a shard costs what it holds.
        """
        if name.endswith("norm.weight"):
            return torch.ones(stop - start)
        if name.endswith("bias"):
            return torch.zeros(stop - start)
        block = 2**16
        values = torch.empty(stop - start)
        for index in range(start // block, math.ceil(stop / block)):
            digest = hashlib.sha256(f"{self.seed}/{name}/{index}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
            drawn = torch.randn(block, generator=generator)
            first, last = max(start, index * block), min(stop, (index + 1) * block)
            values[first - start : last - start] = drawn[first - index * block : last - index * block]
        return values * self.model.config.initializer_range
