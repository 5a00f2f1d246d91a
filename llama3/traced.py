"""Gives Llama the form that nnScaler can trace: one path, and two functions that stay whole."""

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llama3.loss import chunked_cross_entropy
from llama3.model import Llama, packed_attention


def document_attention(query, key, value, positions, scaling=None):
    """packed_attention whose documents are given by positions (B, 1, 1, T) that restart at 0 with each."""
    # Unlike boundaries, positions have one shape, and any values are valid: nnScaler's profiler gives zeros.
    B, T = query.shape[0], query.shape[2]
    starts = positions.reshape(B, T) == 0
    starts[:, 0] = True
    end = torch.tensor([B * T], device=starts.device)
    cu_seqlens = torch.cat([starts.flatten().nonzero().flatten(), end]).to(torch.int32)
    return packed_attention(None, query, key, value, scaling=scaling, cu_seqlens=cu_seqlens)[0].contiguous()


def _attend(module, query, key, value, attention_mask, scaling=None, **_):
    return document_attention(query, key, value, attention_mask, scaling=scaling), None


ALL_ATTENTION_FUNCTIONS["documents"] = _attend


class TracedLlama(Llama):
    """Llama with the same parameters and the same loss."""

    # Each function that stays whole -> the dims of its tensors in nnScaler's notation ("^": never split).
    whole_functions = {
        document_attention: "b n^ t^ h^, b k^ t^ h^, b k^ t^ h^, b 1 1 t^ -> b t^ n^ h^",
        chunked_cross_entropy: "b^ t^ d^, v^ d^, b^ t^ -> 1",
    }

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.model.config._attn_implementation = "documents"

    def documents(self, batch: dict) -> dict[str, torch.Tensor]:
        return {}  # the positions tell
