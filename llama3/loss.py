"""Next-token cross entropy straight from hidden states, in chunks, so that the logits of a whole batch never exist at once."""

import torch
import torch.nn.functional as F

IGNORED = -100  # the label of a position that predicts nothing
LOGITS_PER_CHUNK = 2**26  # 256 MiB in fp32; smaller chunks cost more additions to the weight's gradient


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The gradients are computed with the loss, while a chunk's logits are at hand: backward only scales them."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, needs_grad):
        N, V = hidden.shape[0], weight.shape[0]
        chunk = max(1, LOGITS_PER_CHUNK // V)
        loss_sum = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        # Summed over chunks in fp32: a bf16 sum would lose the small contributions.
        grad_weight = (
            torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needs_grad else None
        )
        for start in range(0, N, chunk):
            h, y = hidden[start : start + chunk], labels[start : start + chunk]  # (n, H), (n,)
            logits = F.linear(h, weight).float()  # (n, V)
            largest = logits.amax(-1, keepdim=True)  # (n, 1)
            target = logits.gather(1, y[:, None])
            exponentials = logits.sub_(largest).exp_()  # in place: the logits are not needed again
            total = exponentials.sum(-1, keepdim=True)
            loss_sum += (total.log() + largest - target).sum()
            if needs_grad:
                grad = exponentials.div_(total)  # the softmax
                grad.scatter_add_(1, y[:, None], torch.full_like(total, -1.0))
                grad = grad.to(hidden.dtype)
                grad_hidden[start : start + chunk] = grad @ weight
                grad_weight += grad.T @ h
        if needs_grad:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return loss_sum

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            grad_hidden * grad_loss.to(grad_hidden.dtype),
            grad_weight * grad_loss.to(grad_weight.dtype),
            None,
            None,
        )


def chunked_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum, in nats and fp32, of the cross entropy at the positions whose label is not -100.

    hidden (..., H), weight (V, H) in the same dtype, labels (...) already shifted: labels[t] is the token that position t predicts.
    """
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    valid = labels != IGNORED
    return _ChunkedCrossEntropy.apply(hidden[valid], weight, labels[valid], torch.is_grad_enabled())
