"""Gives Llama the form that nnScaler can trace: one path, and two functions that stay whole."""

import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llama3.loss import chunked_cross_entropy
from llama3.model import Llama, LossHead, packed_attention


def document_attention(query, key, value, starts, scaling=None):
    """packed_attention whose documents are given by `starts` (B, 1, 1, T): does one begin with this token?"""
    # Unlike boundaries they have one shape, and any values are valid. nnScaler's profiler gives zeros, which
    # are the longest documents.
    B, T = query.shape[0], query.shape[2]
    starts = starts.reshape(B, T).clone()
    starts[:, 0] = True
    end = torch.tensor([B * T], device=starts.device)
    cu_seqlens = torch.cat([starts.flatten().nonzero().flatten(), end]).to(torch.int32)
    return packed_attention(None, query, key, value, scaling=scaling, cu_seqlens=cu_seqlens)[0].contiguous()


def _attend(module, query, key, value, attention_mask, scaling=None, **_):
    return document_attention(query, key, value, attention_mask == 0, scaling=scaling), None


ALL_ATTENTION_FUNCTIONS["documents"] = _attend


def placed_loss(hidden, weight, labels):
    """The loss summed over the tokens, at the first of them (B, T); the others have 0.

    nnScaler splits only dims that the result has too: so each device can have some of the tokens.
    """
    B, T = labels.shape
    return F.pad(chunked_cross_entropy(hidden, weight, labels).view(1, 1), (0, T - 1, 0, B - 1))


class TracedLossHead(LossHead):
    """LossHead with a loss that nnScaler can split."""

    def forward(self, hidden, labels):
        return placed_loss(hidden, self.weight, labels).sum()


class TracedLlama(Llama):
    """Llama with the same parameters and the same loss."""

    head_class = TracedLossHead
    sum_names = ("loss_sum", "targets")
    # Each function that stays whole -> the dims of its tensors in nnScaler's notation ("^": never split). Of
    # (k g^) it splits k: a device gets some of the key-value heads, each with its group of g query heads.
    whole_functions = {
        document_attention: "b (k g^) t^ h^, b k t^ h^, b k t^ h^, b 1 1 t^ -> b t^ (k g^) h^",
        placed_loss: "b t d^, v^ d^, b t -> b t",
    }

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.model.config._attn_implementation = "documents"

    def forward(self, batch: dict) -> tuple[torch.Tensor, ...]:
        """Return what nnScaler differentiates, then the sums that `sum_names` names."""
        sums = super().forward(batch)
        return sums["loss_sum"], *(sums[name].detach() for name in self.sum_names)

    def documents(self, batch: dict) -> dict[str, torch.Tensor]:
        return {}  # the positions tell
