"""What only a GPU computes: bf16, attention over rows without pads, recorded steps of decoding."""

import pytest
import torch

import kernels
import model as backbone
from conftest import randomise
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
    q, k, v = (torch.randn(1, n, sum(lengths), 64, device=GPU, dtype=torch.bfloat16, requires_grad=True) for n in (heads[0], heads[1], heads[1]))
    rows, grad = kernels.Rows.of(lengths, GPU), torch.randn(1, heads[0], sum(lengths), 64, device=GPU)
    fast = kernels.attention(q, k, v, rows=rows)
    slow = kernels.attention(*(x.float() for x in (q, k, v)), rows=rows)
    assert (fast.float() - slow).norm() < 0.01 * slow.norm()
    for a, b in zip(torch.autograd.grad(fast, (q, k, v), grad.bfloat16()), torch.autograd.grad(slow, (q, k, v), grad)):
        assert (a.float() - b.float()).norm() < 0.01 * b.float().norm()


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
        found.append((losses[1].item(), [None if g is None else g.cpu() for g in torch.autograd.grad(losses[0], list(adapter.parameters()), allow_unused=True)]))
    (loss, grads), *others = found
    for (other, theirs), close in zip(others, (1e-3, 0.05)):
        assert abs(other / loss - 1) < close
        assert all((a is None) == (b is None) for a, b in zip(grads, theirs))
        if close < 0.01 or variant == "crosslora":  # a top-1 router may turn at the rounding
            a, b = (torch.cat([g.flatten() for g in side if g is not None]) for side in (grads, theirs))
            assert (a - b).norm() < 10 * close * a.norm()


@pytest.mark.parametrize("variant", ["crosslora", "lora", "molora-topk", None])
def test_recorded_steps_give_what_rows_give_alone(checkpoint, variant):
    """Rows of different prompts and limits that take over places, steps recorded several times: each row gets what the CPU gives it alone."""
    lm = backbone.load(checkpoint)
    adapter = None if variant is None else randomise(CrossLoRA(lm.cfg, list(LANGUAGES), rank=4, alpha=8, variant=variant))
    make = lambda: [Row(i, list(range(5, 6 + 7 * (i % 5))), *(("de", "zh"), ("en", "is"), ("ru", "en"))[i % 3], 1 + (11 * i) % 83) for i in range(24)]
    alone = {row.key: row.out for single in make() for row in decode(lm, adapter, torch.float32, iter([single]), (), 1)}
    on_gpu = backbone.load(checkpoint, GPU)
    rows = list(decode(on_gpu, adapter and adapter.to(GPU), torch.float32, iter(make()), (), 8))
    assert {row.key: row.out for row in rows} == alone and len(alone) == 24
