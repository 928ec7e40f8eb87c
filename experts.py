"""How the experts of eq. 4 meet the tokens of a batch, in three ways that give the same, and MoLoRA's of eqs. 2 and 3.

Each update is called with a frozen projection (a model.Linear) and its input, and gives eq. 1's sum, W_0 x + B A x. N tokens of B batch
rows of T, R rank, n experts of A and m of B present, or n of a learned router. A is (R, D_in), B (D_out, R), in memory (R, D_out).
"""

import itertools

import torch
import torch.nn.functional as F

from kernels import INTEL, kept, product


def runs(names, counts):
    """(names, numbers of tokens) of rows of `counts` tokens one after another, neighbours of one name taken together."""
    found = [(name, sum(count for _, count in run)) for name, run in itertools.groupby(zip(names, counts), key=lambda row: row[0])]
    return tuple(zip(*found))


class Adapted(torch.autograd.Function):
    """Eqs. 1 and 4 for N tokens of rows that stand one after another: W_0 x + bias + scale * B_tgt A_src (x * mask), with derivatives by x
    and the experts. By runs of tokens that share an expert, so that none is copied."""

    @staticmethod
    def forward(ctx, x, weight, bias, mask, scale, a_sizes, b_sizes, *experts):
        """x (N, D_in); weight (D_out, D_in), plain or Packed; mask (N, D_in) int8 or None; a_sizes, b_sizes: numbers of
        tokens, N in all, that share an A (R, D_in) or a B (D_out, R); experts: these A's, then these B's."""
        A, B = experts[: len(a_sizes)], experts[len(a_sizes) :]
        y = product(x, weight, bias)  # eq. 1, W_0 x: (N, D_in) x (D_in, D_out) -> (N, D_out)
        h = x.new_empty(len(x), A[0].shape[0])  # (N, R)
        dropped = x if mask is None else mask.to(x.dtype).mul_(x)  # the product with int8 itself would make two tensors
        for x_run, A_run, h_run in zip(dropped.split(a_sizes), A, h.split(a_sizes)):
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
            by_B.append((h_run.t() @ grad_run).t())  # (R, n) x (n, D_out) -> (D_out, R), as B lies; (D_out, n) x (n, R) takes twice as long
        by_h *= scale
        # (N, D_out) x (D_out, D_in) -> (N, D_in); nothing is wanted below the first adapter
        by_x = product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        m = None if mask is None else mask.to(x.dtype)
        if by_x is not None:
            by_dropped = torch.zeros_like(x)
            for by_h_run, A_run, by_run in zip(by_h.split(a_sizes), A, by_dropped.split(a_sizes)):
                # (n, R) x (R, D_in), added to zeros, since MKL takes up to five times as long where it does not add
                by_run.addmm_(by_h_run, A_run)
            by_x.add_(by_dropped) if m is None else by_x.addcmul_(by_dropped, m)
        dropped = x if m is None else m.mul_(x)
        for x_run, by_h_run in zip(dropped.split(a_sizes), by_h.split(a_sizes)):
            by_A.append(by_h_run.t() @ x_run)  # (R, n) x (n, D_in)
        return by_x, *[None] * 6, *by_A, *by_B


class PerRow:
    """One projection with the update, each row on its own experts: x (..., D_in) -> (..., D_out), the rows one after another.
    a, b: runs() of experts of A and B; in place of the rows' tokens they may count rows of equal length."""

    def __init__(self, bank, a, b, scale, dropout, dtype):
        self.bank, self.a, self.b, self.scale, self.dropout, self.dtype = bank, a, b, scale, dropout, dtype

    def __call__(self, projection, x):
        (a, a_counts), (b, b_counts) = self.a, self.b
        experts = [self.bank.lora_A[name].to(self.dtype) for name in a] + [self.bank.lora_B[name].to(self.dtype) for name in b]
        flat = x.flatten(0, -2)  # (..., D_in) -> (N, D_in)
        sizes = ([count * len(flat) // sum(counts) for count in counts] for counts in (a_counts, b_counts))
        mask = kept(flat, self.dropout) if self.dropout > 0 else None
        y = Adapted.apply(flat, projection.weight, projection.bias, mask, self.scale / (1 - self.dropout), *sizes, *experts)
        return y.view(*x.shape[:-1], -1)  # (N, D_out) -> (..., D_out)


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
    row_at = [row for _, rows in dealt for row in rows + rows[:1] * (size - len(rows))]
    place_of = {row: i for i, row in enumerate(row_at)}  # of its places a repeated row gets the last
    return tuple(name for name, _ in dealt), row_at, [place_of[row] for row in range(len(names))]


def gather(expert, names, had, held, dtype):
    """expert(name), (M, N), of each of `names`, one a block, in the first places of `held` or, where it is too small, of new memory:
    (blocks or more, M, N). had: the experts that lie in `held`. One at its place already is not copied: that costs many steps' reading."""
    if held is None or len(held) < len(names):
        one = expert(names[0])
        had, held = (), one.new_empty(len(names) * 5 // 4, *one.shape, dtype=dtype)  # the next rows may need some more
    for i, name in enumerate(names):
        if had[i : i + 1] != (name,):
            held[i] = expert(name).detach()
    return held


class LowRank:
    """As PerRow for decoding, where a token is a row, x (1, N, D_in) -> (1, N, D_out): rows of one expert are put together in blocks of s,
    so that an expert is read once a block and not once a row.

    A (a, R, D_in), B (b, R, D_out): a block's expert. moves: three row indices (None: as they stand), from rows into A's blocks,
    across to B's, and back; see blocks().
    """

    def __init__(self, bank, names, moves, scale, dtype, before):
        """names: the experts of A's and of B's blocks. before: the LowRank of other rows, whose memory this one takes over, or None."""
        had, held = (before.names, before.held) if before else (((), ()), (None, None))
        self.names, self.moves, self.scale = names, moves, scale
        self.held = [gather(lambda name: bank.lora_A[name], names[0], had[0], held[0], dtype),
                     gather(lambda name: bank.lora_B[name].t(), names[1], had[1], held[1], dtype)]
        self.A, self.B = (memory[: len(some)] for memory, some in zip(self.held, names))

    def __call__(self, projection, x):
        move = lambda x, rows: x if rows is None else x.index_select(0, rows)
        into, across, back = self.moves
        h = move(x[0], into).view(len(self.A), -1, x.shape[-1])  # (N, D_in) -> (a*s, D_in) -> (a, s, D_in)
        # A_src x: (a, s, D_in) x (a, D_in, R) -> (a, s, R); for s = 1 A x takes twice as long on Intel's, half to four fifths on AMD's
        h = torch.bmm(h, self.A.mT) if h.shape[1] > 1 or INTEL else torch.bmm(self.A, h.mT).mT
        h = move(h.flatten(0, 1), across).view(len(self.B), -1, h.shape[-1])  # (a*s, R) -> (b*s, R) -> (b, s, R), s now of B's blocks
        y = projection(x)  # (1, N, D_out)
        if back is not None:  # eq. 4: (b, s, R) x (b, R, D_out) -> (b*s, D_out) -> (N, D_out)
            return y.add_(torch.bmm(h * self.scale, self.B).flatten(0, 1).index_select(0, back))
        in_blocks = y.view(len(self.B), -1, y.shape[-1])  # (1, N, D_out) -> (b, s, D_out)
        if len(self.B) == 1:  # bmm would take one thread
            in_blocks[0].addmm_(h[0], self.B[0], alpha=self.scale)  # eq. 4: (N, R) x (R, D_out)
        else:
            in_blocks.baddbmm_(h, self.B, alpha=self.scale)  # eq. 4: (b, s, R) x (b, R, D_out)
        return y


class StackedTransposes(torch.autograd.Function):
    """B's (D_out, R) as their transposes one below the other, (m*R, D_out): one operation to autograd, where each transpose would be
    one of its own, thousands a step."""

    @staticmethod
    def forward(ctx, *B):
        return torch.cat([expert.t() for expert in B])

    @staticmethod
    def backward(ctx, grad):
        # (m*R, D_out) -> (R, D_out) each -> (D_out, R), as B lies: no copies
        return tuple(part.t() for part in grad.chunk(len(ctx.needs_input_grad)))


class EveryExpert:
    """As PerRow on a GPU, for tokens of any rows: all experts present meet all tokens, and each token keeps its own. A GPU reads x as
    fast for a hundred columns as for sixteen, and a launch for every expert would cost more.

    A (n*R + R, D_in): all A's and an expert of zeros, B (m*R, D_out): all B's transposes, one below the other. columns (N, m*R): for
    every row of B the column of A's output to take: for the token's own B_tgt its A_src x, for the others zeros. With R = 1, A's of de
    and en and B's of en and zh, a token of de -> zh has [2, 0]: zeros for B_en, A_de x for B_zh.
    """

    def __init__(self, A, B, columns, scale, dropout):
        self.A, self.B, self.columns, self.scale, self.dropout = A, B, columns, scale, dropout

    def __call__(self, projection, x):
        flat = x.flatten(0, -2)  # (..., D_in) -> (N, D_in)
        h = F.linear(F.dropout(flat, self.dropout, training=self.dropout > 0), self.A)  # (N, D_in) x (D_in, n*R + R) -> (N, n*R + R)
        y = projection(flat).addmm_(h.gather(1, self.columns), self.B, alpha=self.scale)  # eqs. 1, 4: (N, m*R) x (m*R, D_out)
        return y.view(*x.shape[:-1], -1)  # (N, D_out) -> (..., D_out)


class RoutedLowRank:
    """As PerRow for MoLoRA (top-k): every token picks its experts, x (B, T, D_in) -> (B, T, D_out), the same for all rows."""

    def __init__(self, A, B, router, top_k, scale, dropout):
        self.A, self.B, self.router = A, B, router  # (n, R, D_in), (n*R, D_out), fp32 (n, D_in)
        self.top_k, self.scale, self.dropout, self.gates = top_k, scale, dropout, None

    def __call__(self, projection, x):
        scores = F.linear(x.float(), self.router).softmax(dim=-1)  # eq. 2: (B, T, D_in) -> (B, T, n)
        weights, chosen = scores.topk(self.top_k, dim=-1)  # (B, T, k)
        self.gates = torch.zeros_like(scores).scatter(-1, chosen, weights)  # s_i of the chosen, 0 for the others
        h = F.dropout(x, self.dropout, training=self.dropout > 0)
        h = F.linear(h, self.A.flatten(0, 1)).unflatten(-1, self.A.shape[:2])  # (B, T, n*R) -> (B, T, n, R)
        h = (h * self.gates.to(x.dtype)[..., None] * self.scale).flatten(2)  # (B, T, n, R) -> (B, T, n*R)
        return projection(x) + h @ self.B  # eq. 3: sum over experts: (B, T, n*R) x (n*R, D_out) -> (B, T, D_out)
