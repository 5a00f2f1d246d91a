"""The model's parts equal plain computations: attention inside documents, chunked loss, fresh weights."""

import re
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from helpers.devices import on_cuda

from llama3 import loss
from llama3.loss import chunked_cross_entropy, loss_and_gradient, plain_cross_entropy
from llama3.model import Llama, attention_by_document, packed_attention
from llama3.traced import TracedLlama

B, T, N, K, H = 2, 24, 4, 2, 8  # rows, tokens, query heads, key-value heads, head size


def masked_attention(query, key, value, bounds):
    """The same by a mask over each row."""
    (B, N, T, _), K = query.shape, key.shape[1]
    document = torch.bucketize(torch.arange(B * T), torch.tensor(bounds), right=True).view(B, 1, T)
    mask = (document[..., None] == document[..., None, :]) & torch.ones(T, T, dtype=torch.bool).tril()
    key, value = key.repeat_interleave(N // K, 1), value.repeat_interleave(N // K, 1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def queries_keys_values(N=N, K=K, T=T, H=H, **options):
    torch.manual_seed(0)
    return [torch.randn(B, heads, T, H, requires_grad=True, **options) for heads in (N, K, K)]


def test_torch_finds_the_attention_operator_as_it_is_declared():
    query, key, value = (torch.randn(N, T, H).transpose(0, 1).requires_grad_() for _ in range(3))
    bounds = torch.tensor([0, 10, T], dtype=torch.int32)
    torch.library.opcheck(attention_by_document, (query, key, value, bounds, 0.5))


def test_what_nnscaler_takes_as_a_whole_may_be_split_as_its_dims_say():
    """On each dim that they name without "^": the parts give the whole, and its gradients."""
    starts = torch.zeros(B, 1, 1, T, dtype=torch.bool)
    starts[0, ..., [0, 10]] = starts[1, ..., [0, 6]] = True
    hidden, weight = torch.randn(B, T, H, requires_grad=True), torch.randn(7, H, requires_grad=True)
    labels = torch.randint(7, (B, T)).index_fill(1, torch.tensor([3, 23]), -100)

    def attend(query, key, value, _):
        return masked_attention(query, key, value, [0, 10, 24, 30, 48])

    arguments = (queries_keys_values(), starts), ([hidden, weight], labels)
    references, split = (attend, chunked_cross_entropy), []
    cases = zip(TracedLlama.whole_functions.items(), arguments, references, strict=True)
    for (function, dims), (learned, given), reference in cases:
        # "b (k g^) t^" -> ["b", "k", "t^"]
        *named, result = (re.sub(r"\((\S+) .*?\)", r"\1", x).split() for x in re.split(", | -> ", dims))
        for name in filter(str.isalpha, result):
            pairs = zip([*learned, given], named, strict=True)
            parts = [x.chunk(2, names.index(name)) if name in names else (x, x) for x, names in pairs]
            found = torch.cat([function(*part) for part in zip(*parts, strict=True)], result.index(name))
            expected = reference(*learned, given)
            found = found if expected.ndim else found.sum()
            torch.testing.assert_close(found, expected)
            weigh = torch.linspace(1, 2, expected.numel()).view(expected.shape)
            grads = (torch.autograd.grad((x * weigh).sum(), learned) for x in (found, expected))
            torch.testing.assert_close(*grads)
            split.append(name)
    assert split == ["b", "k", "b", "t"]


def largest_error(found, expected):
    """Relative to the largest value."""
    return (found.float().cpu() - expected).abs().max() / expected.abs().max()


# The tiny model's heads, Llama 3 8B's and SmolLM2's: N, K, T, H.
SHAPES = [(4, 2, 24, 8), (32, 8, 160, 128), (9, 3, 160, 64)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("device", ["cpu", on_cuda("cuda")])
def test_attention_on_each_device_and_its_gradients_equal_masked_attention(device, dtype, shape):
    ours, T = queries_keys_values(*shape, device=device, dtype=dtype), shape[2]
    theirs = [x.detach().float().cpu().requires_grad_() for x in ours]
    for bounds in ([0, T, 2 * T], [0, 1, 2, T // 3, T, T + 1, 2 * T - 1, 2 * T]):
        longest = torch.empty(max(stop - start for start, stop in pairwise(bounds)), 0)
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
        out, _ = packed_attention(None, *ours, cu_seqlens=cu_seqlens, longest=longest)
        expected, weights = masked_attention(*theirs, bounds), torch.randn(out.shape)
        found = torch.autograd.grad((out.float().cpu() * weights).sum(), ours)
        wanted = torch.autograd.grad((expected * weights).sum(), theirs)
        for one, other in zip((out, *found), (expected, *wanted), strict=True):
            assert largest_error(one, other) < (2e-2 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("device", ["cpu", on_cuda("cuda")])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_loss_in_bf16_equals_the_loss_in_fp32(device, compiled):
    torch.manual_seed(1)
    hidden, weight = torch.randn(2000, 64).bfloat16(), torch.randn(512, 64).mul(0.1).bfloat16()
    labels = torch.randint(0, 512, (2000,))
    ours = [x.to(device).requires_grad_() for x in (hidden, weight)]
    theirs = [x.float().requires_grad_() for x in (hidden, weight)]
    how = torch.compile(loss_and_gradient, dynamic=True) if compiled else None
    total = chunked_cross_entropy(*ours, labels.to(device), how)
    expected = F.cross_entropy(theirs[0] @ theirs[1].T, labels, reduction="sum")
    found = [total.detach(), *torch.autograd.grad(total, ours)]
    wanted = [expected.detach(), *torch.autograd.grad(expected, theirs)]
    for one, other in zip(found, wanted, strict=True):
        assert largest_error(one, other) < 2e-2


@pytest.mark.parametrize("rows", [1, 7, 1024])
@pytest.mark.parametrize("valid_columns", [11, 0])
def test_chunked_loss_and_gradients_equal_cross_entropy(monkeypatch, rows, valid_columns):
    monkeypatch.setattr(loss, "ROWS_PER_CHUNK", rows)
    torch.manual_seed(1)
    hidden, weight = torch.randn(3, 11, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    labels = torch.randint(0, 50, (3, 11))
    labels[0, :4] = labels[2, -1] = -100
    labels[:, valid_columns:] = -100
    found = chunked_cross_entropy(hidden, weight, labels)
    expected = F.cross_entropy((hidden @ weight.T).view(-1, 50), labels.view(-1), reduction="sum")
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x * 0.3, (hidden, weight)) for x in (found, expected)))


def test_the_plain_form_of_the_loss_is_the_loss():
    torch.manual_seed(1)
    hidden = torch.randn(3, 11, 16, requires_grad=True)
    weight = torch.randn(50, 16, requires_grad=True)
    labels = torch.randint(0, 50, (3, 11))
    labels[0, :4] = -100
    ours = chunked_cross_entropy(hidden, weight, labels)
    plain = plain_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(ours, plain)
    gradients = [torch.autograd.grad(total, (hidden, weight)) for total in (ours, plain)]
    torch.testing.assert_close(*gradients)


def test_only_the_needed_logits_are_held(monkeypatch):
    sizes, linear = [], F.linear
    monkeypatch.setattr(F, "linear", lambda h, w: sizes.append(len(h) * len(w)) or linear(h, w))
    monkeypatch.setattr(loss, "ROWS_PER_CHUNK", 10)
    labels = torch.full((100,), -100)
    labels[:30] = 1
    chunked_cross_entropy(torch.randn(100, 16), torch.randn(50, 16), labels)
    assert max(sizes) <= 500 and sum(sizes) == 30 * 50


def test_the_gradient_of_the_logits_takes_their_memory():
    logits = torch.randn(20, 50).bfloat16()
    assert loss_and_gradient(logits, torch.arange(20), True)[1].data_ptr() == logits.data_ptr()


@pytest.fixture(scope="module")
def model(tiny):
    return Llama(str(tiny), from_scratch=True, seed=3)


def test_fresh_values_depend_on_seed_and_name_and_not_on_how_they_are_cut(model, tiny):
    whole = model.initial_values("a.weight", 0, 200_000)
    cuts = [0, 1, 65_535, 65_537, 131_072, 199_999, 200_000]
    assert torch.equal(torch.cat([model.initial_values("a.weight", *cut) for cut in pairwise(cuts)]), whole)
    assert not torch.equal(model.initial_values("b.weight", 0, 200_000), whole)
    assert not torch.equal(Llama(str(tiny), seed=4).initial_values("a.weight", 0, 200_000), whole)
    deviation = model.model.config.initializer_range
    assert whole.mean().abs() < deviation * 0.02 and whole.std() == pytest.approx(deviation, rel=0.02)
    assert (model.initial_values("model.norm.weight", 0, 7) == 1).all()


def test_parameters_wait_on_the_meta_device_and_rope_is_real_and_in_fp32(model):
    assert all(parameter.is_meta for parameter in model.parameters())
    assert {(x.dtype, x.device.type) for x in model.buffers()} == {(torch.float32, "cpu")}


def test_tied_embeddings_are_one_parameter():
    names = [name for name, _ in Llama("smollm2-135m", num_hidden_layers=1).named_parameters()]
    assert sum("lm_head" in name or "embed" in name for name in names) == 1
