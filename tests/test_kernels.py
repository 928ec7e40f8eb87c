"""What makes it fast changes no result: products by packed weights, dropout masks, the head's loss, attention, experts in groups."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef

import experts
import kernels
import model as backbone
from attention import Rows, attention
from conftest import make_checkpoint, randomise, update_alone
from crosslora import CrossLoRA
from data import LANGUAGES
from kernels import kept, linear
from test_train import setup
from train import forward_sums

has_bf16 = kernels.ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.001])
def test_dropout_keeps_each_element_with_its_probability(p):
    torch.manual_seed(0)
    mask = kept(torch.empty(401, 999), p).bool()
    n, sigma = mask.numel(), (p * (1 - p) / mask.numel()) ** 0.5
    dropped = ~mask
    assert abs(dropped.double().mean() - p) < 5 * sigma + 2**-16
    for lane in range(4):  # four masks share one draw of 64 bits
        assert abs(dropped.flatten()[lane::4].double().mean() - p) < 10 * sigma + 2**-16
    for shift in (1, 2, 3, 4, 999):  # neighbours are independent
        both = (dropped.flatten()[shift:] & dropped.flatten()[:-shift]).double().mean()
        assert abs(both - p * p) < 6 * (p * p / n) ** 0.5 + 2**-15
    assert not torch.equal(mask, kept(torch.empty(401, 999), p).bool())


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_norm_is_torchs_with_its_gradient(size):
    torch.manual_seed(0)
    x, weight, grad = torch.randn(2, 9, 33) * size, torch.randn(33), torch.randn(2, 9, 33)
    x[0, 0] = 0
    results = []
    torchs = lambda x, weight, eps: F.rms_norm(x, weight.shape, weight, eps)
    for function, dtype in ((kernels.rms_norm, torch.float32), (torchs, torch.float64)):
        own = x.detach().to(dtype, copy=True).requires_grad_()
        y = function(own, weight.to(dtype), 1e-6)
        y.backward(grad.to(dtype))
        results.append((y.detach().float(), own.grad.float()))
    for mine, theirs in zip(*results):
        assert ((mine - theirs).abs() <= 1e-5 * (theirs.abs() + theirs.abs().mean(-1, keepdim=True))).all()
    trained = weight.clone().requires_grad_()
    kernels.rms_norm(x.clone().requires_grad_(), trained, 1e-6).backward(grad)  # as in pretraining
    wanted = (grad * F.rms_norm(x, weight.shape, None, 1e-6)).sum((0, 1))
    assert torch.allclose(trained.grad, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_linear_is_a_product_and_a_sum(tokens, dtype, close):
    """Value and gradient, for a frozen weight and for one that learns."""
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape, dtype=dtype) for name, shape in dict(x=(2, tokens, 24), weight=(40, 24), bias=(40,)).items()}
    for bias, learns in itertools.product((False, True), (("x",), ("x", "weight"))):
        given = {k: v.detach().requires_grad_(k in learns) for k, v in tensors.items() if k != "bias" or bias}
        leaves = [given[k] for k in learns]
        y, plain = linear(**given), given["x"] @ given["weight"].t() + given.get("bias", 0)
        assert y.shape == plain.shape and torch.allclose(y, plain, atol=close, rtol=close)
        grad = torch.randn_like(plain)
        for mine, theirs in zip(*(torch.autograd.grad(out, leaves, grad) for out in (y, plain)), strict=True):
            assert torch.allclose(mine, theirs, atol=10 * close, rtol=10 * close)


@pytest.mark.skipif(not kernels.ONEDNN or not torch.backends.mkl.is_available(),
                    reason="torch was built without oneDNN or MKL, or not for x86")
@pytest.mark.parametrize("library", ["MKL", "oneDNN"])
@pytest.mark.parametrize("threads", [(1, 1), (1, 2), (2, 1)])
@pytest.mark.parametrize("D_out, D_in", [(40, 24), (3, 900), (1300, 130)])
def test_packed_weight_multiplies_like_the_plain_one(library, threads, D_out, D_in, monkeypatch):
    """By either library, whichever this machine's processor would have: value and gradients, for any number of tokens, by as many
    threads as packed it or not."""
    monkeypatch.setattr(kernels, "MKL", torch.ops.mkl._mkl_linear if library == "MKL" else None)
    torch.manual_seed(0)
    weight, bias, before = torch.randn(D_out, D_in), torch.randn(D_out), torch.get_num_threads()
    near = lambda a, b: a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4 * b.detach().abs().max().item())
    try:
        torch.set_num_threads(threads[0])
        by = kernels.packed(weight, training=True)
        assert isinstance(by, kernels.Packed) and by.shape == weight.shape and by.t().shape == (D_in, D_out)
        torch.set_num_threads(threads[1])
        for tokens, b in itertools.product((1, 2, 7, 64, 300, 1001), (None, bias)):
            x, grad = torch.randn(2, tokens, D_in, requires_grad=True), torch.randn(2, tokens, D_out)
            y, plain = linear(x, by, b), F.linear(x, weight, b)
            assert near(y, plain) and near(*(torch.autograd.grad(out, x, grad)[0] for out in (y, plain)))
            assert not linear(x.detach(), by, b).requires_grad  # below the first adapter
            with torch.no_grad():
                assert near(linear(x.transpose(0, 1), by), F.linear(x.transpose(0, 1), weight))  # not contiguous
    finally:
        torch.set_num_threads(before)
    assert kernels.product(torch.randn(2, 0, D_in), by).shape == (2, 0, D_out)
    with pytest.raises(AssertionError):
        kernels.product(torch.randn(3, D_in + 1), by)
    with pytest.raises(AssertionError, match="for decoding"):
        linear(torch.randn(3, D_in, requires_grad=True), kernels.packed(weight)).sum().backward()
    for other in (torch.float64, torch.bfloat16):
        plain = weight.to(other)
        assert kernels.packed(plain) is plain  # neither library is asked there


@pytest.mark.skipif(not has_bf16, reason="oneDNN has no bf16 on this machine")
@pytest.mark.parametrize("V, D", [(700, 32), (1001, 50), (3, 8), (20_000, 300)])
def test_shortlist_has_the_greatest_logit(V, D, monkeypatch):
    """Of random weights, of such as bf16 can't tell from each other, with all logits below zero, with a word far longer than the
    others, and where bf16 rounds as badly as it can."""
    monkeypatch.setattr(kernels, "BF16", kernels.ONEDNN)
    torch.manual_seed(0)
    plain = []
    monkeypatch.setattr(kernels.F, "linear", lambda x, weight: plain.append(len(x)) or x @ weight.t())
    way, noise, few = torch.randn(D), torch.randn(V, D), max(2, V // 100)
    # `low` becomes 1 in bf16, `high` 1 + 2^-7. The first word's logit is greater by a hair, and in bf16 less by nearly as much as
    # it can be: x and the two words point the same way or the opposite one.
    low, high = torch.tensor([1 + 2**-8 - 2**-16, 1 + 2**-8 + 2**-16]).unbind()
    half = torch.arange(D) < D // 2
    pick = lambda a, b: torch.where(half, a, b)
    adverse = pick(low, high), torch.stack([pick(low, -high), pick(-low, high), *(noise[2:] / D - 1)])
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
            words, logits = short.argmax(x, weight), x.double() @ weight.double().t()  # (n,), (n, V)
            unsure = 1e-6 * scale * weight.norm(dim=1).max() * D**0.5  # what fp32 itself can't tell
            assert (logits.gather(1, words[:, None])[:, 0] >= logits.amax(1) - unsure).all(), (kind, n, scale)
            assert kind != "adverse" or words[0] == logits[0].argmax() == 0
            assert kind != "equal" or plain == [n]  # all that could be it were too many
            assert not plain or V < 700 or kind in ("alike", "below", "one long", "equal") or kind == "adverse" and n > 1, (kind, n, scale)
    plain.clear()
    weight = torch.cat([weight[:1] + 1, weight, weight[:1] + 1])  # two equal ones, not too many, are the greatest: the first
    assert V < 700 or kernels.shortlist(weight).argmax(weight[:1], weight).tolist() == [0] and not plain
    assert short.argmax(torch.full((2, D), torch.nan), weight).tolist() == [0, 0]
    for other in (torch.float64, torch.bfloat16):
        assert kernels.shortlist(weight.to(other)) is None
    monkeypatch.setattr(kernels, "BF16", None)
    assert kernels.shortlist(weight) is None


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("training, lists", [(True, False), (False, False), (False, True)])
def test_packed_backbone_is_the_same_and_keeps_no_plain_projection(tmp_path, sentences, tied, training, lists, monkeypatch):
    """lists: the head has a shortlist, and is left plain."""
    if lists and not has_bf16:
        pytest.skip("oneDNN has no bf16 on this machine")
    monkeypatch.setattr(kernels, "BF16", kernels.ONEDNN if lists else None)
    folder = make_checkpoint(tmp_path, tie_word_embeddings=tied)
    lm, adapter, examples = setup(folder, sentences, dropout=0.3)
    losses, gradients = [], []
    for packs in (False, True):
        if packs:
            linears = lambda: [module for module in lm.modules() if isinstance(module, backbone.Linear)]
            assert len(linears()) == 7 * lm.cfg.num_hidden_layers + (not tied)
            plain = [StorageWeakRef(module.weight.untyped_storage()) for module in linears()]
            embeddings = lm.model.embed_tokens.weight.data_ptr()
            lm.pack(training)
            # For decoding q, k and v are one.
            assert len(linears()) == (7 if training else 5) * lm.cfg.num_hidden_layers + (not tied or not lists)
            assert isinstance(lm.shortlist, kernels.Shortlist) == lists
            if kernels.MKL or kernels.ONEDNN:
                is_packed = lambda weight: isinstance(weight, kernels.Packed)
                assert is_packed(lm.head_weight()) != lists
                assert all(is_packed(module.weight) and is_packed(module.weight.transposed) == training
                           for module in linears() if not lists or module is not getattr(lm, "lm_head", None))
                with pytest.raises(AssertionError):
                    backbone.save(lm, {}, tmp_path / "saved")
                # Let go of the file.
                assert all(weight.expired() for weight in plain) and lm.model.embed_tokens.weight.data_ptr() != embeddings
        with torch.set_grad_enabled(training):
            torch.manual_seed(0)
            loss = torch.stack(forward_sums(lm, adapter, examples[:8], torch.float32, 1.0, dropout=True))
            states = torch.randn(9, lm.cfg.hidden_size)
            assert torch.equal(lm.greedy(states), lm.head(states).argmax(1))
        if training:
            gradients.append(torch.autograd.grad(loss[0], list(adapter.parameters()), allow_unused=True))
        losses.append(loss.detach())
        del loss  # and its graph, which holds the weights
    assert torch.allclose(*losses, rtol=1e-4) and losses[0][2] > 0.1
    for a, b in zip(*gradients or ((), ())):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(a.abs().max())))


@pytest.mark.parametrize("passes", [1, 2])
def test_head_loss_is_the_same_in_every_cut(passes, monkeypatch):
    """However many targets share a product and a block: plain torch's loss, and its gradient by the hidden states."""
    torch.manual_seed(0)
    hidden, head, labels = torch.randn(23, passes, 8, requires_grad=True), torch.randn(50, 8), torch.randint(50, (23,))
    logp = (hidden @ head.t()).log_softmax(-1)
    nll = -sum(logp[n, p, y] for n, y in enumerate(labels) for p in range(passes)) / passes
    kl = sum(F.kl_div(logp[:, p], logp[:, 1 - p], reduction="sum", log_target=True) for p in range(passes)) / 2 if passes == 2 else nll * 0
    (wanted,) = torch.autograd.grad(nll + 0.7 * kl, hidden)
    for logits, rows, block in ((2**23, 256, 2**20), (500, 1, 2**20), (1, 14, 2**20), (2**23, 1, 200), (700, 1, 1), (1, 1, 1)):
        monkeypatch.setattr(kernels, "LOGITS", {"cpu": logits})
        monkeypatch.setattr(kernels, "AT_LEAST", rows)
        monkeypatch.setattr(kernels, "BLOCK", block)
        parts = kernels.head_loss(hidden, head, labels, 0.7)
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(parts, (nll + 0.7 * kl, nll, kl)))
        assert torch.allclose(torch.autograd.grad(parts[0], hidden)[0], wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(kernels.head_loss(hidden, head, labels, 0.7)[0], nll + 0.7 * kl, rtol=1e-4)


@pytest.mark.parametrize("passes", [1, 2])
def test_head_loss_of_targets_whose_probability_is_no_number_of_fp32(passes):
    hidden = torch.tensor([[[30.0], [29.0]], [[-30.0], [-31.0]]])[:, :passes]
    weight, labels = torch.tensor([[10.0], [-10.0], [0.0]]), torch.tensor([1, 0])
    loss, nll, kl = kernels.head_loss(hidden, weight, labels, 0.1)
    torch.testing.assert_close(nll.item(), 1200.0)  # a logit some 600 below the largest for each target, in both passes together as for one
    assert kl == 0 and loss == nll


@pytest.mark.parametrize("passes", [1, 2])
def test_head_loss_rounds_its_gradient_once(passes):
    """bf16, targets that the model is nearly sure of: the label's gradient p - 1 must not be lost in the rounding of p."""
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
        loss = loss + 0.7 * ((logp[:, 0].exp() - logp[:, 1].exp()) * (logp[:, 0] - logp[:, 1])).sum() / 2
    wanted = torch.autograd.grad(loss, logits)[0] @ head.float()  # (N, P, D)
    ours = torch.autograd.grad(kernels.head_loss(hidden, head, labels, 0.7)[0], hidden)[0].float()
    error = (ours - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    sure = (likely > -2e-3) & (likely < -1e-5)  # p rounds to 1 in bf16, but not in fp32
    assert sure.sum() > 3 and error[sure].max() < 0.05 and error[likely < -2e-3].max() < 0.05


@pytest.mark.parametrize("lengths", [[5], [3, 3, 7, 1, 1, 1, 4, 3], [2] * 6])
@pytest.mark.parametrize("groups", [4, 2])
def test_attention_over_rows_equals_each_row_alone(lengths, groups):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, sum(lengths), 8, requires_grad=True) for heads in (4, groups, groups))
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


@pytest.mark.parametrize("variant", ["crosslora", "molora-topk"])
@pytest.mark.parametrize("layers", [1, 2])
def test_rows_one_after_another_are_rows_alone(tmp_path, sentences, variant, layers):
    """One layer, too, which is the first and the last at once."""
    lm, _, examples = setup(make_checkpoint(tmp_path, num_hidden_layers=layers), sentences)
    adapter, examples = randomise(CrossLoRA(lm.cfg, list(LANGUAGES), rank=4, alpha=8, dropout=0.0, variant=variant)), examples[:7]
    logits = lambda e: lm.head(lm(torch.tensor(e.ids[None, :-1]), adapter([e.src_lang], [e.tgt_lang])))[0]  # (T, V)
    for alpha in (0.1, 0):
        together = forward_sums(lm, adapter, examples, torch.float32, alpha, dropout=True)
        alone = [logits(e).log_softmax(-1) for e in examples]
        alone = -sum(logp[t - 1, e.ids[t]] for logp, e in zip(alone, examples) for t in range(e.prompt_length, len(e.ids)))
        assert torch.allclose(together[0], alone, rtol=1e-4)
        for a, b in zip(*(torch.autograd.grad(loss, list(adapter.parameters()), allow_unused=True) for loss in (together[0], alone))):
            assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max())))


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("drops", [False, True])
def test_adapted_projection_is_a_loop_over_tokens(dtype, close, packs, drops):
    """Value and gradient, of a bias where nothing is dropped, too; x needs no gradient below the first adapter."""
    torch.manual_seed(0)
    a_sizes, b_sizes, scale = [4, 1, 9], [2, 12], 1.7
    x, weight, bias = torch.randn(14, 24, dtype=dtype), torch.randn(40, 24, dtype=dtype), torch.randn(40, dtype=dtype)
    mask = torch.randint(0, 2, (14, 24), dtype=torch.int8)
    A, B = [torch.randn(3, 24, dtype=dtype) for _ in range(2)], [torch.randn(3, 40, dtype=dtype).t() for _ in range(2)]
    A, leaves = [A[0], A[1], A[0]], [x, *A, *B]  # one of the A's twice
    frozen, grad = kernels.packed(weight, training=True) if packs else weight, torch.randn(40, 14, dtype=dtype).t()
    bias = None if drops else bias
    for learns in (leaves, leaves[1:]):
        for leaf in leaves:
            leaf.requires_grad_(any(leaf is other for other in learns))
        y = experts.Adapted.apply(x, frozen, bias, mask if drops else None, scale, a_sizes, b_sizes, *A, *B)
        plain = []
        for t in range(14):
            down = A[0 if t < 4 else 1 if t < 5 else 2] @ (x[t] * mask[t] if drops else x[t])
            plain.append(weight @ x[t] + (0 if drops else bias) + scale * (B[t >= 2] @ down))
        plain = torch.stack(plain)
        assert torch.allclose(y, plain, atol=10 * close, rtol=10 * close)
        for mine, theirs, leaf in zip(*(torch.autograd.grad(out, learns, grad) for out in (y, plain)), learns):
            assert torch.allclose(mine, theirs, atol=30 * close, rtol=30 * close)
            assert mine.stride() == leaf.stride()  # .backward() copies others


@pytest.mark.parametrize("together", [False, True])
def test_dropout_leaves_the_expectation(lm, together):
    """The mean update over many masks is the update without dropout."""
    adapter = randomise(CrossLoRA(lm.cfg, list(LANGUAGES), rank=4, alpha=8, dropout=0.3))
    x = torch.randn(1, 3, lm.cfg.hidden_size).expand(4000, -1, -1)
    torch.manual_seed(1)
    more = dict(counts=[3] * 4000, last=[3] * 4000, together=together)
    lora = (next(iter(adapter(["de"] * 4000, ["zh"] * 4000, dropout=drops, **more)))["gate_proj"] for drops in (False, True))
    exact, dropped = (update_alone(update, x, lm.cfg.intermediate_size) for update in lora)
    assert (dropped.mean(0) - exact[0]).abs().max() < 6 * dropped.std(0).max() / 4000**0.5 and dropped.std(0).max() > 0


@pytest.mark.parametrize("intel", [True, False])
@pytest.mark.parametrize("variant", ["crosslora", "lora", "molora-static", "groups"])
def test_grouped_rows_equal_rows_on_their_own(lm, variant, intel, monkeypatch):
    monkeypatch.setattr(experts, "INTEL", intel)
    adapter = randomise(CrossLoRA(lm.cfg, list(LANGUAGES), rank=4, alpha=8, variant=variant))
    torch.manual_seed(2)
    every = [(s, t) for s in LANGUAGES for t in LANGUAGES if s != t]
    mixed = [("de", "zh"), ("en", "is"), ("zh", "en"), ("de", "is"), ("is", "zh")]
    before = None
    fan = [("de", t) for t in LANGUAGES if t != "de"]  # many rows an expert on one side, one on the other
    for directions in (
        mixed,
        mixed * 5 + every,
        fan + [("en", t) for t in LANGUAGES if t != "en"],
        fan,
        [way[::-1] for way in fan],
        every,
        [("de", "cs")] * 3 + [("en", "is")] * 3,
        [("de", "zh")] * 7,
        [("de", "zh"), ("en", "is")],
        [("de", "en"), ("zh", "en"), ("de", "en"), ("ru", "en")],
    ):
        src, tgt = zip(*directions)
        for again in (None, before):  # into memory of its own, and into that of the rows before
            before = adapter.grouped(src, tgt, before=again)
            for a, b in zip(adapter(src, tgt), before):
                for name in a:
                    d_in, d_out = (lm.cfg.hidden_size, lm.cfg.intermediate_size)[:: -1 if name == "down_proj" else 1]
                    x = torch.randn(1, len(src), d_in)
                    ours, theirs = (update_alone(update, x, d_out) for update in (a[name], b[name]))
                    assert torch.allclose(ours, theirs, atol=1e-5) and ours.abs().max() > 0.1


def test_an_expert_at_its_place_already_is_not_copied_again(lm):
    adapter = randomise(CrossLoRA(lm.cfg, list(LANGUAGES), rank=4, alpha=8))

    def after(first, second):
        """Names of the experts for `second`, each with whether it was copied, where those for `first` were before: [A's, B's]."""
        lora = adapter.grouped(*first)
        for side in lora[0]["up_proj"].held:
            side.fill_(torch.nan)  # what is copied again is no longer nan
        update = adapter.grouped(*second, before=lora)[0]["up_proj"]
        with pytest.raises(KeyError):
            adapter.grouped(*second, before=lora)  # its memory belongs to the second
        assert [len(names) for names in update.names] == [len(update.A), len(update.B)]
        copied = lambda names, experts: [(name, bool(expert.isfinite().all())) for name, expert in zip(names, experts)]
        return [copied(*side) for side in zip(update.names, (update.A, update.B))]

    # Three rows an expert: a block each, in the order of their names.
    A, B = after((["de", "zh", "is"] * 3, ["en", "ru", "cs"] * 3), (["zh", "cs", "is"] * 3, ["ru", "en", "de"] * 3))
    assert A == [("cs", True), ("is", False), ("zh", False)] and B == [("de", True), ("en", False), ("ru", False)]
    A, B = after((["de", "is", "zh"] * 3, ["en"] * 9), (["cs", "de", "is", "zh"] * 3, ["en"] * 12))
    assert all(copied for _, copied in A) and not any(copied for _, copied in B)  # the new one comes first and moves all others
    # Two at most: every row is a block, at its own place.
    A, B = after((["de", "zh", "de", "is"], ["en", "en", "ru", "cs"]), (["de", "cs", "de"], ["zh", "en", "ru"]))
    assert A == [("de", False), ("cs", True), ("de", False)] and B == [("zh", True), ("en", False), ("ru", False)]


@pytest.mark.parametrize("variant", ["crosslora", "lora", "shared-target"])
def test_all_experts_for_all_tokens_equal_each_rows_own(checkpoint, sentences, variant):
    """As a GPU computes a pass: loss, gradients, and which experts have none."""
    lm, _, examples = setup(checkpoint, sentences)
    adapter, found = randomise(CrossLoRA(lm.cfg, list(LANGUAGES), rank=4, alpha=8, dropout=0.0, variant=variant)), []
    examples = [e for e in examples if "is" not in (e.src_lang, e.tgt_lang)][:7]
    sums = lambda together: forward_sums(lm, functools.partial(adapter, together=together), examples, torch.float32, 0.1, dropout=True)
    for together in (False, True):
        losses = sums(together)
        grads = torch.autograd.grad(losses[0], list(adapter.parameters()), allow_unused=True)
        found.append((torch.stack(losses).detach(), grads))
        # .backward() copies others.
        assert all(grad is None or grad.stride() == p.stride() for grad, p in zip(grads, adapter.parameters()))
    (loss, grads), (other, others) = found
    assert torch.allclose(loss, other, rtol=1e-4, atol=1e-4) and loss[1] > 1
    for a, b in zip(grads, others):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(a.abs().max())))
    assert variant != "crosslora" or any(a is None for a in grads)
    adapter.dropout = 0.3
    assert sums(together)[2] > 1e-3  # R-Drop's copies differ


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_put_together_take_their_gradients_as_they_lie(lm, dtype):
    adapter = randomise(CrossLoRA(lm.cfg, list(LANGUAGES), rank=4, alpha=8))
    A, B = next(adapter.stacked(dtype))["up_proj"]
    bank = adapter.layers[0]["up_proj"]
    for together, side, names, each in ((A[:-4], bank.lora_A, adapter.experts[0], lambda x: x),
                                        (B, bank.lora_B, adapter.experts[1], torch.t)):
        experts = [side[name] for name in names]
        assert torch.equal(together, torch.cat([each(x) for x in experts]).to(dtype)) and together.dtype == dtype
        square = (together * together).detach()
        for x, grad, wanted in zip(experts, torch.autograd.grad(together, experts, square), square.float().split(4)):
            assert torch.equal(grad, each(wanted)) and grad.dtype == torch.float32
            assert grad.stride() == x.stride()  # .backward() copies such as lie otherwise
        stack = together.grad_fn
        while len(stack.next_functions) == 1:  # the cast, the slice
            stack = stack.next_functions[0][0]
        # An operation an expert between them once cost a GPU a third of a step.
        edge = torch.autograd.graph.get_gradient_edge
        assert [below for below, _ in stack.next_functions[: len(experts)]] == [edge(x).node for x in experts]


def test_experts_made_for_one_pass_are_not_taken_for_none_in_the_next(lm):
    adapter = randomise(CrossLoRA(lm.cfg, list(LANGUAGES), rank=4, alpha=8))
    tokens, rows = torch.tensor([[5, 6, 7]]), Rows.of([3], "cpu")
    lora = adapter(["de"], ["zh"], counts=[3], together=True)
    assert not torch.equal(lm(tokens, lora, rows), lm(tokens, None, rows))
    with pytest.raises(ValueError, match="shorter"):
        lm(tokens, lora, rows)
