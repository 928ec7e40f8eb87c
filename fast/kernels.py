"""The pieces of arithmetic that decide the speed: products with frozen weights, the greatest logit,
dropout's masks, norms, RoPE, SwiGLU, and eqs. 6-9 with the head. Tests hold each against plain
torch.

N target tokens, n rows or some of N, P passes (R-Drop has two), D hidden, V vocabulary; a weight is
(D_out, D_in).
"""

import math
import platform
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# What multiplies by a Packed weight, each a part of torch: on Intel's processors MKL; on others,
# where MKL keeps to AVX2, oneDNN, which took a half to nine tenths of its time on AMD EPYCs
# (bench/NOTES.md). Both None: weights stay plain.
CPU = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else platform.processor()
INTEL, X86 = "GenuineIntel" in CPU, platform.machine() in ("x86_64", "AMD64")
MKL = ONEDNN = None
if INTEL and torch.backends.mkl.is_available():
    MKL = getattr(torch.ops.mkl, "_mkl_linear", None)
if X86 and torch.backends.mkldnn.is_available():
    ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
# What multiplies bf16; without such instructions it would be no faster than fp32.
BF16 = ONEDNN if "avx512_bf16" in CPU else None

# Logits held at one time, in elements: blocks over 32 MiB glibc returns at once, and fresh pages
# cost time. Of those a CPU works on BLOCK elements together: 2 MiB stay in its caches from one
# operation to the next. At least AT_LEAST rows at one time, whatever the vocabulary: a product of
# fewer loses more than fresh pages cost.
LOGITS = {"cpu": 2**23, "cuda": 2**27}
BLOCK = 2**19
AT_LEAST = 256


class Packed:
    """A frozen weight (D_out, D_in), fp32 on a CPU, in the order in which MKL or oneDNN multiplies
    it, an order that they otherwise make anew for every product: a few tokens take half the time.
    Only `frozen_matmul` can read it. Not to be copied: MKL's depends on its address."""

    def __init__(self, weight: Tensor, transposed: bool = None):
        """transposed: the Packed transpose, for derivatives by what is multiplied, or None."""
        self.shape, self.transposed = weight.shape, transposed
        weight = weight.detach().contiguous()
        if MKL:
            # Packed for fewer tokens its products are slower, for more one of two threads idles
            # where tokens > D_out / 2.
            self.packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, 256)
            # The op takes the plain weight too, for its shape, and multiplies by that if tokens
            # aren't those it was packed for: so it is told they are (Intel's own extension of torch
            # packs once for any number).
            self.plain = torch.full((1, 1), torch.nan).expand(weight.shape)
        else:
            # 32: tokens expected; any number gave the same on an EPYC.
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, 32)

    def t(self) -> "Packed":
        assert self.transposed is not None, "packed for decoding: no transpose, no derivatives"
        return self.transposed

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        assert x.shape[-1] == self.shape[1]  # MKL would read on
        if MKL:
            return MKL(x, self.packed, self.plain, bias, x.shape[:-1].numel())
        return ONEDNN(x, self.packed, bias, "none", [], "")


def packed(weight: Tensor, training: bool = False) -> Tensor | Packed:
    """Packed(weight), for training with its transpose in that much memory again; the weight itself
    where nothing multiplies packed ones."""
    if not (MKL or ONEDNN) or not weight.is_cpu or weight.dtype != torch.float32:
        return weight
    return Packed(weight, Packed(weight.t()) if training else None)


class Shortlist:
    """The greatest of V logits, in fp32 on a CPU, without computing all so: all in bf16, which
    takes half the memory's time and a sixth of the arithmetic's, then in fp32 those that could be
    it, however bf16 rounded. Memory: half of the head's weight again."""

    def __init__(self, weight: Tensor):
        """weight (V, D): the head's, plain."""
        low = weight.detach().to(torch.bfloat16)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(low, 32)
        self.longest = torch.linalg.vector_norm(weight, dim=1).max()
        self.groups = math.gcd(len(weight), 32)

    def argmax(self, x: Tensor, weight: Tensor) -> Tensor:
        """x (n, D) -> (n,), as F.linear(x, weight).argmax(1) up to the order of fp32's sums; 0
        where x is nan. weight: the one this was made of."""
        z = BF16(x.to(torch.bfloat16), self.packed, None, "none", [], "")  # (n, V)
        z = z.unflatten(1, (self.groups, -1))  # (n, V) -> (n, g, V/g)
        of_columns = z.amax(1)  # (n, V/g), so that few of V are looked at twice
        top = of_columns.amax(1, keepdim=True).float()  # (n, 1)
        # bf16 rounds by a share of 2^-8 at most: z is off by 2^-7 |x| |w| for its factors
        # (|x_1 w_1| + |x_2 w_2| + ... <= |x| |w|) and by 2^-8 |z| for itself, the top by as much.
        # An eighth more is for the sums in fp32 and for a |z| above the top's.
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)  # (n, 1)
        off = 9 / 1024 * (2 * norm * self.longest + top.abs())  # (n, 1)
        least = (top - off).to(torch.bfloat16)  # rounding keeps the order, and z is bf16 as well
        rows, columns = (of_columns >= least).nonzero(as_tuple=True)
        if 64 * len(rows) > z.numel():  # nearly equal logits: all in fp32 are sooner computed
            return F.linear(x, weight).argmax(1)
        which, group = (z[rows, :, columns] >= least[rows]).nonzero(as_tuple=True)  # of (c, g)
        rows, words = rows[which], group * z.shape[2] + columns[which]  # of each that could be it
        size = max(1, LOGITS["cpu"] // x.shape[1])
        parts = zip(rows.split(size), words.split(size))
        logits = torch.cat([torch.linalg.vecdot(x[row], weight[word]) for row, word in parts])
        tops = logits.new_full((len(x),), -torch.inf).scatter_reduce(0, rows, logits, "amax")
        best = logits == tops[rows]  # (c',)
        first = words.new_zeros(len(x))  # of equals the first
        return first.scatter_reduce(0, rows[best], words[best], "amin", include_self=False)


def shortlist(weight: Tensor) -> "Shortlist | None":
    """Shortlist(weight), or None where it would not pay."""
    return Shortlist(weight) if BF16 and weight.is_cpu and weight.dtype == torch.float32 else None


def frozen_matmul(x: Tensor, weight: Tensor | Packed, bias: Tensor | None = None) -> Tensor:
    """x (..., D_in) times weight, plain or Packed, plus bias (D_out,): (..., D_out). Without
    derivatives where the weight is Packed."""
    return weight.product(x, bias) if isinstance(weight, Packed) else F.linear(x, weight, bias)


class FrozenLinear(torch.autograd.Function):
    """`frozen_matmul` by a Packed weight, with derivatives by x."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.weight = weight
        return frozen_matmul(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        return frozen_matmul(grad, ctx.weight.t()), None, None


def linear(x: Tensor, weight: Tensor | Packed, bias: Tensor | None = None) -> Tensor:
    """F.linear(x, weight, bias), weight plain or Packed."""
    if isinstance(weight, Packed) and torch.is_grad_enabled():
        return FrozenLinear.apply(x, weight, bias)
    return frozen_matmul(x, weight, bias)


def dropout_mask(x: Tensor, p: float) -> Tensor:
    """Dropout's mask, 1 with probability 1 - p (to 2^-16) at each element of x: sixteen random bits
    an element, from numpy since its generator takes half the time of torch's on a CPU; torch's
    gives the seed."""
    draws = np.random.SFC64(int(torch.randint(2**62, ()))).random_raw(-(-x.numel() // 4))
    bits = draws.view(np.int16)  # 64 bits each -> four elements
    mask = torch.from_numpy(bits)[: x.numel()].view(x.shape)
    # Of int16's 2^16 values, from -2^15, a share of p lies below the limit. In place: to compare
    # into bool takes fifteen times as long.
    return mask.ge_(min(round(p * 2**16), 2**16 - 1) - 2**15).to(x.device, torch.int8)


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """rms_norm on a CPU, and 1 / the root mean square (..., 1)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # reads x once, and writes no squares
    scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * scale).mul_(weight), scale


class FrozenRMSNorm(torch.autograd.Function):
    """F.rms_norm by a frozen weight. On a CPU torch puts its backward pass together from a dozen
    operations, a GPU has a kernel."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        y, scale = normed(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        grad = grad * weight
        along = (grad * x).mean(-1, keepdim=True).mul_(scale**3)
        return grad.mul_(scale).addcmul_(x, along, value=-1), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., D) over its root mean square, times weight (D,), in fp32 and rounded once;
    transformers rounds before the weight too."""
    if x.is_cuda or x.dtype != torch.float32 or weight.requires_grad:
        return F.rms_norm(x, weight.shape, weight, eps)
    if not x.requires_grad:  # apply() alone takes 10 us, as much as a small product
        return normed(x, weight, eps)[0]
    return FrozenRMSNorm.apply(x, weight, eps)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y = torch.empty_like(x)
    (x1, x2), (y1, y2) = x.chunk(2, -1), y.chunk(2, -1)
    torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=y2).addcmul_(x1, sin)
    return y


class Rotate(torch.autograd.Function):
    """`turned`, whose gradient is the turn back."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return turned(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return turned(grad, cos, -sin), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on split halves: x (B, heads, T, K), cos and sin (1, 1, T, K/2)."""
    return Rotate.apply(x, cos, sin) if x.requires_grad else turned(x, cos, sin)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, which keeps its two inputs and finds silu(gate) again in the backward pass:
    an eighth of what a pass keeps."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of one shape."""
    return SwiGLU.apply(gate, up) if gate.requires_grad else F.silu(gate).mul_(up)


def divergence(z: Tensor, p: Tensor, log_sum: Tensor) -> Tensor:
    """Of two passes' logits z (n, 2, V), their probabilities p and log-sums (n, 2, 1):
    (log p1 - log p2 (n, V), KL(p1 || p2) (n, 1), KL(p2 || p1) (n, 1))."""
    p1, p2 = p.unbind(1)  # (n, V) each
    d = (z[:, 0].float() - z[:, 1]).sub_(log_sum[:, 0] - log_sum[:, 1])
    return d, (p1 * d).sum(-1, keepdim=True), -(p2 * d).sum(-1, keepdim=True)


def gradients_by_logits(p, alpha, d, kl1, kl2):
    """P times eq. 9's gradient by the logits of each of two passes, without the label's -1: of pass
    1 p1 + alpha (p1 (d - kl1) + p1 - p2), of pass 2 the same, exchanged. In fp32."""
    p1, p2 = p.unbind(1)  # (n, V) each
    first = torch.add(1 + alpha - alpha * kl1, d, alpha=alpha).mul_(p1).sub_(p2, alpha=alpha)
    second = torch.sub(1 + alpha - alpha * kl2, d, alpha=alpha).mul_(p2).sub_(p1, alpha=alpha)
    return first, second


class HeadLoss(torch.autograd.Function):
    """Eqs. 6-9 with the head, forward and backward in one go: logits and their gradient exist for a
    part of the targets at a time, in the same memory, and what is kept for the backward pass is the
    gradient of the hidden states alone."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, alpha):
        learns, grad = ctx.needs_input_grad[0], torch.empty_like(hidden)  # (N, P, D)
        nll, kl = torch.zeros(2, device=hidden.device).unbind()
        P, V = hidden.shape[1], weight.shape[0]
        at_once = max(1, AT_LEAST // P, LOGITS[hidden.device.type] // (P * V))
        block = at_once if hidden.is_cuda else max(1, BLOCK // (P * V))
        parts = (x.split(at_once) for x in (hidden, grad, labels))
        for states, grad_part, targets in zip(*parts):
            logits = frozen_matmul(states, weight)  # (n, P, D) x (D, V) -> (n, P, V)
            for z, y in zip(logits.split(block), targets.split(block)):
                y = y[:, None]  # (n,) -> (n, 1)
                p = z.softmax(-1, dtype=torch.float32)
                # The greatest logit and its log p: any other's is z - top + best, and in this order
                # small losses are not rounded away.
                top = z.amax(-1, keepdim=True).float()  # (n, P, 1)
                best = p.amax(-1, keepdim=True).log_()  # (n, P, 1)
                likely = z.gather(-1, y[:, None].expand(-1, P, 1))  # (n, P, 1)
                nll += (top - likely - best).sum() / P  # eq. 6 for one pass, eq. 8 for two
                by_logits = p.unbind(1)
                if P == 2:
                    d, kl1, kl2 = divergence(z, p, top - best)
                    kl += (kl1 + kl2).sum() / 2  # eq. 7
                    if learns:
                        by_logits = gradients_by_logits(p, alpha, d, kl1, kl2)
                if learns:  # rounded to the logits' precision once, and put in their place
                    for i, part in enumerate(by_logits):
                        z[:, i] = part.scatter_add_(-1, y, part.new_full((), -1).expand(y.shape))
            if learns:  # (n, P, V) x (V, D) -> (n, P, D)
                torch.div(frozen_matmul(logits, weight.t()), P, out=grad_part)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(nll, kl)
        return nll + alpha * kl, nll, kl  # eq. 9

    @staticmethod
    def backward(ctx, by_loss, _, __):
        (grad,) = ctx.saved_tensors
        return grad * by_loss, None, None, None


def head_loss(
    hidden: Tensor, weight: Tensor | Packed, labels: Tensor, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, nll, kl), sums over target tokens in fp32 (section 3.4), of which loss has a
    derivative by `hidden`.

    hidden (N, P, D): the states that P = 2 passes (eqs. 7-9), or 1 (eq. 6, kl 0), have before each
    target; labels (N,); weight (V, D): the head's, plain or Packed. nll and kl are M times eq. 8
    and eq. 7, loss is nll + alpha kl; dividing by M is the caller's, since M counts the whole
    effective batch.
    """
    return HeadLoss.apply(hidden, weight, labels, alpha)
