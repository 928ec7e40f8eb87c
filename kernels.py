"""The pieces of arithmetic that decide the speed, and how rows are dealt to it; tests hold each against plain torch.

N tokens (of the loss: target tokens), P passes (R-Drop has two), D hidden, R rank, V vocabulary; a weight is (D_out, D_in). In
attention B batch rows of T tokens, H query heads, G key/value heads, K head dimension, S slots of a cache, n rows of length L.
"""

import itertools
import math
import platform
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

# What multiplies by a Packed weight, each a part of torch: on Intel's processors MKL; on others, where MKL keeps to AVX2, oneDNN, which took a half to nine
# tenths of its time on AMD EPYCs (bench/NOTES.md). Both None: weights stay plain.
CPU = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else platform.processor()
MKL = getattr(torch.ops.mkl, "_mkl_linear", None) if "GenuineIntel" in CPU and torch.backends.mkl.is_available() else None
ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64") else None
BF16 = ONEDNN if "avx512_bf16" in CPU else None  # what multiplies bf16; without such instructions it would be no faster than fp32
LOGITS = {"cpu": 2**23, "cuda": 2**27}  # elements held at one time; blocks over 32 MiB glibc returns at once, and fresh pages cost time
BLOCK = 2**20  # of those, elements that a CPU works on together: 4 MiB stay in its caches from one operation to the next


class Packed:
    """A frozen weight (D_out, D_in), fp32 on a CPU, in the order in which MKL or oneDNN multiplies it, an order that they otherwise make anew for every
    product: a few tokens take half the time. Only `product` can read it. Not to be copied: MKL's depends on its address."""

    def __init__(self, weight, transposed=None):
        """transposed: the Packed transpose, for derivatives by what is multiplied, or None."""
        self.shape, self.transposed, weight = weight.shape, transposed, weight.detach().contiguous()
        if MKL:
            # Packed for fewer tokens its products are slower, for more one of two threads idles where tokens > D_out / 2. The op takes the plain weight too, for its
            # shape, and multiplies by that if tokens aren't those it was packed for: so it is told they are (Intel's own extension of torch packs once for any number).
            self.packed, self.plain = torch.ops.mkl._mkl_reorder_linear_weight(weight, 256), torch.full((1, 1), torch.nan).expand(weight.shape)
        else:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, 32)  # tokens expected; 8 and 1,024 give the same on an AVX-512 EPYC

    def t(self):
        assert self.transposed is not None, "packed without its transpose, for decoding: no derivatives"
        return self.transposed

    def product(self, x, bias):
        assert x.shape[-1] == self.shape[1]  # MKL would read on
        return MKL(x, self.packed, self.plain, bias, x.shape[:-1].numel()) if MKL else ONEDNN(x, self.packed, bias, "none", [], "")


def packed(weight, training=False):
    """Packed(weight), for training with its transpose in that much memory again, or the weight as it is where nothing multiplies packed ones."""
    if not (MKL or ONEDNN) or not weight.is_cpu or weight.dtype != torch.float32:
        return weight
    return Packed(weight, Packed(weight.t()) if training else None)


class Shortlist:
    """The greatest of V logits, in fp32 on a CPU, without computing all so: all in bf16, which takes half the memory's time and a sixth of the arithmetic's,
    then in fp32 those that could be it, however bf16 rounded. Memory: half of the head's weight again."""

    def __init__(self, weight):
        """weight (V, D): the head's, plain."""
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(torch.bfloat16), 32)
        self.longest, self.groups = torch.linalg.vector_norm(weight, dim=1).max(), math.gcd(len(weight), 32)

    def argmax(self, x, weight):
        """x (n, D) -> (n,), as F.linear(x, weight).argmax(1) up to the order of fp32's sums; weight: the one this was made of. 0 where x is nan."""
        z = BF16(x.to(torch.bfloat16), self.packed, None, "none", [], "").unflatten(1, (self.groups, -1))  # (n, V) -> (n, g, V/g)
        some = z.amax(1)  # (n, V/g), so that few of V are looked at twice
        top = some.amax(1, keepdim=True).float()  # (n, 1)
        # bf16 rounds by a share of 2^-8 at most: z is off by 2^-7 |x| |w| for its factors (|x_1 w_1| + |x_2 w_2| + ... <= |x| |w|) and by 2^-8 |z| for itself, the top by as
        # much. An eighth more is for the sums in fp32 and for a |z| above the top's. `least` may be rounded, since rounding keeps the order and z is bf16 as well.
        least = (top - 9 / 1024 * (2 * torch.linalg.vector_norm(x, dim=1, keepdim=True) * self.longest + top.abs())).to(torch.bfloat16)
        rows, columns = (some >= least).nonzero(as_tuple=True)
        if 64 * len(rows) > z.numel():  # nearly equal logits: all in fp32 are sooner computed
            return F.linear(x, weight).argmax(1)
        which, group = (z[rows, :, columns] >= least[rows]).nonzero(as_tuple=True)  # of (c, g)
        rows, words = rows[which], group * some.shape[1] + columns[which]  # of each that could be it
        parts = zip(*(each.split(max(1, LOGITS["cpu"] // x.shape[1])) for each in (rows, words)))
        logits = torch.cat([torch.linalg.vecdot(x[row], weight[word]) for row, word in parts])  # (c', D) each -> (c',)
        best = logits == logits.new_full((len(x),), -torch.inf).scatter_reduce(0, rows, logits, "amax")[rows]
        return words.new_zeros(len(x)).scatter_reduce(0, rows[best], words[best], "amin", include_self=False)  # the first of equals


def shortlist(weight):
    """Shortlist(weight), or None where it would not pay."""
    return Shortlist(weight) if BF16 and weight.is_cpu and weight.dtype == torch.float32 else None


def product(x, weight, bias=None):
    """x (..., D_in) times weight, plain or Packed, plus bias (D_out,): (..., D_out). Without derivatives where the weight is Packed."""
    return weight.product(x, bias) if isinstance(weight, Packed) else F.linear(x, weight, bias)


class FrozenLinear(torch.autograd.Function):
    """`product` by a Packed weight, with derivatives by x."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.weight = weight
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        return product(grad, ctx.weight.t()), None, None


def linear(x, weight, bias=None):
    """F.linear(x, weight, bias), weight plain or Packed."""
    return FrozenLinear.apply(x, weight, bias) if isinstance(weight, Packed) and torch.is_grad_enabled() else product(x, weight, bias)


def kept(x, p):
    """Dropout's mask, 1 with probability 1 - p (to 2^-16) at each element of x: sixteen random bits an element, from numpy since its
    generator takes half the time of torch's on a CPU; torch's gives the seed."""
    bits = np.random.SFC64(int(torch.randint(2**62, ()))).random_raw(-(-x.numel() // 4)).view(np.int16)
    mask = torch.from_numpy(bits)[: x.numel()].view(x.shape)
    # Of int16's 2^16 values, which start at -2^15, a share of p lies below the limit. In place: a comparison into bool takes fifteen times as long.
    return mask.ge_(min(round(p * 2**16), 2**16 - 1) - 2**15).to(x.device, torch.int8)


class Adapted(torch.autograd.Function):
    """Eqs. 1 and 4 for N tokens of rows that stand one after another: W_0 x + bias + scale * B_tgt A_src (x * mask), with derivatives by x
    and the experts. By runs of tokens that share an expert, so that none is copied, and what one operation leaves in the cache is
    there for the next."""

    @staticmethod
    def forward(ctx, x, weight, bias, mask, scale, a_sizes, b_sizes, *experts):
        """x (N, D_in); weight (D_out, D_in), plain or Packed; mask (N, D_in) int8 or None; a_sizes, b_sizes: numbers of
        tokens, N in all, that share an A (R, D_in) or a B (D_out, R); experts: these A's, then these B's."""
        A, B = experts[: len(a_sizes)], experts[len(a_sizes) :]
        y, h = product(x, weight, bias), x.new_empty(len(x), A[0].shape[0])  # eq. 1, W_0 x: (N, D_in) x (D_in, D_out) -> (N, D_out); (N, R)
        for x_run, m, A_run, h_run in zip(x.split(a_sizes), split_or_none(mask, a_sizes), A, h.split(a_sizes)):
            x_run = x_run if m is None else m.to(x.dtype).mul_(x_run)  # the product with int8 itself would make two tensors
            torch.mm(x_run, A_run.t(), out=h_run)  # (n, D_in) x (D_in, R)
        h *= scale
        for y_run, h_run, B_run in zip(y.split(b_sizes), h.split(b_sizes), B):
            y_run.addmm_(h_run, B_run.t())  # eq. 4: (n, R) x (R, D_out)
        ctx.save_for_backward(x, mask, h, *experts)
        ctx.others = weight, scale, a_sizes, b_sizes
        return y

    @staticmethod
    def backward(ctx, grad):
        (x, mask, h, *experts), (weight, scale, a_sizes, b_sizes) = ctx.saved_tensors, ctx.others
        A, B, by_A, by_B, by_h = experts[: len(a_sizes)], experts[len(a_sizes) :], [], [], torch.empty_like(h)
        for grad_run, h_run, B_run, by_h_run in zip(grad.split(b_sizes), h.split(b_sizes), B, by_h.split(b_sizes)):
            torch.mm(grad_run, B_run, out=by_h_run)  # (n, D_out) x (D_out, R)
            by_B.append((h_run.t() @ grad_run).t())  # (R, n) x (n, D_out), half the time of (D_out, n) x (n, R), -> (D_out, R): B lies so, too
        by_h *= scale
        by_x = product(grad, weight.t()) if ctx.needs_input_grad[0] else None  # not below the first adapter; (N, D_out) x (D_out, D_in) -> (N, D_in)
        for x_run, m, A_run, by_h_run, by_x_run in zip(x.split(a_sizes), split_or_none(mask, a_sizes), A, by_h.split(a_sizes), split_or_none(by_x, a_sizes)):
            m = None if m is None else m.to(x.dtype)
            if by_x is not None:
                below = torch.zeros_like(x_run).addmm_(by_h_run, A_run)  # (n, R) x (R, D_in); MKL takes up to five times as long where it does not add
                by_x_run.add_(below) if m is None else by_x_run.addcmul_(below, m)
            by_A.append(by_h_run.t() @ (x_run if m is None else m.mul_(x_run)))  # (R, n) x (n, D_in)
        return by_x, *[None] * 6, *by_A, *by_B


def split_or_none(x, sizes):
    return [None] * len(sizes) if x is None else x.split(sizes)


class StackedTransposes(torch.autograd.Function):
    """B's (D_out, R) as their transposes one below the other, (m*R, D_out). To autograd each transpose would be an operation of its own, thousands a step."""

    @staticmethod
    def forward(ctx, *B):
        return torch.cat([expert.t() for expert in B])

    @staticmethod
    def backward(ctx, grad):
        return tuple(part.t() for part in grad.chunk(len(ctx.needs_input_grad)))  # (m*R, D_out) -> (R, D_out) each -> (D_out, R), as B lies: no copies


def blocks(names):
    """Deal rows to blocks of one size, each of one expert, given the expert of every row: (expert of each block, row of
    each place in the blocks, place of each row). A block that is not full repeats one of its rows. Where an expert has two rows or
    fewer on average every row is a block, as they stand: moving them would take as long as reading some experts twice."""
    own = {}
    for row, name in enumerate(names):
        own.setdefault(name, []).append(row)
    size = -(-len(names) // len(own))
    if size <= 2:
        return tuple(names), [*range(len(names))], [*range(len(names))]
    dealt = [(name, rows[i : i + size]) for name, rows in sorted(own.items()) for i in range(0, len(rows), size)]
    places = [row for _, rows in dealt for row in rows + rows[:1] * (size - len(rows))]
    place = {row: i for i, row in enumerate(places)}
    return tuple(name for name, _ in dealt), places, [place[row] for row in range(len(names))]


def normed(x, weight, eps):
    """rms_norm on a CPU, and 1 / the root mean square (..., 1)."""
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # reads x once, and writes no squares
    return (x * scale).mul_(weight), scale


class FrozenRMSNorm(torch.autograd.Function):
    """F.rms_norm by a frozen weight. On a CPU torch puts its backward pass together from a dozen operations, a GPU has a kernel."""

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


def rms_norm(x, weight, eps):
    """x (..., D) over its root mean square, times weight (D,), computed in fp32 and rounded once; transformers rounds before the weight too."""
    if x.is_cuda or x.dtype != torch.float32 or weight.requires_grad:
        return F.rms_norm(x, weight.shape, weight, eps)
    return FrozenRMSNorm.apply(x, weight, eps) if x.requires_grad else normed(x, weight, eps)[0]  # apply() alone takes 10 us, as much as a small product


def turned(x, cos, sin):
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


def rotate(x, cos, sin):
    """RoPE on split halves: x (B, heads, T, K), cos and sin (1, 1, T, K/2)."""
    return Rotate.apply(x, cos, sin) if x.requires_grad else turned(x, cos, sin)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, which keeps its two inputs and finds silu(gate) again in the backward pass: an eighth of what a pass keeps."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def swiglu(gate, up):
    """silu(gate) * up, of one shape."""
    return SwiGLU.apply(gate, up) if gate.requires_grad else F.silu(gate).mul_(up)


class Rows(NamedTuple):
    """Rows of B = 1 that stand one after another without pads, `lengths` tokens each."""

    lengths: list
    starts: torch.Tensor  # int32, one more than rows: where each begins, and the end
    positions: torch.Tensor  # (1, T): of each token in its row
    places: torch.Tensor | None = None  # each row's in a KVCache; None: no cache, or one row at every place, in order, with as many tokens each

    @classmethod
    def of(cls, lengths, device, before=None, places=None):
        """before: how many tokens of each row went before these, if any."""
        ends = torch.tensor([0, *lengths]).cumsum(0)
        first = torch.tensor(before or [0] * len(lengths))
        positions = torch.arange(int(ends[-1])) + (first - ends[:-1]).repeat_interleave(torch.tensor(lengths))
        return cls(lengths, ends.to(device, torch.int32), positions[None].to(device), places)


def runs_of_rows(lengths):
    """[(length, how many rows of it stand side by side)], and the tokens of each such run: R-Drop's copies at least are equally long."""
    runs = [(length, len(list(run))) for length, run in itertools.groupby(lengths)]
    return runs, [length * count for length, count in runs]


def below(x, count):
    """The `count` rows of a run one below the other: (H, n*L, K) -> (H, n, L, K) -> (n, H, L, K)."""
    return x.unflatten(1, (count, -1)).transpose(0, 1)


def one_after_another(runs):
    """Back from what below() gives, all runs together: (n, H, L, K) each -> (1, H, T, K), token by token in memory, as the kernel writes them."""
    each = [y.transpose(1, 2).flatten(0, 1) for y in runs]  # (n, H, L, K) -> (n, L, H, K) -> (n*L, H, K)
    return torch.cat(each).transpose(0, 1)[None]  # (T, H, K) -> (1, H, T, K)


def attention(q, k, v, rows=None):
    """q (B, H, T, K), k and v (B, G, T, K) -> (B, H, T, K). A query sees no later key and, with `rows` (B = 1), none of another row."""
    gqa = {"enable_gqa": q.shape[1] != k.shape[1]}
    if rows is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, **gqa)
    if q.is_cuda and q.dtype == torch.bfloat16:
        longest, gqa = max(rows.lengths), gqa if "enable_gqa" in varlen_attn.__kwdefaults__ else {}  # torch 2.11 takes groups unasked
        y = varlen_attn(*(x[0].transpose(0, 1) for x in (q, k, v)), rows.starts, rows.starts, longest, longest, window_size=(-1, 0), **gqa)  # (T, H, K)
        return y.transpose(0, 1)[None]  # (T, H, K) -> (1, H, T, K)
    runs, sizes = runs_of_rows(rows.lengths)
    some = zip(*(x[0].split(sizes, dim=1) for x in (q, k, v)))
    return one_after_another([F.scaled_dot_product_attention(*(below(x, count) for x in run), is_causal=True, **gqa) for run, (_, count) in zip(some, runs)])


def seen(rows, begins, k, heads):
    """The slots of a cache that the newest tokens of rows see, for cached_attention in every layer. begins (n,): the first slot of each row among those of all places;
    k (places, S, G, K): a layer's keys; heads: H. For a GPU's kernel int32: begins and one more, which it doesn't read, (n+1,), and how many slots are in use (n,). Else for each of
    runs_of_rows what is added to scores, 0 or, for slots of later tokens and empty ones, -inf (n, 1, H/G * L, S'), S' the most in use; on a GPU S."""
    filled = rows.positions[0, rows.starts[1:] - 1].int() + 1
    if k.is_cuda and k.dtype == torch.bfloat16:
        return F.pad(begins, (0, 1)).int(), filled
    runs, sizes = runs_of_rows(rows.lengths)
    slots = torch.arange(k.shape[1] if k.is_cuda else int(filled.max()), device=k.device)  # a recorded step can't ask for the greatest
    later = (slots > at.view(count, 1, length, 1) for (length, count), at in zip(runs, rows.positions[0].split(sizes)))  # (n, 1, L, S')
    return [torch.zeros(x.shape, dtype=k.dtype, device=k.device).masked_fill_(x, -torch.inf).repeat(1, 1, heads // k.shape[2], 1) for x in later]


def cached_attention(q, k, v, rows, slots):
    """`attention` for the newest tokens of rows, q (1, H, T, K), over all that a cache has of these rows, themselves included: k, v (places, S, G, K). slots: what seen() gives."""
    if q.is_cuda and q.dtype == torch.bfloat16:  # varlen_attn, but torch 2.11's has no seqused_k yet
        (begins, filled), longest = slots, max(rows.lengths)
        y = torch.ops.aten._flash_attention_forward(q[0].transpose(0, 1), k.flatten(0, 1), v.flatten(0, 1), rows.starts, begins, longest, k.shape[1],
                                                    0.0, longest > 1, False, seqused_k=filled)[0]  # (T, H, K), and (places, S, G, K) -> (places*S, G, K)
        return y.transpose(0, 1)[None]  # (T, H, K) -> (1, H, T, K)
    k, v = (x[:, : slots[0].shape[-1]] for x in (k, v))  # (places, S', G, K)
    (runs, sizes), each, done = runs_of_rows(rows.lengths), [], 0
    for (length, count), q_run, mask in zip(runs, q[0].split(sizes, dim=1), slots):
        mine = [x if rows.places is None else x[rows.places[done : done + count]] for x in (k, v)]  # (n, S', G, K)
        queries = below(q_run, count).reshape(count, k.shape[2], -1, q.shape[-1])  # a group's heads are so many more queries over the same keys: (n, H, L, K) -> (n, G, H/G * L, K)
        y = F.scaled_dot_product_attention(queries, *(x.transpose(1, 2) for x in mine), attn_mask=mask)  # (n, G, H/G * L, K)
        each.append(y.reshape(count, -1, length, q.shape[-1]))  # -> (n, H, L, K)
        done += count
    return one_after_another(each)


class HeadLoss(torch.autograd.Function):
    """Eqs. 6-9 with the head, forward and backward in one go: logits and their gradient exist for a part of the targets
    at a time, in the same memory, and what is kept for the backward pass is the gradient of the hidden states alone."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, alpha):
        wanted, grad = ctx.needs_input_grad[0], torch.empty_like(hidden)  # (N, P, D)
        nll, kl = torch.zeros(2, device=hidden.device).unbind()
        P, V = hidden.shape[1], weight.shape[0]
        at_once = max(1, LOGITS[hidden.device.type] // (P * V))
        block = at_once if hidden.is_cuda else max(1, BLOCK // (P * V))
        for some, grad_part, targets in zip(*(x.split(at_once) for x in (hidden, grad, labels))):
            logits = product(some, weight)  # (n, P, D) x (D, V) -> (n, P, V)
            for z, y in zip(logits.split(block), targets.split(block)):
                y = y[:, None]  # (n,) -> (n, 1)
                p = z.softmax(-1, dtype=torch.float32)
                # The greatest logit and its log p: any other's is z - top + best, and in this order small losses are not rounded away.
                top, best = z.amax(-1, keepdim=True).float(), p.amax(-1, keepdim=True).log_()  # (n, P, 1)
                nll += (top - z.gather(-1, y[:, None].expand(-1, P, 1)) - best).sum() / P  # eq. 6 for one pass, eq. 8 for two
                if P == 2:
                    p1, p2 = p.unbind(1)  # (n, V) each
                    log_sum = top - best
                    d = (z[:, 0].float() - z[:, 1]).sub_(log_sum[:, 0] - log_sum[:, 1])  # log p1 - log p2
                    kl1, kl2 = (p1 * d).sum(-1, keepdim=True), -(p2 * d).sum(-1, keepdim=True)  # KL(p1 || p2), KL(p2 || p1): (n, 1)
                    kl += (kl1 + kl2).sum() / 2  # eq. 7
                if not wanted:
                    continue
                # P times eq. 9's gradient by the logits, without the label's -1: of pass 1 p1 + alpha (p1 (d - kl1) + p1 - p2), of pass 2 the same, exchanged.
                parts = p.unbind(1) if P == 1 else (torch.add(1 + alpha - alpha * kl1, d, alpha=alpha).mul_(p1).sub_(p2, alpha=alpha),
                                                    torch.sub(1 + alpha - alpha * kl2, d, alpha=alpha).mul_(p2).sub_(p1, alpha=alpha))
                for i, part in enumerate(parts):
                    z[:, i] = part.scatter_add_(-1, y, part.new_full((), -1).expand(y.shape))  # in fp32, then rounded to the logits' precision
            if wanted:
                torch.div(product(logits, weight.t()), P, out=grad_part)  # (n, P, V) x (V, D) -> (n, P, D)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(nll, kl)
        return nll + alpha * kl, nll, kl  # eq. 9

    @staticmethod
    def backward(ctx, by_loss, _, __):
        (grad,) = ctx.saved_tensors
        return grad * by_loss, None, None, None


def head_loss(hidden, weight, labels, alpha):
    """(loss, nll, kl), sums over target tokens in fp32 (section 3.4), of which loss has a derivative by `hidden`.

    hidden (N, P, D): the states that P = 2 passes (eqs. 7-9), or 1 (eq. 6, kl 0), have before each target; labels (N,);
    weight (V, D): the head's, plain or Packed. nll and kl are M times eq. 8 and eq. 7, loss is nll + alpha kl;
    dividing by M is the caller's, since M counts the whole effective batch.
    """
    return HeadLoss.apply(hidden, weight, labels, alpha)
