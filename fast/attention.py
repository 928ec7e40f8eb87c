"""Attention over rows that stand one after another without pads: among themselves, or over what a
cache has of them.

T tokens of all rows, H query heads, G key/value heads, K head dimension; n rows of L tokens each;
a cache has places, one per row of a batch, of S slots, S' of them in use. A GPU in bf16 has a
kernel for all rows; elsewhere neighbours of one length (R-Drop's copies at least) share a call.
"""

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn


class Rows(NamedTuple):
    """Rows of B = 1 that stand one after another without pads, `lengths` tokens each."""

    lengths: list
    starts: Tensor  # int32, one more than rows: where each begins, and the end
    positions: Tensor  # (1, T): of each token in its row
    # Each row's place in a Cache; None: no cache, or one row at every place, in order.
    places: Tensor | None = None

    @classmethod
    def of(cls, lengths, device, before=None, places=None) -> "Rows":
        """before: how many tokens of each row went before these, if any."""
        ends = torch.tensor([0, *lengths]).cumsum(0)
        first = torch.tensor(before or [0] * len(lengths))
        shift = (first - ends[:-1]).repeat_interleave(torch.tensor(lengths))  # (n,) -> (T,)
        positions = torch.arange(int(ends[-1])) + shift
        return cls(lengths, ends.to(device, torch.int32), positions[None].to(device), places)


def runs_of_rows(lengths: list[int]) -> tuple[list[tuple[int, int]], list[int]]:
    """[(length, how many rows of it stand side by side)], and the tokens of each such run."""
    runs = [(length, len(list(run))) for length, run in itertools.groupby(lengths)]
    return runs, [length * count for length, count in runs]


def one_below_the_other(x: Tensor, count: int) -> Tensor:
    """The `count` rows of a run as a batch: (H, n*L, K) -> (H, n, L, K) -> (n, H, L, K)."""
    return x.unflatten(1, (count, -1)).transpose(0, 1)


def one_after_another(runs: list[Tensor]) -> Tensor:
    """Back from such batches, all runs together: (n, H, L, K) each -> (1, H, T, K), in memory token
    by token, as kernels write."""
    # (n, H, L, K) -> (n, L, H, K) -> (n*L, H, K)
    each = [y.transpose(1, 2).flatten(0, 1) for y in runs]
    return torch.cat(each).transpose(0, 1)[None]  # (T, H, K) -> (1, H, T, K)


def has_kernel(x: Tensor) -> bool:
    return x.is_cuda and x.dtype == torch.bfloat16


def attention(q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
    """q (1, H, T, K), k and v (1, G, T, K) -> (1, H, T, K). A query sees no later key and none of
    another row."""
    gqa = {"enable_gqa": q.shape[1] != k.shape[1]}
    if has_kernel(q):
        longest = max(rows.lengths)
        if "enable_gqa" not in varlen_attn.__kwdefaults__:  # torch 2.11 takes groups unasked
            gqa = {}
        by_token = (x[0].transpose(0, 1) for x in (q, k, v))  # (1, H or G, T, K) -> (T, H or G, K)
        starts = rows.starts, rows.starts, longest, longest
        y = varlen_attn(*by_token, *starts, window_size=(-1, 0), **gqa)  # (T, H, K)
        return y.transpose(0, 1)[None]  # (T, H, K) -> (1, H, T, K)
    runs, sizes = runs_of_rows(rows.lengths)
    done = []
    for (_, count), *qkv in zip(runs, *(x[0].split(sizes, dim=1) for x in (q, k, v))):
        batch = (one_below_the_other(x, count) for x in qkv)  # (n, H or G, L, K)
        done.append(F.scaled_dot_product_attention(*batch, is_causal=True, **gqa))
    return one_after_another(done)


def seen(rows: Rows, begins: Tensor, k: Tensor, heads: int) -> tuple | list:
    """What the newest tokens of rows see of a cache, for cached_attention in every layer.

    begins (n,): the first slot of each row among those of all places. k (places, S, G, K): the keys
    of a layer. heads: H. For a GPU's kernel int32: begins with one more, which it doesn't read,
    (n+1,), and how many slots are in use (n,). Else for each of runs_of_rows what is added to
    scores, 0 or, for slots of later tokens and empty ones, -inf: (n, 1, H/G * L, S'), on a GPU S
    for S'.
    """
    filled = rows.positions[0, rows.starts[1:] - 1].int() + 1  # (n,)
    if has_kernel(k):
        return F.pad(begins, (0, 1)).int(), filled
    runs, sizes = runs_of_rows(rows.lengths)
    # On a GPU all: a recorded step can't ask for the greatest.
    slots = torch.arange(k.shape[1] if k.is_cuda else int(filled.max()), device=k.device)
    masks = []
    for (length, count), at in zip(runs, rows.positions[0].split(sizes)):
        later = slots > at.view(count, 1, length, 1)  # (n*L,) -> (n, 1, L, 1) -> (n, 1, L, S')
        mask = torch.zeros(later.shape, dtype=k.dtype, device=k.device)
        mask.masked_fill_(later, -torch.inf)
        masks.append(mask.repeat(1, 1, heads // k.shape[2], 1))  # (n, 1, H/G * L, S')
    return masks


def cached_attention(q: Tensor, k: Tensor, v: Tensor, rows: Rows, slots: tuple | list) -> Tensor:
    """`attention` for the newest tokens of rows, q (1, H, T, K), over all that a cache has of these
    rows, themselves included: k, v (places, S, G, K). slots: what seen() gives."""
    if has_kernel(q):
        (begins, filled), longest = slots, max(rows.lengths)
        every_slot = (x.flatten(0, 1) for x in (k, v))  # (places, S, G, K) -> (places*S, G, K)
        # varlen_attn's own; torch 2.11's varlen_attn has no seqused_k yet.
        flash = torch.ops.aten._flash_attention_forward
        lengths = rows.starts, begins, longest, k.shape[1]
        by_token = q[0].transpose(0, 1)  # (1, H, T, K) -> (T, H, K)
        y = flash(by_token, *every_slot, *lengths, 0.0, longest > 1, False, seqused_k=filled)[0]
        return y.transpose(0, 1)[None]  # (T, H, K) -> (1, H, T, K)
    k, v = (x[:, : slots[0].shape[-1]] for x in (k, v))  # (places, S', G, K)
    runs, sizes = runs_of_rows(rows.lengths)
    done, first = [], 0
    for (length, count), q_run, mask in zip(runs, q[0].split(sizes, dim=1), slots):
        own = [k, v]
        if rows.places is not None:
            own = [x[rows.places[first : first + count]] for x in own]  # (n, S', G, K)
        keys, values = (x.transpose(1, 2) for x in own)  # (n, G, S', K)
        # A group's heads are so many more queries over the same keys:
        # (n, H, L, K) -> (n, G, H/G * L, K)
        queries = one_below_the_other(q_run, count).reshape(count, k.shape[2], -1, q.shape[-1])
        y = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        done.append(y.reshape(count, -1, length, q.shape[-1]))  # (n, G, H/G * L, K) -> (n, H, L, K)
        first += count
    return one_after_another(done)
