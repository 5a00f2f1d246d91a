"""Computes next-token cross entropy from hidden states in chunks, so that only one chunk's logits exist.

Shapes: N positions with a target, n of them in a chunk, hidden size D, vocabulary V.
"""

from functools import partial

import torch
import torch.nn.functional as F

from tokens import IGNORED

ROWS_PER_CHUNK = 1024  # fewer hold fewer logits, but add to the weight's gradient more often


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradients with the loss, while a chunk's logits exist; backward only scales them."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, needs_grad, loss_and_grad):
        loss_sum = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = None
        if needs_grad and ctx.needs_input_grad[1]:  # not where the weight is frozen
            # The sum over chunks is in fp32: in bf16 it would lose small contributions.
            grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for start in range(0, hidden.shape[0], ROWS_PER_CHUNK):
            rows = slice(start, start + ROWS_PER_CHUNK)
            h, y = hidden[rows], labels[rows]  # (n, D), (n,)
            loss, grad = loss_and_grad(F.linear(h, weight), y, needs_grad)
            loss_sum += loss
            if needs_grad:
                torch.mm(grad, weight, out=grad_hidden[rows])
                if grad_weight is None:
                    continue
                if h.is_cuda:  # the product adds itself, without a pass of its own over the sum
                    torch.addmm(grad_weight, grad.T, h, out_dtype=torch.float32, out=grad_weight)
                else:
                    grad_weight += grad.T @ h
        if needs_grad:
            grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
            ctx.save_for_backward(grad_hidden, grad_weight)
        return loss_sum

    @staticmethod
    def backward(ctx, grad_loss):
        # In place: a second weight's gradient would be a GiB for Llama 3. So backward runs once only.
        grads = (None if grad is None else grad.mul_(grad_loss.to(grad.dtype)) for grad in ctx.saved_tensors)
        return *grads, None, None, None


def loss_and_gradient(logits, labels, needs_grad):
    """Return the loss summed over (n, V) logits, and its gradient, in the logits' memory, or None.

    Compiled, it reads the logits three times, writes the gradient once, and holds nothing else of their size.
    """
    largest = logits.amax(-1, keepdim=True).float()  # (n, 1)
    copy32 = partial(logits.to, torch.float32, copy=True)
    total = copy32().sub_(largest).exp_().sum(-1, keepdim=True)  # (n, 1)
    log_total = largest + total.log()
    target = logits.gather(1, labels[:, None]).float() - log_total  # (n, 1): its log probability
    loss = -target.sum()
    if not needs_grad:
        return loss, None
    # The exponentials again, as other numbers, so that a compiler does not keep those from above.
    grad = logits.copy_(copy32().sub_(log_total).exp_())
    return loss, grad.scatter_(1, labels[:, None], (target.exp() - 1).to(logits.dtype))


def chunked_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, loss_and_grad=None
) -> torch.Tensor:
    """Return the cross entropy, summed over the positions whose label is not -100, in nats and fp32.

    hidden (..., D) and weight (V, D) have one dtype; labels (...) are shifted: position t predicts labels[t].
    loss_and_grad: `loss_and_gradient` if it is compiled.
    """
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    valid = labels != IGNORED
    how = torch.is_grad_enabled(), loss_and_grad or loss_and_gradient
    return _ChunkedCrossEntropy.apply(hidden[valid], weight, labels[valid], *how)


def plain_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return what `chunked_cross_entropy` does, by autograd and with all logits in memory.

    Another loss starts here: change this, train with it, and write it by hand once it is worth it.
    """
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum")
