"""Computes next-token cross entropy from hidden states in chunks, so that only one chunk's logits exist.

Shapes: N positions with a target, n of them in a chunk, hidden size D, vocabulary V.
"""

import torch
import torch.nn.functional as F

IGNORED = -100  # the label of a position without a target
LOGITS_PER_CHUNK = 2**26  # 256 MiB in fp32; smaller chunks add to the weight's gradient more often


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradients with the loss, while a chunk's logits exist; backward only scales them."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, needs_grad):
        chunk = max(1, LOGITS_PER_CHUNK // weight.shape[0])
        loss_sum = torch.zeros((), dtype=torch.float32, device=hidden.device)
        if needs_grad:
            grad_hidden = torch.empty_like(hidden)
            # The sum over chunks is in fp32: in bf16 it would lose small contributions.
            grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for start in range(0, hidden.shape[0], chunk):
            h, y = hidden[start : start + chunk], labels[start : start + chunk]  # (n, D), (n,)
            logits = F.linear(h, weight).float()  # (n, V)
            largest = logits.amax(-1, keepdim=True)  # (n, 1)
            target = logits.gather(1, y[:, None])  # (n, 1)
            exponentials = logits.sub_(largest).exp_()  # in place, to save memory
            total = exponentials.sum(-1, keepdim=True)  # (n, 1)
            loss_sum += (total.log() + largest - target).sum()
            if needs_grad:
                softmax = exponentials.div_(total)
                grad = softmax.scatter_add_(1, y[:, None], torch.full_like(total, -1.0)).to(hidden.dtype)
                grad_hidden[start : start + chunk] = grad @ weight
                grad_weight += grad.T @ h
        if needs_grad:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return loss_sum

    @staticmethod
    def backward(ctx, grad_loss):
        hidden, weight = (grad * grad_loss.to(grad.dtype) for grad in ctx.saved_tensors)
        return hidden, weight, None, None


def chunked_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the cross entropy, summed over the positions whose label is not -100, in nats and fp32.

    hidden (..., D) and weight (V, D) have one dtype; labels (...) are shifted: position t predicts labels[t].
    """
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    valid = labels != IGNORED
    return _ChunkedCrossEntropy.apply(hidden[valid], weight, labels[valid], torch.is_grad_enabled())
