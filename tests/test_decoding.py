"""Rows decoded together get what each gets alone, as they take over places, share what is read, step from a record."""

import itertools

import pytest
import torch

import generate
import model as backbone
from conftest import CalledAnew, randomise
from crosslora import CrossLoRA
from data import LANGUAGES
from generate import Row, decode


def test_waiting_rows_take_the_places_of_ended_ones(engine, monkeypatch):
    """Rows of very different prompts and limits, eight together: each gets what it gets alone, no step is wider, and no expert is
    copied for nothing."""
    torch.manual_seed(3)
    ways = (("de", "zh"), ("en", "is"), ("ru", "en"))
    rows = lambda: [Row(i, list(range(5, 6 + 7 * (i % 5))), *ways[i % 3], 1 + (5 * i) % 23) for i in range(40)]
    call = lambda rows, batch_size: decode(engine.model, engine.adapter, engine.dtype, iter(rows), (), batch_size)
    alone = [next(call([row], 1)).out for row in rows()]
    assert [len(out) for out in alone] == [row.room for row in rows()]
    steps, befores, forward, grouped = [], [], type(engine.model).forward, CrossLoRA.grouped

    def watched_forward(self, tokens, lora, rows, *args, **more):
        if rows.places is None:
            steps.append(tokens.numel())
        return forward(self, tokens, lora, rows, *args, **more)

    def watched_grouped(self, src, tgt, dtype, before):
        befores.append(before)
        return grouped(self, src, tgt, dtype, before)

    monkeypatch.setattr(type(engine.model), "forward", watched_forward)
    monkeypatch.setattr(CrossLoRA, "grouped", watched_grouped)
    done = {row.key: row.out for row in call(rows(), 8)}
    assert [done[i] for i in range(40)] == alone
    assert befores.count(None) == 1 and len(befores) > 5  # later ones start from those before
    assert max(steps) == 8 and len(steps) <= 1.1 * sum(row.room for row in rows()) / 8  # hardly a place stands empty


@pytest.mark.parametrize("variant", ["crosslora", "lora", "molora-topk", None])
def test_a_gpus_way_of_stepping_gives_the_same(checkpoint, variant, monkeypatch):
    """All experts at hand, steps from a record, made anew whenever the cache is another: as rows grow, as half of the places are
    given back."""
    lm = backbone.load(checkpoint)
    adapter = None if variant is None else randomise(CrossLoRA(lm.cfg, list(LANGUAGES), rank=4, alpha=8, variant=variant))
    ways = (("de", "zh"), ("en", "is"), ("ru", "en"))
    make = lambda: iter([Row(i, list(range(5, 6 + 7 * (i % 5))), *ways[i % 3], 1 + (11 * i) % 163) for i in range(160)])
    wanted = {row.key: row.out for row in decode(lm, adapter, torch.float32, make(), (), 8)}
    monkeypatch.setattr(generate, "Recorded", CalledAnew)
    monkeypatch.setattr(CalledAnew, "made", 0)
    shapes, forward = [], type(lm).forward  # of the cache, at every step

    def watched(self, tokens, lora, rows, cache, **more):
        if rows.places is None:
            shapes.append(tuple(cache.k[0].shape))
        return forward(self, tokens, lora, rows, cache, **more)

    monkeypatch.setattr(type(lm), "forward", watched)
    assert {row.key: row.out for row in decode(lm, adapter, torch.float32, make(), (), 140, record=True)} == wanted and len(wanted) == 160
    different = [shape for shape, _ in itertools.groupby(shapes)]
    places, slots, *_ = zip(*different)
    assert CalledAnew.made == len(different) and len(set(places)) >= 3 and len(set(slots)) >= 2


def test_places_that_are_given_back_leave_other_rows_where_they_are(engine, monkeypatch):
    """Rows of thirty directions, none waiting: of the places that remain as many change as were free among them."""
    directions = [(s, t) for s in LANGUAGES for t in LANGUAGES if s != t]
    rows = [Row(i, [5 + i, 6, 7], *way, 1 + (7 * i) % 30) for i, way in enumerate(directions)]
    seen, grouped = [], CrossLoRA.grouped

    def watched(self, src, tgt, *rest):
        seen.append(list(zip(src, tgt)))
        return grouped(self, src, tgt, *rest)

    monkeypatch.setattr(CrossLoRA, "grouped", watched)
    ends = {(row.src_lang, row.tgt_lang): row.room for row in decode(engine.model, engine.adapter, engine.dtype, iter(rows), (), 30)}
    assert len(ends) == 30 and len(seen) > 5
    for before, after in zip(seen, seen[1:]):
        assert set(after) < set(before) and min(ends[way] for way in after) > max(ends[way] for way in set(before) - set(after))
        gone = [way not in after for way in before[: len(after)]]
        assert [a != b for a, b in zip(before, after)] == gone


def test_what_prompts_of_a_direction_have_in_common_is_read_once(engine, monkeypatch):
    """One of each direction is read whole, the first tokens of the others are copied from one that is there: each row gets what it
    gets alone."""
    torch.manual_seed(4)
    common = {way: torch.randint(0, 200, (12,)).tolist() for way in (("de", "zh"), ("en", "is"), ("zh", "de"))}
    prompts = [(way, common[way] + torch.randint(0, 200, (i % 4,)).tolist()) for i in range(10) for way in common]
    rows = lambda: [Row(i, prompt, *way, 1 + i % 7) for i, (way, prompt) in enumerate(prompts)]
    call = lambda rows, batch_size: decode(engine.model, engine.adapter, engine.dtype, iter(rows), (), batch_size)
    alone = [next(call([row], 1)).out for row in rows()]
    read, forward = [], type(engine.model).forward

    def watched(self, tokens, lora, rows, *args, **more):
        if rows.places is not None:
            read.extend(rows.lengths)
        return forward(self, tokens, lora, rows, *args, **more)

    monkeypatch.setattr(type(engine.model), "forward", watched)
    done = {row.key: row.out for row in call(rows(), 9)}
    assert [done[i] for i in range(30)] == alone
    assert len(read) == 30 and sum(n >= 12 for n in read) == 3 and sorted(read)[-4] <= 1 + 3
    # Twenty places: the row at 5 ends first, those at 0 and 1 after it, so that a place is filled only then, and steps have
    # written over what stood at 5, the only one of its direction.
    rooms = {0: 6, 1: 6, 5: 2}
    rows = lambda: [Row(i, [*range(40, 52), i], *(("de", "zh") if i in (5, 20) else ("en", "is")), rooms.get(i, 12)) for i in range(21)]
    done = {row.key: row.out for row in call(rows(), 20)}
    assert done == {row.key: next(call([row], 1)).out for row in rows()}
