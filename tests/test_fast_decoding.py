"""Rows decoded together by fast/ get what each gets alone, as they take over places, share what is
read, step from a record."""

import itertools

import pytest
import torch
from conftest import CalledAnew, randomise, translate_batch

import fast
import model as backbone
from crosslora import CrossLoRA
from data import LANGUAGES
from fast import decode, decoding, experts
from generate import Row, load_engine

WAYS = (("de", "zh"), ("en", "is"), ("ru", "en"))


@pytest.fixture
def engine(adapter_folder):
    return load_engine(None, adapter_folder, device="cpu", fast=fast)


def outputs(engine, rows, batch_size):
    """{key: new ids} of all rows."""
    decoded = decode(engine.model, engine.adapter, rows, (), batch_size)
    return {key: ids for key, ids, _ in decoded}


def alone(engine, rows):
    """The same, one row at a time."""
    return {row.key: outputs(engine, [row], 1)[row.key] for row in rows}


def watch_passes(monkeypatch, seen):
    """seen(tokens, rows, cache) at every pass of fast/."""
    forward = decoding.hidden_states

    def watched(model, tokens, lora, rows, cache, wanted=None):
        seen(tokens, rows, cache)
        return forward(model, tokens, lora, rows, cache, wanted)

    monkeypatch.setattr(decoding, "hidden_states", watched)


def test_waiting_rows_take_the_places_of_ended_ones(engine, monkeypatch):
    """Rows of very different prompts and limits, eight together: each gets what it gets alone, no
    step is wider, and no expert is copied for nothing."""
    rows = []
    for i in range(40):
        rows.append(Row(i, list(range(5, 6 + 7 * (i % 5))), *WAYS[i % 3], 1 + (5 * i) % 23))
    expected = alone(engine, rows)
    assert [len(expected[row.key]) for row in rows] == [row.room for row in rows]
    steps, befores, grouped = [], [], experts.grouped
    watch_passes(
        monkeypatch,
        lambda tokens, rows, cache: rows.places is None and steps.append(tokens.numel()),
    )

    def watched_grouped(adapter, src, tgt, dtype, before):
        befores.append(before)
        return grouped(adapter, src, tgt, dtype, before)

    monkeypatch.setattr(experts, "grouped", watched_grouped)
    assert outputs(engine, rows, 8) == expected
    assert befores.count(None) == 1 and len(befores) > 5  # later ones start from those before
    # Hardly a place stands empty.
    assert max(steps) == 8 and len(steps) <= 1.1 * sum(row.room for row in rows) / 8


@pytest.mark.parametrize("slots, prompts", [(1, 1), (400, 70), (400, 2**10), (2**17, 50)])
def test_memory_bounds_change_no_result(eager_folder, sentences, slots, prompts, monkeypatch):
    """A cache for a few rows only, prompts read a few at a time: the same translations, in whatever
    order they end."""
    engine = load_engine(None, eager_folder, device="cpu", fast=fast)
    expected = translate_batch(engine, sentences[:24], 12)
    monkeypatch.setattr(decoding, "MAX_CACHE_SLOTS", {"cpu": slots})
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", {"cpu": prompts})
    sizes, passes = [], []

    def watched(tokens, rows, cache):
        sizes.append(len(cache.k[0]))
        passes.append(len(rows.lengths) if rows.places is not None else 0)

    watch_passes(monkeypatch, watched)
    assert translate_batch(engine, sentences[:24], 12) == expected
    # Prompts alone have 30 tokens and more.
    assert max(sizes) == 24 if slots == 2**17 else max(sizes) * 30 < max(slots, 31)
    assert max(passes) <= prompts // 30 + 1


@pytest.mark.parametrize("variant", ["crosslora", "lora", "molora-topk", None])
def test_a_gpus_way_of_stepping_gives_the_same(checkpoint, variant, monkeypatch):
    """All experts at hand, steps from a record, made anew whenever the cache is another: as rows
    grow, as half of the places are given back."""
    lm, adapter = backbone.load(checkpoint), None
    if variant is not None:
        settings = {"rank": 4, "alpha": 8, "variant": variant}
        adapter = randomise(CrossLoRA(lm.cfg, list(LANGUAGES), **settings))
    rows = []
    for i in range(160):
        rows.append(Row(i, list(range(5, 6 + 7 * (i % 5))), *WAYS[i % 3], 1 + (11 * i) % 163))
    expected = sorted(decode(lm, adapter, rows, (), 8))
    monkeypatch.setattr(decoding, "Recorded", CalledAnew)
    monkeypatch.setattr(CalledAnew, "made", 0)
    shapes = []  # of the cache, at every step

    def watched(tokens, rows, cache):
        if rows.places is None:
            shapes.append(tuple(cache.k[0].shape))

    watch_passes(monkeypatch, watched)
    assert sorted(decode(lm, adapter, rows, (), 140, record=True)) == expected
    different = [shape for shape, _ in itertools.groupby(shapes)]
    places, slots, *_ = zip(*different)
    assert len(expected) == 160 and CalledAnew.made == len(different)
    assert len(set(places)) >= 3 and len(set(slots)) >= 2


def test_places_that_are_given_back_leave_other_rows_where_they_are(engine, monkeypatch):
    """Rows of thirty directions, none waiting: of the places that remain as many change as were
    free among them."""
    directions = [(s, t) for s in LANGUAGES for t in LANGUAGES if s != t]
    rows = [Row(i, [5 + i, 6, 7], *way, 1 + (7 * i) % 30) for i, way in enumerate(directions)]
    seen, grouped = [], experts.grouped

    def watched(adapter, src, tgt, *rest):
        seen.append(list(zip(src, tgt)))
        return grouped(adapter, src, tgt, *rest)

    monkeypatch.setattr(experts, "grouped", watched)
    assert len(outputs(engine, rows, 30)) == 30 and len(seen) > 5
    ends = {(row.src_lang, row.tgt_lang): row.room for row in rows}
    for before, after in itertools.pairwise(seen):
        ended = set(before) - set(after)
        assert set(after) < set(before)
        assert min(ends[way] for way in after) > max(ends[way] for way in ended)
        gone = [way not in after for way in before[: len(after)]]
        assert [a != b for a, b in zip(before, after)] == gone


def test_what_prompts_of_a_direction_have_in_common_is_read_once(engine, monkeypatch):
    """One of each direction is read in full, the prefix that the others share with it is copied:
    each row gets what it gets alone."""
    torch.manual_seed(4)
    ways, rows = (("de", "zh"), ("en", "is"), ("zh", "de")), []
    common = {way: torch.randint(0, 200, (12,)).tolist() for way in ways}
    for i in range(10):
        for way in ways:
            prompt = common[way] + torch.randint(0, 200, (i % 4,)).tolist()
            rows.append(Row(len(rows), prompt, *way, 1 + len(rows) % 7))
    expected, read = alone(engine, rows), []

    def watched(tokens, rows, cache):
        if rows.places is not None:
            read.extend(rows.lengths)

    with monkeypatch.context() as patch:
        watch_passes(patch, watched)
        assert outputs(engine, rows, 9) == expected
    assert len(read) == 30 and sum(n >= 12 for n in read) == 3 and sorted(read)[-4] <= 1 + 3
    # Twenty places: the row at 5 ends first, those at 0 and 1 after it, so that a place is filled
    # only then, and steps have written over what stood at 5, the only one of its direction.
    rooms, rows = {0: 6, 1: 6, 5: 2}, []
    for i in range(21):
        way = ("de", "zh") if i in (5, 20) else ("en", "is")
        rows.append(Row(i, [*range(40, 52), i], *way, rooms.get(i, 12)))
    assert outputs(engine, rows, 20) == alone(engine, rows)
