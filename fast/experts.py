"""How the experts of eq. 4 meet the tokens of a batch, in three ways that give the same, and
MoLoRA's of eqs. 2 and 3.

Each update is called with a frozen projection and its input, and gives eq. 1's sum,
W_0 x + B A x. Shapes: N tokens of B rows of T, R rank, n experts of A and m of B present, or n of a
learned router. A is (R, D_in), B (D_out, R), in memory (R, D_out): see layers.prepare.
"""

import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslora import CrossLoRA, RoutedLowRank
from fast.kernels import INTEL, dropout_mask, frozen_matmul

# --- training on a CPU: each run of tokens on its own experts -------------------------------------


def runs_of_experts(names: Sequence[str], counts: Sequence[int]) -> tuple[list[str], list[int]]:
    """(names, numbers of tokens) of rows of `counts` tokens one after another, neighbours of one
    name taken together."""
    found, sizes = [], []
    for name, run in itertools.groupby(zip(names, counts), key=operator.itemgetter(0)):
        found.append(name)
        sizes.append(sum(count for _, count in run))
    return found, sizes


class Adapted(torch.autograd.Function):
    """Eqs. 1 and 4 for N tokens of rows that stand one after another:
    W_0 x + bias + scale * B_tgt A_src (x * mask), with derivatives by x and the experts. By runs of
    tokens that share an expert, so that none is copied."""

    @staticmethod
    def forward(ctx, x, weight, bias, mask, scale, a_sizes, b_sizes, *experts):
        """x (N, D_in); weight (D_out, D_in), plain or Packed; mask (N, D_in) int8 or None; a_sizes,
        b_sizes: numbers of tokens, N in all, that share an A (R, D_in) or a B (D_out, R); experts:
        these A's, then these B's."""
        A, B = experts[: len(a_sizes)], experts[len(a_sizes) :]
        y = frozen_matmul(x, weight, bias)  # eq. 1, W_0 x: (N, D_in) x (D_in, D_out) -> (N, D_out)
        h = x.new_empty(len(x), A[0].shape[0])  # (N, R)
        # Cast first: the product with int8 itself would make two tensors.
        dropped = x if mask is None else mask.to(x.dtype).mul_(x)
        for x_run, A_run, h_run in zip(dropped.split(a_sizes), A, h.split(a_sizes)):
            torch.mm(x_run, A_run.t(), out=h_run)  # (n, D_in) x (D_in, R)
        h *= scale
        for y_run, h_run, B_run in zip(y.split(b_sizes), h.split(b_sizes), B):
            y_run.addmm_(h_run, B_run.t())  # eq. 4: (n, R) x (R, D_out)
        ctx.save_for_backward(x, mask, h, *experts)
        ctx.others = weight, scale, a_sizes, b_sizes
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        x, mask, h, *experts = ctx.saved_tensors
        weight, scale, a_sizes, b_sizes = ctx.others
        A, B = experts[: len(a_sizes)], experts[len(a_sizes) :]
        by_A, by_B, by_h = [], [], torch.empty_like(h)
        by_run = zip(grad.split(b_sizes), h.split(b_sizes), B, by_h.split(b_sizes))
        for grad_run, h_run, B_run, by_h_run in by_run:
            torch.mm(grad_run, B_run, out=by_h_run)  # (n, D_out) x (D_out, R)
            # (R, n) x (n, D_out) -> (D_out, R), as B lies; (D_out, n) x (n, R) takes twice as long.
            by_B.append((h_run.t() @ grad_run).t())
        by_h *= scale
        m = None if mask is None else mask.to(x.dtype)
        by_x = None  # nothing is wanted below the first adapter
        if ctx.needs_input_grad[0]:
            by_x = frozen_matmul(grad, weight.t())  # (N, D_out) x (D_out, D_in) -> (N, D_in)
            by_dropped = torch.zeros_like(x)
            for by_h_run, A_run, by_run in zip(by_h.split(a_sizes), A, by_dropped.split(a_sizes)):
                # (n, R) x (R, D_in), added to zeros, since MKL takes up to five times as long where
                # it does not add.
                by_run.addmm_(by_h_run, A_run)
            if m is None:
                by_x.add_(by_dropped)
            else:
                by_x.addcmul_(by_dropped, m)
        dropped = x if m is None else m.mul_(x)
        for x_run, by_h_run in zip(dropped.split(a_sizes), by_h.split(a_sizes)):
            by_A.append(by_h_run.t() @ x_run)  # (R, n) x (n, D_in)
        return by_x, *[None] * 6, *by_A, *by_B


class PerRow:
    """One projection with the update, each row on its own experts: x (..., D_in) -> (..., D_out),
    the rows one after another. a, b: runs_of_experts of A and B; in place of the rows' tokens they
    may count rows of equal length."""

    def __init__(self, bank, a, b, scale, dropout, dtype):
        self.bank, self.a, self.b = bank, a, b
        self.scale, self.dropout, self.dtype = scale, dropout, dtype

    def __call__(self, projection: nn.Module, x: Tensor) -> Tensor:
        (a, a_counts), (b, b_counts) = self.a, self.b
        experts = [self.bank.lora_A[name].to(self.dtype) for name in a]
        experts += [self.bank.lora_B[name].to(self.dtype) for name in b]
        flat = x.flatten(0, -2)  # (..., D_in) -> (N, D_in)
        a_sizes = [count * len(flat) // sum(a_counts) for count in a_counts]
        b_sizes = [count * len(flat) // sum(b_counts) for count in b_counts]
        mask = dropout_mask(flat, self.dropout) if self.dropout > 0 else None
        scale, frozen = self.scale / (1 - self.dropout), (projection.weight, projection.bias)
        y = Adapted.apply(flat, *frozen, mask, scale, a_sizes, b_sizes, *experts)
        return y.view(*x.shape[:-1], -1)  # (N, D_out) -> (..., D_out)


# --- decoding on a CPU: experts in blocks ---------------------------------------------------------


def blocks(names: Sequence[str]) -> tuple[tuple[str, ...], list[int], list[int]]:
    """Deal rows to blocks of one size, each of one expert, given the expert of every row: (expert
    of each block, row of each place in the blocks, place of each row). A block that is not full
    repeats one of its rows. Where an expert has two rows or fewer on average every row is a block,
    as they stand: moving them would take as long as reading some experts twice."""
    own = {}
    for row, name in enumerate(names):
        own.setdefault(name, []).append(row)
    size = -(-len(names) // len(own))
    if size <= 2:
        return tuple(names), [*range(len(names))], [*range(len(names))]
    of_block, row_at = [], []
    for name, rows in sorted(own.items()):
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            of_block.append(name)
            row_at += part + part[:1] * (size - len(part))
    place_of = {row: i for i, row in enumerate(row_at)}  # a repeated row's last place
    return tuple(of_block), row_at, [place_of[row] for row in range(len(names))]


def gather(expert, names, had, held, dtype) -> Tensor:
    """expert(name), (M, N), of each of `names`, one per block, in the first places of `held` or,
    where it is too small, of new memory: (blocks or more, M, N). had: the experts that lie in
    `held`. One at its place already is not copied: that costs many steps' reading."""
    if held is None or len(held) < len(names):
        one = expert(names[0])
        room = len(names) * 5 // 4  # the next rows may need some more
        had, held = (), one.new_empty(room, *one.shape, dtype=dtype)
    for i, name in enumerate(names):
        if had[i : i + 1] != (name,):
            held[i] = expert(name).detach()
    return held


def move(x: Tensor, rows: Tensor | None) -> Tensor:
    """x (rows, ...) in another order, or as it stands where `rows` is None."""
    return x if rows is None else x.index_select(0, rows)


class LowRank:
    """As PerRow for decoding, where a token is a row, x (1, N, D_in) -> (1, N, D_out): rows of one
    expert are put together in blocks of s, so that an expert is read once per block, not per row.

    A (a, R, D_in), B (b, R, D_out): a block's expert. moves: three row indices (None: as they
    stand), from rows into A's blocks, across to B's, and back; see blocks().
    """

    def __init__(self, bank, names, moves, scale, dtype, before):
        """names: the experts of A's and of B's blocks. before: the LowRank of other rows, whose
        memory this one takes over, or None."""
        had, held = (before.names, before.held) if before else (((), ()), (None, None))
        self.names, self.moves, self.scale = names, moves, scale

        def transposed(name: str) -> Tensor:
            return bank.lora_B[name].t()  # (D_out, R) -> (R, D_out), as it lies

        A = gather(bank.lora_A.__getitem__, names[0], had[0], held[0], dtype)
        B = gather(transposed, names[1], had[1], held[1], dtype)
        self.held = [A, B]
        self.A, self.B = A[: len(names[0])], B[: len(names[1])]

    def __call__(self, projection: nn.Module, x: Tensor) -> Tensor:
        into, across, back = self.moves
        # (N, D_in) -> (a*s, D_in) -> (a, s, D_in)
        h = move(x[0], into).view(len(self.A), -1, x.shape[-1])
        # A_src x: (a, s, D_in) x (a, D_in, R) -> (a, s, R); for s = 1 A x takes twice as long on
        # Intel's, half to four fifths on AMD's.
        h = torch.bmm(h, self.A.mT) if h.shape[1] > 1 or INTEL else torch.bmm(self.A, h.mT).mT
        # (a*s, R) -> (b*s, R) -> (b, s, R), s now of B's blocks
        h = move(h.flatten(0, 1), across).view(len(self.B), -1, h.shape[-1])
        y = projection(x)  # (1, N, D_out)
        if back is not None:  # eq. 4: (b, s, R) x (b, R, D_out) -> (b*s, D_out) -> (N, D_out)
            update = torch.bmm(h * self.scale, self.B).flatten(0, 1)
            return y.add_(update.index_select(0, back))
        in_blocks = y.view(len(self.B), -1, y.shape[-1])  # (1, N, D_out) -> (b, s, D_out)
        if len(self.B) == 1:  # bmm would take one thread
            in_blocks[0].addmm_(h[0], self.B[0], alpha=self.scale)  # eq. 4: (N, R) x (R, D_out)
        else:
            in_blocks.baddbmm_(h, self.B, alpha=self.scale)  # eq. 4: (b, s, R) x (b, R, D_out)
        return y


def grouped(adapter, src_langs, tgt_langs, dtype=torch.float32, before=None) -> list[dict]:
    """LowRank for decoding, without dropout and derivatives: a list over layers of {projection:
    LowRank}. before: the list it gave for other rows. It is emptied: its memory is used again, and
    an expert that is at its place already is not copied again."""
    routes = [adapter.route(s, t) for s, t in zip(src_langs, tgt_langs, strict=True)]
    (a_names, a_rows, a_places), (b_names, b_rows, b_places) = map(blocks, zip(*routes))
    as_they_stand, moves = list(range(len(routes))), []
    for rows in (a_rows, [a_places[row] for row in b_rows], b_places):
        stays = rows == as_they_stand
        moves.append(None if stays else torch.tensor(rows, device=adapter.device))
    lora = []
    for i, layer in enumerate(adapter.layers):
        updates, names = {}, (a_names, b_names)
        for name, bank in layer.items():
            old = before and before[i].pop(name)
            updates[name] = LowRank(bank, names, moves, adapter.scale, dtype, old)
        lora.append(updates)
    return lora


# --- on a GPU: all experts for all tokens ---------------------------------------------------------


class StackedTransposes(torch.autograd.Function):
    """B's (D_out, R) as their transposes one below the other, (m*R, D_out): one operation to
    autograd, where each transpose would be one of its own, thousands per step."""

    @staticmethod
    def forward(ctx, *B) -> Tensor:
        return torch.cat([expert.t() for expert in B])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        # (m*R, D_out) -> (R, D_out) each -> (D_out, R), as B lies: no copies
        return tuple(part.t() for part in grad.chunk(len(ctx.needs_input_grad)))


class EveryExpert:
    """As PerRow on a GPU, for tokens of any rows: all experts present meet all tokens, and each
    token keeps its own. A GPU reads x as fast for a hundred columns as for sixteen, and a launch
    for every expert would cost more.

    A (n*R + R, D_in): all A's and an expert of zeros, B (m*R, D_out): all B's transposes, one below
    the other. columns (N, m*R): for every row of B the column of A's output to take: for the
    token's own B_tgt its A_src x, for the others zeros. With R = 1, A's of de and en and B's of en
    and zh, a token of de -> zh has [2, 0]: zeros for B_en, A_de x for B_zh.
    """

    def __init__(self, A: Tensor, B: Tensor, columns: Tensor, scale: float, dropout: float):
        self.A, self.B, self.columns = A, B, columns
        self.scale, self.dropout = scale, dropout

    def __call__(self, projection: nn.Module, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)  # (..., D_in) -> (N, D_in)
        dropped = F.dropout(flat, self.dropout, training=self.dropout > 0)
        h = F.linear(dropped, self.A)  # (N, D_in) x (D_in, n*R + R) -> (N, n*R + R)
        own = h.gather(1, self.columns)  # (N, n*R + R) -> (N, m*R)
        # Eqs. 1, 4: (N, m*R) x (m*R, D_out)
        y = projection(flat).addmm_(own, self.B, alpha=self.scale)
        return y.view(*x.shape[:-1], -1)  # (N, D_out) -> (..., D_out)


def stacked(
    adapter: CrossLoRA, dtype: torch.dtype, experts: tuple[list, list] | None = None
) -> Iterator[dict]:
    """Experts as EveryExpert takes them, `experts` of A and B or all: for every layer {projection:
    (A, B)}, a generator, so that a GPU has the layers before to compute."""
    a_names, b_names = experts or adapter.expert_names()
    for layer in adapter.layers:
        stacks = {}
        for name, bank in layer.items():
            zeros = torch.zeros_like(bank.lora_A[a_names[0]])
            A = torch.cat([*(bank.lora_A[a] for a in a_names), zeros]).to(dtype)
            B = StackedTransposes.apply(*(bank.lora_B[b] for b in b_names)).to(dtype)
            stacks[name] = A, B  # (n*R + R, D_in), (m*R, D_out)
        yield stacks


def columns(adapter, src_langs, tgt_langs, counts, experts=None) -> Tensor:
    """EveryExpert's `columns` for rows of `counts` tokens one after another, among `experts` or
    all."""
    R, (a, b) = adapter.expert_rank, experts or adapter.expert_names()
    indices = []
    for src_lang, tgt_lang in zip(src_langs, tgt_langs, strict=True):
        A, B = adapter.route(src_lang, tgt_lang)
        indices.append((a.index(A), b.index(B)))
    of_rows = torch.tensor(indices)  # (B, 2)
    of_tokens = of_rows.repeat_interleave(torch.tensor(counts), dim=0)  # (B, 2) -> (N, 2)
    src, tgt = of_tokens.split(1, dim=1)  # (N, 1) each
    column = torch.arange(len(b) * R)
    first = torch.where(column // R == tgt, src * R, len(a) * R)  # (N, m*R)
    return first.add_(column % R).to(adapter.device)


def by_token(adapter, stacks, columns_of_layers, dropout=False) -> Iterator[dict]:
    """EveryExpert from what stacked() gives and what columns() gives for each layer: a generator
    over layers of {projection: EveryExpert}, good for one pass."""
    p = adapter.dropout if dropout else 0.0
    for stack, own in zip(stacks, columns_of_layers):
        updates = {}
        for name, (A, B) in stack.items():
            updates[name] = EveryExpert(A, B, own, adapter.scale, p)
        yield updates


# --- MoLoRA (top-k) -------------------------------------------------------------------------------


class Routed:
    """As PerRow for MoLoRA (top-k): eq. 1's sum with the plain update of eqs. 2 and 3."""

    def __init__(self, update: RoutedLowRank):
        self.update = update  # crosslora.RoutedLowRank

    def __call__(self, projection: nn.Module, x: Tensor) -> Tensor:
        return projection(x) + self.update(x)  # (B, T, D_in) -> (B, T, D_out)


def routed(adapter: CrossLoRA, dtype: torch.dtype, dropout: bool = False) -> list[dict]:
    """A list over layers of {projection: Routed}, for any rows."""
    lora = []
    for updates in adapter([], [], dtype, dropout):
        lora.append({name: Routed(update) for name, update in updates.items()})
    return lora


# --- the experts of a pass ------------------------------------------------------------------------


def for_rows(
    adapter, src_langs, tgt_langs, counts, last, dtype, dropout=False, together=None, stacks=None
) -> Iterable[dict]:
    """The experts of rows that stand one after another: over layers {projection: PerRow,
    EveryExpert or Routed}, a list, or of EveryExpert a generator, good for one pass.
    Gradients reach the experts present and no others.

    counts: how many tokens of each row, and last: how many of them in the last layer.
    together: EveryExpert; default: on a GPU. stacks: stacked(dtype), if that is at hand.
    """
    if adapter.learned:
        return routed(adapter, dtype, dropout)
    routes = [adapter.route(s, t) for s, t in zip(src_langs, tgt_langs, strict=True)]
    a_names, b_names = zip(*routes)
    if together or (together is None and adapter.device.type == "cuda"):
        present = None if stacks else [sorted(set(a_names)), sorted(set(b_names))]
        most = columns(adapter, src_langs, tgt_langs, counts, present)
        at_end = columns(adapter, src_langs, tgt_langs, last, present)
        of_layers = [most] * (len(adapter.layers) - 1) + [at_end]
        return by_token(adapter, stacks or stacked(adapter, dtype, present), of_layers, dropout)
    p, lora = adapter.dropout if dropout else 0.0, []
    most = [runs_of_experts(a_names, counts), runs_of_experts(b_names, counts)]
    at_end = [runs_of_experts(a_names, last), runs_of_experts(b_names, last)]
    for layer in adapter.layers:
        a, b = at_end if layer is adapter.layers[-1] else most
        updates = {}
        for name, bank in layer.items():
            updates[name] = PerRow(bank, a, b, adapter.scale, p, dtype)
        lora.append(updates)
    return lora
