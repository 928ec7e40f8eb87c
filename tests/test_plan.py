"""Passes: where a batch is cut into them, and that no cut changes the gradient."""

import itertools
from types import SimpleNamespace

import pytest

from plan import micro_batches, pass_tokens
from test_train import close, one_process


@pytest.mark.parametrize("limit", [2048, 60, 25, 1])
def test_passes_are_the_evenest_of_the_fewest(limit):
    rows = [SimpleNamespace(ids=[0] * n) for n in [3, 9, 4, 30, 8, 8, 21, 5, 12, 11]]
    runs = micro_batches(rows, SimpleNamespace(micro_batch_tokens=limit))
    assert list(itertools.chain(*runs)) == rows
    every = []  # all cuts of ten rows
    for cuts in itertools.product([False, True], repeat=len(rows) - 1):
        edges = [0, *(i for i, cut in enumerate(cuts, 1) if cut), len(rows)]
        every.append([rows[a:b] for a, b in zip(edges, edges[1:])])
    most = lambda cut: max(sum(len(e.ids) for e in run) for run in cut)
    # A row longer than the limit is a pass of its own.
    fits = [cut for cut in every if all(len(run) == 1 or most([run]) <= limit for run in cut)]
    assert runs in fits and (len(runs), most(runs)) == min((len(cut), most(cut)) for cut in fits)


def test_passes_of_rows():
    rows = [SimpleNamespace(ids=[0] * n) for n in range(1, 8)]
    assert micro_batches(rows, SimpleNamespace(micro_batch_tokens=0, micro_batch_size=3)) == [rows[:3], rows[3:6], rows[6:]]


def test_tokens_of_a_pass():
    """The flag's, even 0; else on a CPU so many that an intermediate tensor has 2^20 elements but 384 at least, on a GPU full rows."""
    asked = lambda tokens: SimpleNamespace(micro_batch_tokens=tokens, micro_batch_size=4, max_length=512)
    width = lambda size: SimpleNamespace(intermediate_size=size)
    assert [pass_tokens(asked(n), width(1408), device) for n in (0, 77) for device in ("cpu", "cuda")] == [0, 0, 77, 77]
    assert [pass_tokens(asked(None), width(size), "cpu") for size in (1408, 4864, 14336)] == [744, 384, 384]
    assert pass_tokens(asked(None), width(14336), "cuda") == 2048


def test_passes_cut_by_tokens_give_the_same_gradient(checkpoint, sentences):
    whole = one_process(checkpoint, sentences, 32)
    for tokens in (100, 400, 10_000):
        close(one_process(checkpoint, sentences, 4, micro_batch_tokens=tokens), whole)
