"""What only a GPU computes: bf16, attention over rows without pads, recorded steps of decoding."""

import pytest
import torch

import generate
import model as backbone
from attention import Rows, attention, cached_attention, seen
from conftest import CalledAnew, randomise
from crosslora import CrossLoRA
from data import LANGUAGES, Tokenizer, encode
from generate import Row, decode
from train import forward_sums

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
GPU = torch.device("cuda")


@pytest.mark.parametrize("heads", [(8, 8), (8, 2)])
def test_attention_over_rows_equals_a_loop(heads):
    torch.manual_seed(0)
    lengths = [5, 1, 130, 64, 17]
    q, k, v = (torch.randn(1, n, sum(lengths), 64, device=GPU, dtype=torch.bfloat16, requires_grad=True)
               for n in (heads[0], heads[1], heads[1]))
    rows, grad = Rows.of(lengths, GPU), torch.randn(1, heads[0], sum(lengths), 64, device=GPU)
    fast = attention(q, k, v, rows=rows)
    slow = attention(*(x.float() for x in (q, k, v)), rows=rows)
    assert (fast.float() - slow).norm() < 0.01 * slow.norm()
    for a, b in zip(torch.autograd.grad(fast, (q, k, v), grad.bfloat16()), torch.autograd.grad(slow, (q, k, v), grad)):
        assert (a.float() - b.float()).norm() < 0.01 * b.float().norm()


@pytest.mark.parametrize("groups", [8, 2])
@pytest.mark.parametrize("lengths, before, places", [
    ([1] * 7, [0, 39, 7, 12, 20, 1, 30], None),
    ([5, 1, 30, 9, 9], [2, 38, 0, 0, 31], [6, 0, 3, 2, 5]),
], ids=["step", "prompts"])
def test_attention_over_a_cache_sees_each_rows_own_slots(lengths, before, places, groups):
    torch.manual_seed(0)
    q = torch.randn(1, 8, sum(lengths), 64, device=GPU, dtype=torch.bfloat16)
    cache = [torch.randn(7, 40, groups, 64, device=GPU, dtype=torch.bfloat16) for _ in "kv"]
    rows = Rows.of(lengths, GPU, before, None if places is None else torch.tensor(places, device=GPU))
    begins = torch.tensor([40 * place for place in places or range(7)], device=GPU)
    fast, slow = (cached_attention(q, k, v, rows, seen(rows, begins, k, 8)) for q, k, v in ([q, *cache], [x.float() for x in (q, *cache)]))
    assert fast.shape == slow.shape and (fast.float() - slow).norm() < 0.01 * slow.norm()


@pytest.mark.parametrize("variant", ["crosslora", "molora-topk"])
def test_training_equals_the_cpus(checkpoint, sentences, variant):
    """fp32 closely, bf16 within its rounding; an expert without tokens has no gradient."""
    cpu = backbone.load(checkpoint)
    examples = encode(Tokenizer(checkpoint, cpu.cfg), sentences[:12])[0]
    adapter, found = randomise(CrossLoRA(cpu.cfg, list(LANGUAGES), rank=4, alpha=8, dropout=0.0, variant=variant)), []
    for device, dtype in (("cpu", torch.float32), (GPU, torch.float32), (GPU, torch.bfloat16)):
        lm = backbone.load(checkpoint, device, dtype)
        adapter.to(device)
        losses = forward_sums(lm, adapter, examples, dtype, 0.1, dropout=True)
        grads = torch.autograd.grad(losses[0], list(adapter.parameters()), allow_unused=True)
        found.append((losses[1].item(), [None if g is None else g.cpu() for g in grads]))
    (loss, grads), *others = found
    for (other, theirs), close in zip(others, (1e-3, 0.05)):
        assert abs(other / loss - 1) < close
        assert all((a is None) == (b is None) for a, b in zip(grads, theirs))
        if close < 0.01 or variant == "crosslora":  # a top-1 router may turn at the rounding
            a, b = (torch.cat([g.flatten() for g in side if g is not None]) for side in (grads, theirs))
            assert (a - b).norm() < 10 * close * a.norm()


@pytest.mark.parametrize("variant", ["crosslora", "lora", "molora-topk", None])
def test_recorded_steps_give_what_the_cpu_gives(checkpoint, variant):
    """Rows of different prompts and limits that take over places and leave them, steps recorded several times, or called one by
    one with experts in blocks."""
    lm = backbone.load(checkpoint)
    adapter = None if variant is None else randomise(CrossLoRA(lm.cfg, list(LANGUAGES), rank=4, alpha=8, variant=variant))
    ways = (("de", "zh"), ("en", "is"), ("ru", "en"))
    make = lambda: iter([Row(i, list(range(5, 6 + 7 * (i % 5))), *ways[i % 3], 1 + (11 * i) % 83) for i in range(120)])
    on_cpu = {row.key: row.out for row in decode(lm, adapter, torch.float32, make(), (), 8)}
    on_gpu = backbone.load(checkpoint, GPU)
    for record in (True, False):
        rows = list(decode(on_gpu, adapter and adapter.to(GPU), torch.float32, make(), (), 80, record))
        assert {row.key: row.out for row in rows} == on_cpu and len(on_cpu) == 120


def test_recorded_steps_in_bf16_are_the_steps(checkpoint, monkeypatch):
    """The kernels of bf16, attention over each row's own slots among them: recorded, and called one by one."""
    lm = backbone.load(checkpoint, GPU, torch.bfloat16)
    adapter = randomise(CrossLoRA(lm.cfg, list(LANGUAGES), rank=4, alpha=8)).to(GPU, torch.bfloat16)
    make = lambda: iter([Row(i, list(range(5, 6 + 7 * (i % 5))), "de", "zh", 1 + (11 * i) % 83) for i in range(120)])
    run = lambda: {row.key: row.out for row in decode(lm, adapter, torch.bfloat16, make(), (), 80)}
    recorded = run()
    monkeypatch.setattr(generate, "Recorded", CalledAnew)
    assert run() == recorded and len(recorded) == 120
