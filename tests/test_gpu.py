"""What only a GPU computes: bf16, attention over rows without pads, recorded steps of decoding."""

import pytest
import torch
from conftest import CalledAnew, randomise

import fast
import model as backbone
from crosslora import CrossLoRA
from data import LANGUAGES, Tokenizer, encode
from fast import decode, decoding
from fast.attention import Rows, attention, cached_attention, seen
from generate import Row

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
GPU = torch.device("cuda")


@pytest.mark.parametrize("heads", [(8, 8), (8, 2)])
def test_attention_over_rows_equals_a_loop(heads):
    torch.manual_seed(0)
    lengths = [5, 1, 130, 64, 17]
    q, k, v = (
        torch.randn(1, n, sum(lengths), 64, device=GPU, dtype=torch.bfloat16, requires_grad=True)
        for n in (heads[0], heads[1], heads[1])
    )
    rows, grad = Rows.of(lengths, GPU), torch.randn(1, heads[0], sum(lengths), 64, device=GPU)
    bf16 = attention(q, k, v, rows=rows)
    slow = attention(*(x.float() for x in (q, k, v)), rows=rows)
    assert (bf16.float() - slow).norm() < 0.01 * slow.norm()
    for a, b in zip(
        torch.autograd.grad(bf16, (q, k, v), grad.bfloat16()),
        torch.autograd.grad(slow, (q, k, v), grad),
    ):
        assert (a.float() - b.float()).norm() < 0.01 * b.float().norm()


@pytest.mark.parametrize("groups", [8, 2])
@pytest.mark.parametrize(
    "lengths, before, places",
    [
        ([1] * 7, [0, 39, 7, 12, 20, 1, 30], None),
        ([5, 1, 30, 9, 9], [2, 38, 0, 0, 31], [6, 0, 3, 2, 5]),
    ],
    ids=["step", "prompts"],
)
def test_attention_over_a_cache_sees_each_rows_own_slots(lengths, before, places, groups):
    torch.manual_seed(0)
    q = torch.randn(1, 8, sum(lengths), 64, device=GPU, dtype=torch.bfloat16)
    cache = [torch.randn(7, 40, groups, 64, device=GPU, dtype=torch.bfloat16) for _ in "kv"]
    rows = Rows.of(
        lengths, GPU, before, None if places is None else torch.tensor(places, device=GPU)
    )
    begins = torch.tensor([40 * place for place in places or range(7)], device=GPU)
    found = []
    for q_, k, v in ([q, *cache], [x.float() for x in (q, *cache)]):
        found.append(cached_attention(q_, k, v, rows, seen(rows, begins, k, 8)))
    bf16, slow = found
    assert bf16.shape == slow.shape and (bf16.float() - slow).norm() < 0.01 * slow.norm()


def adapter_of(lm, **changes):
    return randomise(CrossLoRA(lm.cfg, list(LANGUAGES), rank=4, alpha=8, **changes))


@pytest.mark.parametrize("variant", ["crosslora", "molora-topk"])
def test_training_equals_the_cpus(checkpoint, sentences, variant):
    """fp32 closely, bf16 within its rounding; an expert without tokens has no gradient."""
    cpu = backbone.load(checkpoint)
    examples = encode(Tokenizer(checkpoint, cpu.cfg), sentences[:12])[0]
    adapter, found = adapter_of(cpu, dropout=0.0, variant=variant), []
    for device, dtype in (("cpu", torch.float32), (GPU, torch.float32), (GPU, torch.bfloat16)):
        lm = backbone.load(checkpoint, device, dtype)
        fast.prepare(lm, adapter.to(device), training=True)
        losses = fast.forward_sums(lm, adapter, examples, 0.1, True)
        grads = torch.autograd.grad(losses[0], list(adapter.parameters()), allow_unused=True)
        found.append((losses[1].item(), [None if g is None else g.cpu() for g in grads]))
    (loss, grads), *others = found
    for (other, theirs), close in zip(others, (1e-3, 0.05)):
        assert abs(other / loss - 1) < close
        assert all((a is None) == (b is None) for a, b in zip(grads, theirs))
        if close < 0.01 or variant == "crosslora":  # a top-1 router may turn at the rounding
            a = torch.cat([grad.flatten() for grad in grads if grad is not None])
            b = torch.cat([grad.flatten() for grad in theirs if grad is not None])
            assert (a - b).norm() < 10 * close * a.norm()


WAYS = (("de", "zh"), ("en", "is"), ("ru", "en"))
ROWS = [
    Row(i, list(range(5, 6 + 7 * (i % 5))), *WAYS[i % 3], 1 + (11 * i) % 83) for i in range(120)
]


@pytest.mark.parametrize("variant", ["crosslora", "lora", "molora-topk", None])
def test_recorded_steps_give_what_the_cpu_gives(checkpoint, variant):
    """Rows of different prompts and limits that take over places and leave them, steps recorded
    several times, or called one by one with experts in blocks."""
    lm = backbone.load(checkpoint)
    adapter = None if variant is None else adapter_of(lm, variant=variant)
    on_cpu = sorted(decode(lm, adapter, ROWS, (), 8))
    on_gpu = backbone.load(checkpoint, GPU)
    fast.prepare(on_gpu, adapter and adapter.to(GPU), training=False)
    for record in (True, False):
        assert sorted(decode(on_gpu, adapter, ROWS, (), 80, record)) == on_cpu
    assert len(on_cpu) == 120


def test_recorded_steps_in_bf16_are_the_steps(checkpoint, monkeypatch):
    """The kernels of bf16, attention over each row's own slots among them: recorded, and called one
    by one."""
    lm = backbone.load(checkpoint, GPU, torch.bfloat16)
    adapter = adapter_of(lm).to(GPU)
    fast.prepare(lm, adapter, training=False)
    rows = [row._replace(src_lang="de", tgt_lang="zh") for row in ROWS]
    recorded = sorted(decode(lm, adapter, rows, (), 80))
    monkeypatch.setattr(decoding, "Recorded", CalledAnew)
    assert sorted(decode(lm, adapter, rows, (), 80)) == recorded and len(recorded) == 120
