"""Passes: where fast/ cuts a batch into them, and that no cut changes the gradient."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from test_train import close, one_process

from fast import training
from fast.training import micro_batches, pass_tokens


def row(length):
    return SimpleNamespace(ids=[0] * length, src_lang="de", tgt_lang="zh")


@pytest.mark.parametrize("limit", [2048, 60, 25, 1])
def test_passes_are_the_evenest_of_the_fewest(limit, monkeypatch):
    monkeypatch.setattr(training, "pass_tokens", lambda model, args: limit)
    rows = [row(n) for n in [3, 9, 4, 30, 8, 8, 21, 5, 12, 11]]
    runs = micro_batches(None, rows, None)
    assert list(itertools.chain(*runs)) == rows
    every = []  # all cuts of ten rows
    for cuts in itertools.product([False, True], repeat=len(rows) - 1):
        edges = [0, *(i for i, cut in enumerate(cuts, 1) if cut), len(rows)]
        every.append([rows[a:b] for a, b in itertools.pairwise(edges)])

    def most(cut):
        return max(sum(len(e.ids) for e in run) for run in cut)

    # A row longer than the limit is a pass of its own.
    fits = [cut for cut in every if all(len(run) == 1 or most([run]) <= limit for run in cut)]
    assert runs in fits and (len(runs), most(runs)) == min((len(cut), most(cut)) for cut in fits)


def test_rows_of_a_direction_share_a_pass():
    args, model = SimpleNamespace(micro_batch_size=4, max_length=9), small_model(1408, "cuda")
    ways = [("de", "zh"), ("en", "is"), ("de", "zh"), ("en", "is")]
    rows = [SimpleNamespace(ids=[0] * 18, src_lang=s, tgt_lang=t) for s, t in ways]
    assert micro_batches(model, rows, args) == [[rows[0], rows[2]], [rows[1], rows[3]]]


def small_model(width, device):
    return SimpleNamespace(
        cfg=SimpleNamespace(intermediate_size=width), device=torch.device(device)
    )


def test_tokens_of_a_pass():
    """On a CPU so many that an intermediate tensor has 2^20 elements but 384 at least, on a GPU
    full rows."""
    args = SimpleNamespace(micro_batch_size=4, max_length=512)
    widths = (1408, 4864, 14336)
    assert [pass_tokens(small_model(w, "cpu"), args) for w in widths] == [744, 384, 384]
    assert pass_tokens(small_model(14336, "cuda"), args) == 2048


def test_passes_cut_by_tokens_give_the_same_gradient(checkpoint, sentences, monkeypatch):
    whole = one_process(checkpoint, sentences, 32)
    for tokens in (100, 400, 10_000):
        monkeypatch.setattr(training, "pass_tokens", lambda model, args, tokens=tokens: tokens)
        close(one_process(checkpoint, sentences, 4, "fast"), whole)
