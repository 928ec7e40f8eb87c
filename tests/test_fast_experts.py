"""How fast/ lets the experts of a batch meet its tokens: each way against the plain update."""

import pytest
import torch
from conftest import randomise
from test_train import setup
from torch import nn

import fast
from crosslora import CrossLoRA
from data import LANGUAGES
from fast import experts, kernels
from fast.attention import Rows
from fast.layers import hidden_states, lay_out_experts

DTYPES = [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 3e-2)]


def adapter_of(lm, **changes):
    settings = {"rank": 4, "alpha": 8, "dropout": 0.0, **changes}
    adapter = randomise(CrossLoRA(lm.cfg, list(LANGUAGES), **settings))
    lay_out_experts(adapter)
    return adapter


def update_alone(update, x, d_out):
    """What one of fast/'s updates adds to a projection to `d_out` features: that of zeros."""
    projection = nn.Linear(x.shape[-1], d_out, bias=False).requires_grad_(False)
    nn.init.zeros_(projection.weight)
    return update(projection, x)


@pytest.mark.parametrize("dtype, close", DTYPES)
@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("drops", [False, True])
def test_adapted_projection_is_a_loop_over_tokens(dtype, close, packs, drops):
    """Value and gradient, of a bias where nothing is dropped, too; x needs no gradient below the
    first adapter."""
    torch.manual_seed(0)
    a_sizes, b_sizes, scale = [4, 1, 9], [2, 12], 1.7
    x, weight = torch.randn(14, 24, dtype=dtype), torch.randn(40, 24, dtype=dtype)
    bias = None if drops else torch.randn(40, dtype=dtype)
    mask = torch.randint(0, 2, (14, 24), dtype=torch.int8) if drops else None
    A = [torch.randn(3, 24, dtype=dtype) for _ in range(2)]
    B = [torch.randn(3, 40, dtype=dtype).t() for _ in range(2)]
    A, leaves = [A[0], A[1], A[0]], [x, *A, *B]  # one of the A's twice
    frozen = kernels.packed(weight, training=True) if packs else weight
    grad = torch.randn(40, 14, dtype=dtype).t()
    for learns in (leaves, leaves[1:]):
        for leaf in leaves:
            leaf.requires_grad_(any(leaf is other for other in learns))
        y = experts.Adapted.apply(x, frozen, bias, mask, scale, a_sizes, b_sizes, *A, *B)
        plain = []
        for t in range(14):
            down = A[0 if t < 4 else 1 if t < 5 else 2] @ (x[t] * mask[t] if drops else x[t])
            up = scale * (B[t >= 2] @ down)
            plain.append(weight @ x[t] + (0 if drops else bias) + up)
        plain = torch.stack(plain)
        assert torch.allclose(y, plain, atol=10 * close, rtol=10 * close)
        ours, theirs = (torch.autograd.grad(out, learns, grad) for out in (y, plain))
        for a, b, leaf in zip(ours, theirs, learns):
            assert torch.allclose(a, b, atol=30 * close, rtol=30 * close)
            assert a.stride() == leaf.stride()  # .backward() copies others


@pytest.mark.parametrize("together", [False, True])
def test_dropout_leaves_the_expectation(lm, together):
    """The mean update over many masks is the update without dropout."""
    adapter = adapter_of(lm, dropout=0.3)
    x = torch.randn(1, 3, lm.cfg.hidden_size).expand(4000, -1, -1)
    torch.manual_seed(1)
    found = []
    for drops in (False, True):
        rows = ["de"] * 4000, ["zh"] * 4000, [3] * 4000, [3] * 4000
        lora = experts.for_rows(adapter, *rows, torch.float32, drops, together)
        update = next(iter(lora))["gate_proj"]
        found.append(update_alone(update, x, lm.cfg.intermediate_size))
    (exact, dropped), deviation = found, found[1].std(0)
    assert (dropped.mean(0) - exact[0]).abs().max() < 6 * deviation.max() / 4000**0.5
    assert deviation.max() > 0


EVERY = [(s, t) for s in LANGUAGES for t in LANGUAGES if s != t]
MIXED = [("de", "zh"), ("en", "is"), ("zh", "en"), ("de", "is"), ("is", "zh")]
# Many rows per expert on one side, one on the other.
FAN = [("de", t) for t in LANGUAGES if t != "de"]
BATCHES = [
    MIXED,
    MIXED * 5 + EVERY,
    FAN + [("en", t) for t in LANGUAGES if t != "en"],
    FAN,
    [way[::-1] for way in FAN],
    EVERY,
    [("de", "cs")] * 3 + [("en", "is")] * 3,
    [("de", "zh")] * 7,
    [("de", "zh"), ("en", "is")],
    [("de", "en"), ("zh", "en"), ("de", "en"), ("ru", "en")],
]


@pytest.mark.parametrize("intel", [True, False])
@pytest.mark.parametrize("variant", ["crosslora", "lora", "molora-static", "groups"])
def test_grouped_rows_equal_the_plain_update(lm, variant, intel, monkeypatch):
    monkeypatch.setattr(experts, "INTEL", intel)
    adapter, before = adapter_of(lm, variant=variant), None
    torch.manual_seed(2)
    for directions in BATCHES:
        src, tgt = zip(*directions)
        for again in (None, before):  # into memory of its own, and into that of the rows before
            before = experts.grouped(adapter, src, tgt, before=again)
            for plain, grouped in zip(adapter(src, tgt), before):
                for name in plain:
                    x = torch.randn(len(src), 1, plain[name].A.shape[-1])  # a token is a row
                    want = plain[name](x)  # (N, 1, D_out)
                    got = update_alone(grouped[name], x.transpose(0, 1), want.shape[-1])
                    assert torch.allclose(got[0], want[:, 0], atol=1e-5) and want.abs().max() > 0.1


def test_an_expert_at_its_place_already_is_not_copied_again(lm):
    adapter = adapter_of(lm)

    def after(first, second):
        """Names of the experts for `second`, each with whether it was copied, where those for
        `first` were before: [A's, B's]."""
        lora = experts.grouped(adapter, *first)
        for side in lora[0]["up_proj"].held:
            side.fill_(torch.nan)  # what is copied again is no longer nan
        update = experts.grouped(adapter, *second, before=lora)[0]["up_proj"]
        with pytest.raises(KeyError):
            experts.grouped(adapter, *second, before=lora)  # its memory belongs to the second
        assert [len(names) for names in update.names] == [len(update.A), len(update.B)]
        found = []
        for names, block in zip(update.names, (update.A, update.B)):
            found.append([(n, bool(expert.isfinite().all())) for n, expert in zip(names, block)])
        return found

    # Three rows per expert: a block each, in the order of their names.
    first = ["de", "zh", "is"] * 3, ["en", "ru", "cs"] * 3
    A, B = after(first, (["zh", "cs", "is"] * 3, ["ru", "en", "de"] * 3))
    assert A == [("cs", True), ("is", False), ("zh", False)]
    assert B == [("de", True), ("en", False), ("ru", False)]
    A, B = after((["de", "is", "zh"] * 3, ["en"] * 9), (["cs", "de", "is", "zh"] * 3, ["en"] * 12))
    # The new one comes first and moves all others.
    assert all(copied for _, copied in A) and not any(copied for _, copied in B)
    # Two at most: every row is a block, at its own place.
    first = ["de", "zh", "de", "is"], ["en", "en", "ru", "cs"]
    A, B = after(first, (["de", "cs", "de"], ["zh", "en", "ru"]))
    assert A == [("de", False), ("cs", True), ("de", False)]
    assert B == [("zh", True), ("en", False), ("ru", False)]


@pytest.mark.parametrize("variant", ["crosslora", "lora", "shared-target"])
def test_all_experts_for_all_tokens_equal_each_rows_own(checkpoint, sentences, variant):
    """As a GPU computes a pass: loss, gradients, and which experts have none."""
    lm, _, examples = setup(checkpoint, sentences)
    adapter, found = adapter_of(lm, variant=variant), []
    examples = [e for e in examples if "is" not in (e.src_lang, e.tgt_lang)][:7]
    learned = list(adapter.parameters())
    for together in (False, True):
        losses = fast.forward_sums(lm, adapter, examples, 0.1, True, together)
        grads = torch.autograd.grad(losses[0], learned, allow_unused=True)
        found.append((torch.stack(losses).detach(), grads))
        for grad, p in zip(grads, learned):  # .backward() copies others
            assert grad is None or grad.stride() == p.stride()
    (loss, grads), (other, others) = found
    assert torch.allclose(loss, other, rtol=1e-4, atol=1e-4) and loss[1] > 1
    for a, b in zip(grads, others):
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(a.abs().max()))
    assert variant != "crosslora" or any(a is None for a in grads)
    adapter.dropout = 0.3
    assert fast.forward_sums(lm, adapter, examples, 0.1, True, True)[2] > 1e-3  # copies differ


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_put_together_take_their_gradients_as_they_lie(lm, dtype):
    adapter = adapter_of(lm)
    A, B = next(experts.stacked(adapter, dtype))["up_proj"]
    bank, (a_names, b_names) = adapter.layers[0]["up_proj"], adapter.expert_names()
    of_A = A[:-4], [bank.lora_A[name] for name in a_names], lambda x: x
    of_B = B, [bank.lora_B[name] for name in b_names], torch.t
    for together, each, turn in (of_A, of_B):
        assert torch.equal(together, torch.cat([turn(x) for x in each]).to(dtype))
        assert together.dtype == dtype
        square = (together * together).detach()
        grads = torch.autograd.grad(together, each, square)
        for x, grad, wanted in zip(each, grads, square.float().split(4)):
            assert torch.equal(grad, turn(wanted)) and grad.dtype == torch.float32
            assert grad.stride() == x.stride()  # .backward() copies such as lie otherwise
        stack = together.grad_fn
        while len(stack.next_functions) == 1:  # the cast, the slice
            stack = stack.next_functions[0][0]
        # An operation per expert between them once cost a GPU a third of a step.
        edges = [torch.autograd.graph.get_gradient_edge(x).node for x in each]
        assert [below for below, _ in stack.next_functions[: len(each)]] == edges


def test_experts_made_for_one_pass_are_not_taken_for_none_in_the_next(lm):
    adapter = adapter_of(lm)
    tokens, rows = torch.tensor([[5, 6, 7]]), Rows.of([3], "cpu")
    lora = experts.for_rows(adapter, ["de"], ["zh"], [3], [3], torch.float32, together=True)
    with_it, bare = (hidden_states(lm, tokens, lora, rows) for lora in (lora, None))
    assert not torch.equal(with_it, bare)
    with pytest.raises(ValueError, match="shorter"):
        hidden_states(lm, tokens, lora, rows)
