"""The two pieces of arithmetic that decide the speed, written by hand; tests hold each against plain torch.

N target tokens, P passes (R-Drop has two), D hidden, V vocabulary; a weight is (D_out, D_in).
"""

import platform

import torch
import torch.nn.functional as F

# torch hands fp32 products to MKL, which keeps to AVX2 on other makers' processors and is slow where tokens are few. oneDNN,
# a part of torch too, asks the processor and took a half to nine tenths of the time on AMD EPYCs (bench/NOTES.md).
ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64") else None
LOGITS = {"cpu": 2**23, "cuda": 2**27}  # elements held at one time; blocks over 32 MiB glibc returns at once, and fresh pages cost time
BLOCK = 2**20  # of those, elements that a CPU works on together: 4 MiB stay in its caches from one operation to the next


def by_onednn(x):
    return ONEDNN is not None and not x.is_cuda and x.dtype == torch.float32


def product(x, weight, bias=None, update=None):
    """x (..., D_in) times weight, plus bias (D_out,), plus update (..., D_out): (..., D_out), without derivatives."""
    y = ONEDNN(x, weight, bias, "none", [], "") if by_onednn(x) else F.linear(x, weight, bias)
    return y if update is None else y.add_(update)


def packed(weight):
    """A frozen weight in the order in which oneDNN multiplies it, which it otherwise finds anew for every product: a few tokens
    take half the time. Only `product` can read the result. Where oneDNN does not compute, the weight as it is."""
    if not by_onednn(weight):
        return weight.detach()
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 32)  # tokens expected; 8 and 1,024 give the same on an AVX-512 EPYC


class FrozenLinear(torch.autograd.Function):
    """`product` with derivatives by x and update."""

    @staticmethod
    def forward(ctx, x, weight, bias, update, transposed):
        ctx.transposed = transposed
        return product(x, weight, bias, update)

    @staticmethod
    def backward(ctx, grad):
        x_grad = product(grad, ctx.transposed) if ctx.needs_input_grad[0] else None  # none below the first adapter
        return x_grad, None, None, grad if ctx.needs_input_grad[3] else None, None


def linear(x, weight, bias=None, update=None, transposed=None):
    """F.linear(x, weight, bias) + update, faster where the weight is frozen; shapes as in product. transposed: the weight's
    packed transpose (D_in, D_out), for the backward pass; without it a packed weight is unpacked every time."""
    if weight.requires_grad:
        y = F.linear(x, weight, bias)
        return y if update is None else y + update
    if not torch.is_grad_enabled():
        return product(x, weight, bias, update)
    return FrozenLinear.apply(x, weight, bias, update, weight.t() if transposed is None else transposed)


class HeadLoss(torch.autograd.Function):
    """Eqs. 6-9 with the head, forward and backward in one go: logits and their gradient exist for a part of the targets
    at a time, in the same memory, and what is kept for the backward pass is the gradient of the hidden states alone."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, alpha, transposed):
        wanted, grad = ctx.needs_input_grad[0], torch.empty_like(hidden)  # (N, P, D)
        nll, kl = torch.zeros(2, device=hidden.device).unbind()
        P, V = hidden.shape[1], len(weight)
        at_once = max(1, LOGITS[hidden.device.type] // (P * V))
        block = at_once if hidden.is_cuda else max(1, BLOCK // (P * V))
        for some, grad_part, targets in zip(*(x.split(at_once) for x in (hidden, grad, labels))):
            logits = product(some, weight)  # (n, P, D) x (D, V) -> (n, P, V)
            for z, y in zip(logits.split(block), targets.split(block)):
                y = y[:, None]  # (n,) -> (n, 1)
                logp = z.float().log_softmax(-1)
                p = logp.exp()
                nll -= logp.gather(-1, y[:, None].expand(-1, P, 1)).sum() / P  # eq. 6 for one pass, eq. 8 for two
                if P == 2:
                    (logp1, logp2), (p1, p2) = logp.unbind(1), p.unbind(1)  # (n, V) each
                    d = logp1 - logp2
                    kl1, kl2 = (p1 * d).sum(-1, keepdim=True), -(p2 * d).sum(-1, keepdim=True)  # KL(p1 || p2), KL(p2 || p1): (n, 1)
                    kl += (kl1 + kl2).sum() / 2  # eq. 7
                if not wanted:
                    continue
                # Twice the gradient of eq. 9 by the logits of pass 1, but for the labels: p1 + alpha (p1 (d - kl1) + p1 - p2).
                parts = p.unbind(1) if P == 1 else (torch.add(1 + alpha - alpha * kl1, d, alpha=alpha).mul_(p1).sub_(p2, alpha=alpha),
                                                    torch.sub(1 + alpha - alpha * kl2, d, alpha=alpha).mul_(p2).sub_(p1, alpha=alpha))
                for i, part in enumerate(parts):
                    z[:, i] = part.scatter_add_(-1, y, part.new_full((), -1).expand(y.shape))  # in fp32, then rounded to the logits' precision
            if wanted:
                torch.div(product(logits, transposed), P, out=grad_part)  # (n, P, V) x (V, D) -> (n, P, D)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(nll, kl)
        return nll + alpha * kl, nll, kl  # eq. 9

    @staticmethod
    def backward(ctx, by_loss, _, __):
        (grad,) = ctx.saved_tensors
        return grad * by_loss, None, None, None, None


def head_loss(hidden, weight, labels, alpha, transposed=None):
    """(loss, nll, kl), sums over target tokens in fp32 (section 3.4), of which loss has a derivative by `hidden`.

    hidden (N, P, D): the states that P = 2 passes (eqs. 7-9), or 1 (eq. 6, kl 0), have before each target; labels (N,);
    weight (V, D): the head's, transposed as in linear. nll and kl are M times eq. 8 and eq. 7, loss is nll + alpha kl;
    dividing by M is the caller's, since M counts the whole effective batch.
    """
    return HeadLoss.apply(hidden, weight, labels, alpha, weight.t() if transposed is None else transposed)
