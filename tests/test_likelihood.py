"""The NLL per character against transformers, one sentence at a time."""

import math

import pytest
import torch
from conftest import ROOT, inside, refuses
from transformers import AutoModelForCausalLM

from generate import load_engine
from support.likelihood import per_character, sentence_draws, sentence_nlls
from support.runs import read_json, write_jsonl

pytestmark = pytest.mark.once


def test_nll_of_references_equals_transformers(checkpoint, sentences):
    """Without an adapter, in mixed batches, padded or not."""
    engine = load_engine(checkpoint, None, device="cpu")
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    expected = []
    for row in sentences[:9]:
        prompt = engine.tokenizer.prompt(row["src_lang"], row["tgt_lang"], row["src"])
        target = engine.tokenizer.ids(row["tgt"]) + [engine.tokenizer.stop_ids[0]]
        with torch.no_grad():
            logits = theirs(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
        log_p = torch.log_softmax(logits, -1)
        expected.append(-sum(log_p[i, token].item() for i, token in enumerate(target)))
    for size in (1, 4):
        got = sentence_nlls(engine, sentences[:9], size)
        assert got == pytest.approx(expected, rel=1e-4)


def test_the_adapter_counts(adapter_folder, checkpoint, sentences):
    with_adapter = sentence_nlls(load_engine(None, adapter_folder, device="cpu"), sentences[:4], 4)
    without = sentence_nlls(load_engine(checkpoint, None, device="cpu"), sentences[:4], 4)
    assert all(abs(a - b) > 1e-3 for a, b in zip(with_adapter, without))


def test_per_character_is_over_characters_and_resamples_sentences():
    """The mean is over characters, not over sentences; a resample takes the same sentences in every
    direction, so that gains in one that are losses in the other cancel in each."""
    pairs = []
    for tgt_lang, lengths in (("en", (1, 2, 5)), ("zh", (2, 2, 2))):
        pairs += [{"src_lang": "de", "tgt_lang": tgt_lang, "tgt": "a" * n} for n in lengths]
    draws = sentence_draws(pairs, 100)
    assert draws.shape == (100, 3)
    found = per_character([1.0, 2.0, 9.0, -1.0, -2.0, -9.0], pairs, draws)
    assert set(found) == {"de-en", "de-zh", "english", "non_english", "all"}
    assert found["all"] == {"mean": 0.0, "interval": [0.0, 0.0]}
    assert found["english"] == {"mean": 12 / 8, "interval": [1.0, 9 / 5]}
    assert found["de-en"] == found["english"] and found["non_english"]["mean"] == -2.0


def test_command(adapter_folder, sentences, tmp_path):
    write_jsonl(tmp_path / "test.jsonl", sentences[:6])
    script = ROOT / "support/likelihood.py", "--test", tmp_path / "test.jsonl"
    where = "--adapter", adapter_folder, "--out", tmp_path / "out"
    refuses(*script, *where, says="no evaluation's folder; evaluate.py comes first")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/scores.json").write_text("{}")
    shown = inside(*script, "--adapter", adapter_folder, "--out", tmp_path / "out")
    found = read_json(tmp_path / "out/likelihood.json")["nll_per_character"]
    assert f"| all | {found['all']['mean']:.3f} |" in shown and math.isfinite(found["all"]["mean"])
    made = (tmp_path / "out/likelihood.json").stat().st_mtime_ns
    assert inside(*script, *where) == shown  # what is written already is printed
    assert (tmp_path / "out/likelihood.json").stat().st_mtime_ns == made
    write_jsonl(tmp_path / "test.jsonl", sentences[6:9])
    assert inside(*script, *where) != shown
    write_jsonl(tmp_path / "test.jsonl", [])
    refuses(*script, *where, says="test.jsonl: no sentence pairs in it")
    refuses(*script, "--out", tmp_path / "out", says="--adapter or --model is needed")
