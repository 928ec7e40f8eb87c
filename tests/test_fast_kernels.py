"""fast/'s arithmetic changes no result: products by packed weights, dropout masks, norms, the loss
with the head, attention over rows."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import make_checkpoint
from test_train import setup
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import fast
from fast import kernels
from fast.attention import Rows, attention
from fast.kernels import dropout_mask, linear
from fast.layers import PackedLinear, ShortlistHead, greedy

has_bf16 = kernels.ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.001])
def test_dropout_keeps_each_element_with_its_probability(p):
    torch.manual_seed(0)
    mask = dropout_mask(torch.empty(401, 999), p).bool()
    n, sigma = mask.numel(), (p * (1 - p) / mask.numel()) ** 0.5
    dropped = ~mask
    assert abs(dropped.double().mean() - p) < 5 * sigma + 2**-16
    for lane in range(4):  # four masks share one draw of 64 bits
        assert abs(dropped.flatten()[lane::4].double().mean() - p) < 10 * sigma + 2**-16
    for shift in (1, 2, 3, 4, 999):  # neighbours are independent
        both = (dropped.flatten()[shift:] & dropped.flatten()[:-shift]).double().mean()
        assert abs(both - p * p) < 6 * (p * p / n) ** 0.5 + 2**-15
    assert not torch.equal(mask, dropout_mask(torch.empty(401, 999), p).bool())


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_norm_is_torchs_with_its_gradient(size):
    torch.manual_seed(0)
    x, weight, grad = torch.randn(2, 9, 33) * size, torch.randn(33), torch.randn(2, 9, 33)
    x[0, 0] = 0
    results = []

    def torchs(x, weight, eps):
        return F.rms_norm(x, weight.shape, weight, eps)

    for function, dtype in ((kernels.rms_norm, torch.float32), (torchs, torch.float64)):
        own = x.detach().to(dtype, copy=True).requires_grad_()
        y = function(own, weight.to(dtype), 1e-6)
        y.backward(grad.to(dtype))
        results.append((y.detach().float(), own.grad.float()))
    for mine, theirs in zip(*results):
        assert (
            (mine - theirs).abs() <= 1e-5 * (theirs.abs() + theirs.abs().mean(-1, keepdim=True))
        ).all()
    trained = weight.clone().requires_grad_()
    kernels.rms_norm(x.clone().requires_grad_(), trained, 1e-6).backward(grad)  # as in pretraining
    wanted = (grad * F.rms_norm(x, weight.shape, None, 1e-6)).sum((0, 1))
    assert torch.allclose(trained.grad, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "dtype, close", [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 3e-2)]
)
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_linear_is_a_product_and_a_sum(tokens, dtype, close):
    """Value and gradient, for a frozen weight and for one that learns."""
    torch.manual_seed(0)
    tensors = {
        name: torch.randn(shape, dtype=dtype)
        for name, shape in dict(x=(2, tokens, 24), weight=(40, 24), bias=(40,)).items()
    }
    for bias, learns in itertools.product((False, True), (("x",), ("x", "weight"))):
        given = {
            k: v.detach().requires_grad_(k in learns)
            for k, v in tensors.items()
            if k != "bias" or bias
        }
        leaves = [given[k] for k in learns]
        y, plain = linear(**given), given["x"] @ given["weight"].t() + given.get("bias", 0)
        assert y.shape == plain.shape and torch.allclose(y, plain, atol=close, rtol=close)
        grad = torch.randn_like(plain)
        for mine, theirs in zip(
            *(torch.autograd.grad(out, leaves, grad) for out in (y, plain)), strict=True
        ):
            assert torch.allclose(mine, theirs, atol=10 * close, rtol=10 * close)


@pytest.mark.skipif(
    not kernels.ONEDNN or not torch.backends.mkl.is_available(),
    reason="torch was built without oneDNN or MKL, or not for x86",
)
@pytest.mark.parametrize("library", ["MKL", "oneDNN"])
@pytest.mark.parametrize("threads", [(1, 1), (1, 2), (2, 1)])
@pytest.mark.parametrize("D_out, D_in", [(40, 24), (3, 900), (1300, 130)])
def test_packed_weight_multiplies_like_the_plain_one(library, threads, D_out, D_in, monkeypatch):
    """By either library, whichever this machine's processor would have: value and gradients, for
    any number of tokens, by as many threads as packed it or not."""
    monkeypatch.setattr(kernels, "MKL", torch.ops.mkl._mkl_linear if library == "MKL" else None)
    torch.manual_seed(0)
    weight, bias, before = torch.randn(D_out, D_in), torch.randn(D_out), torch.get_num_threads()

    def near(a, b):
        atol = 1e-4 * b.detach().abs().max().item()
        return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=atol)

    try:
        torch.set_num_threads(threads[0])
        by = kernels.packed(weight, training=True)
        assert (
            isinstance(by, kernels.Packed)
            and by.shape == weight.shape
            and by.t().shape == (D_in, D_out)
        )
        torch.set_num_threads(threads[1])
        for tokens, b in itertools.product((1, 2, 7, 64, 300, 1001), (None, bias)):
            x, grad = (
                torch.randn(2, tokens, D_in, requires_grad=True),
                torch.randn(2, tokens, D_out),
            )
            y, plain = linear(x, by, b), F.linear(x, weight, b)
            assert near(y, plain) and near(
                *(torch.autograd.grad(out, x, grad)[0] for out in (y, plain))
            )
            assert not linear(x.detach(), by, b).requires_grad  # below the first adapter
            with torch.no_grad():
                # not contiguous
                assert near(linear(x.transpose(0, 1), by), F.linear(x.transpose(0, 1), weight))
    finally:
        torch.set_num_threads(before)
    assert kernels.frozen_matmul(torch.randn(2, 0, D_in), by).shape == (2, 0, D_out)
    with pytest.raises(AssertionError):
        kernels.frozen_matmul(torch.randn(3, D_in + 1), by)
    with pytest.raises(AssertionError, match="for decoding"):
        linear(torch.randn(3, D_in, requires_grad=True), kernels.packed(weight)).sum().backward()
    for other in (torch.float64, torch.bfloat16):
        plain = weight.to(other)
        assert kernels.packed(plain) is plain  # neither library is asked there


@pytest.mark.skipif(not has_bf16, reason="oneDNN has no bf16 on this machine")
@pytest.mark.parametrize("V, D", [(700, 32), (1001, 50), (3, 8), (20_000, 300)])
def test_shortlist_has_the_greatest_logit(V, D, monkeypatch):
    """Of random weights, of such as bf16 can't tell from each other, with all logits below zero,
    with a word far longer than the others, and where bf16 rounds as badly as it can."""
    monkeypatch.setattr(kernels, "BF16", kernels.ONEDNN)
    torch.manual_seed(0)
    plain = []
    monkeypatch.setattr(
        kernels.F, "linear", lambda x, weight: plain.append(len(x)) or x @ weight.t()
    )
    way, noise, few = torch.randn(D), torch.randn(V, D), max(2, V // 100)
    # `low` becomes 1 in bf16, `high` 1 + 2^-7. The first word's logit is greater by a hair, and in
    # bf16 less by nearly as much as it can be: x and the two words point the same way or the
    # opposite one.
    low, high = torch.tensor([1 + 2**-8 - 2**-16, 1 + 2**-8 + 2**-16]).unbind()
    half = torch.arange(D) < D // 2

    def pick(a, b):
        return torch.where(half, a, b)

    adverse = (
        pick(low, high),
        torch.stack([pick(low, -high), pick(-low, high), *(noise[2:] / D - 1)]),
    )
    adverse[1][0, 0] += D * 2**-13
    kinds = {
        "random": (way, noise),
        "alike": (way, way + 1e-3 * noise),
        "few alike": (way, torch.cat([way + 1e-4 * noise[:few], noise[few:]])),
        "below": (way.abs(), -way.abs() + 0.3 * noise),
        "one long": (way, torch.cat([30 * noise[:1], noise[1:]])),
        "adverse": adverse,
        "equal": (way, way.expand(V, D)),
    }
    for kind, (first, weight) in kinds.items():
        short = kernels.shortlist(weight)
        for n, scale in itertools.product((1, 2, 33), (2**-10, 1, 2**10)):
            x = torch.cat([first[None], torch.randn(n - 1, D)]) * scale
            plain.clear()
            # (n,), (n, V)
            words, logits = short.argmax(x, weight), x.double() @ weight.double().t()
            unsure = 1e-6 * scale * weight.norm(dim=1).max() * D**0.5  # what fp32 itself can't tell
            assert (logits.gather(1, words[:, None])[:, 0] >= logits.amax(1) - unsure).all(), (
                kind,
                n,
                scale,
            )
            assert kind != "adverse" or words[0] == logits[0].argmax() == 0
            assert kind != "equal" or plain == [n]  # all that could be it were too many
            assert (
                not plain
                or V < 700
                or kind in ("alike", "below", "one long", "equal")
                or kind == "adverse"
                and n > 1
            ), (kind, n, scale)
    plain.clear()
    # two equal ones, not too many, are the greatest: the first
    weight = torch.cat([weight[:1] + 1, weight, weight[:1] + 1])
    assert (
        V < 700
        or kernels.shortlist(weight).argmax(weight[:1], weight).tolist() == [0]
        and not plain
    )
    assert short.argmax(torch.full((2, D), torch.nan), weight).tolist() == [0, 0]
    for other in (torch.float64, torch.bfloat16):
        assert kernels.shortlist(weight.to(other)) is None
    monkeypatch.setattr(kernels, "BF16", None)
    assert kernels.shortlist(weight) is None


def projections(lm):
    """All that multiplies by a frozen weight, by name."""
    kinds = nn.Linear, PackedLinear, ShortlistHead
    return {name: module for name, module in lm.named_modules() if isinstance(module, kinds)}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("training, lists", [(True, False), (False, False), (False, True)])
def test_a_prepared_backbone_is_the_same_and_keeps_no_plain_projection(
    tmp_path, sentences, tied, training, lists, monkeypatch
):
    """lists: the head has a shortlist, and is left plain."""
    if lists and not has_bf16:
        pytest.skip("oneDNN has no bf16 on this machine")
    monkeypatch.setattr(kernels, "BF16", kernels.ONEDNN if lists else None)
    folder = make_checkpoint(tmp_path, tie_word_embeddings=tied)
    lm, adapter, examples = setup(folder, sentences, dropout=0.3)
    found = [measured(lm, adapter, examples, training)]
    assert len(projections(lm)) == 7 * lm.cfg.num_hidden_layers + 1
    plain = [StorageWeakRef(m.weight.untyped_storage()) for m in projections(lm).values()]
    embeddings = lm.model.embed_tokens.weight.data_ptr()
    fast.prepare(lm, adapter, training)
    # For decoding q, k and v are one.
    assert len(projections(lm)) == (7 if training else 5) * lm.cfg.num_hidden_layers + 1
    assert isinstance(lm.lm_head, ShortlistHead) == lists
    if kernels.MKL or kernels.ONEDNN:
        for name, module in projections(lm).items():
            if name != "lm_head" or not lists:
                assert isinstance(module.weight, kernels.Packed), name
                assert isinstance(module.weight.transposed, kernels.Packed) == training, name
        # Let go of the file.
        assert all(weight.expired() for weight in plain)
        assert lm.model.embed_tokens.weight.data_ptr() != embeddings
    found.append(measured(lm, adapter, examples, training))
    (loss, grads), (packed_loss, packed_grads) = found
    assert torch.allclose(loss, packed_loss, rtol=1e-4) and loss[2] > 0.1
    for a, b in zip(grads, packed_grads):
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(a.abs().max()))


def measured(lm, adapter, examples, training):
    """(fast/'s loss on some examples, its gradients)."""
    grads = []
    with torch.set_grad_enabled(training):
        torch.manual_seed(0)
        loss = torch.stack(fast.forward_sums(lm, adapter, examples[:8], 1.0, True))
        states = torch.randn(9, lm.cfg.hidden_size)
        assert torch.equal(greedy(lm, states), lm.lm_head(states).argmax(1))
        if training:
            learned = list(adapter.parameters())
            grads = torch.autograd.grad(loss[0], learned, allow_unused=True)
    return loss.detach(), grads


@pytest.mark.parametrize("alpha", [0.1, 5.0])
def test_rdrop_equals_the_equations_written_out(alpha):
    torch.manual_seed(0)
    hidden, head = torch.randn(5, 2, 6, requires_grad=True), torch.randn(11, 6)
    labels = torch.tensor([3, 0, 10, 7, 7])
    first, second = (hidden[:, p].double() @ head.double().t() for p in range(2))
    nll = kl = torch.zeros((), dtype=torch.float64)
    for token in range(5):
        p1, p2 = (torch.exp(z[token]) / torch.exp(z[token]).sum() for z in (first, second))
        y = labels[token]
        nll = nll - (torch.log(p1[y]) + torch.log(p2[y])) / 2  # eq. 8, times M
        for v in range(11):  # eq. 7, times M
            forth, back = p1[v] * torch.log(p1[v] / p2[v]), p2[v] * torch.log(p2[v] / p1[v])
            kl = kl + (forth + back) / 2
    ours = kernels.head_loss(hidden, head, labels, alpha)
    for a, b in zip(ours, (nll + alpha * kl, nll, kl)):
        assert torch.allclose(a.double(), b, rtol=1e-5)
    naive = torch.autograd.grad(3 * (nll + alpha * kl), hidden)[0]  # eq. 9
    assert torch.allclose(torch.autograd.grad(3 * ours[0], hidden)[0], naive, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("passes", [1, 2])
def test_head_loss_is_the_same_in_every_cut(passes, monkeypatch):
    """However many targets share a product and a block: plain torch's loss, and its gradient by the
    hidden states."""
    torch.manual_seed(0)
    hidden, head = torch.randn(23, passes, 8, requires_grad=True), torch.randn(50, 8)
    labels = torch.randint(50, (23,))
    logp = (hidden @ head.t()).log_softmax(-1)
    nll = kl = torch.zeros(())
    for p in range(passes):
        nll = nll + F.nll_loss(logp[:, p], labels, reduction="sum") / passes
    if passes == 2:
        there, back = (logp[:, 0], logp[:, 1]), (logp[:, 1], logp[:, 0])
        for one, other in (there, back):
            kl = kl + F.kl_div(one, other, reduction="sum", log_target=True) / 2
    expected = (nll + 0.7 * kl, nll, kl)
    (wanted,) = torch.autograd.grad(nll + 0.7 * kl, hidden)
    cuts = [(2**23, 256, 2**20), (500, 1, 2**20), (1, 14, 2**20)]
    for logits, rows, block in [*cuts, (2**23, 1, 200), (700, 1, 1), (1, 1, 1)]:
        monkeypatch.setattr(kernels, "LOGITS", {"cpu": logits})
        monkeypatch.setattr(kernels, "AT_LEAST", rows)
        monkeypatch.setattr(kernels, "BLOCK", block)
        parts = kernels.head_loss(hidden, head, labels, 0.7)
        for a, b in zip(parts, expected):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)
        grad = torch.autograd.grad(parts[0], hidden)[0]
        assert torch.allclose(grad, wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(kernels.head_loss(hidden, head, labels, 0.7)[0], expected[0])


@pytest.mark.parametrize("passes", [1, 2])
def test_head_loss_of_targets_whose_probability_is_no_number_of_fp32(passes):
    hidden = torch.tensor([[[30.0], [29.0]], [[-30.0], [-31.0]]])[:, :passes]
    weight, labels = torch.tensor([[10.0], [-10.0], [0.0]]), torch.tensor([1, 0])
    loss, nll, kl = kernels.head_loss(hidden, weight, labels, 0.1)
    # a logit some 600 below the largest for each target, in both passes together as for one
    torch.testing.assert_close(nll.item(), 1200.0)
    assert kl == 0 and loss == nll


@pytest.mark.parametrize("passes", [1, 2])
def test_head_loss_rounds_its_gradient_once(passes):
    """bf16, targets that the model is nearly sure of: the label's gradient p - 1 must not be lost
    in the rounding of p."""
    torch.manual_seed(0)
    head = torch.randn(50, 8).bfloat16()
    labels = torch.arange(40)
    hidden = (5 * F.normalize(head[labels].float(), dim=-1))[:, None].repeat(1, passes, 1)
    hidden = (hidden * torch.rand_like(hidden[:, :, :1]).add(0.5)).bfloat16().requires_grad_()
    logits = (hidden.detach() @ head.t()).float().requires_grad_()  # rounded as the loss's own are
    logp = logits.log_softmax(-1)
    likely = logp[range(40), :, labels]  # (N, P)
    loss = -likely.sum() / passes
    if passes == 2:
        loss = (
            loss
            + 0.7 * ((logp[:, 0].exp() - logp[:, 1].exp()) * (logp[:, 0] - logp[:, 1])).sum() / 2
        )
    wanted = torch.autograd.grad(loss, logits)[0] @ head.float()  # (N, P, D)
    ours = torch.autograd.grad(kernels.head_loss(hidden, head, labels, 0.7)[0], hidden)[0].float()
    error = (ours - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    sure = (likely > -2e-3) & (likely < -1e-5)  # p rounds to 1 in bf16, but not in fp32
    assert sure.sum() > 3 and error[sure].max() < 0.05 and error[likely < -2e-3].max() < 0.05


@pytest.mark.parametrize("lengths", [[5], [3, 3, 7, 1, 1, 1, 4, 3], [2] * 6])
@pytest.mark.parametrize("groups", [4, 2])
def test_attention_over_rows_equals_each_row_alone(lengths, groups):
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, sum(lengths), 8, requires_grad=True) for heads in (4, groups, groups)
    )
    together = attention(q, k, v, rows=Rows.of(lengths, "cpu"))
    alone = []
    for one, two, three in zip(*(x.split(lengths, 2) for x in (q, k, v))):
        two, three = (x.repeat_interleave(4 // groups, 1) for x in (two, three))
        scores = one @ two.mT / 8**0.5 + torch.full((one.shape[2],) * 2, -torch.inf).triu(1)
        alone.append(scores.softmax(-1) @ three)
    alone, grad = torch.cat(alone, 2), torch.randn_like(together)
    assert torch.allclose(together, alone, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(y, (q, k, v), grad) for y in (together, alone))):
        assert torch.allclose(a, b, atol=1e-5)
