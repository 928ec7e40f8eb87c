"""The NLL per character against transformers, one sentence at a time."""

import math

import pytest
import torch
from conftest import ROOT, inside, refuses
from transformers import AutoModelForCausalLM

from generate import load_engine
from support.likelihood import by_group, per_character, sentence_nlls
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


def test_per_character_and_its_interval():
    """The mean is over characters, not over sentences, and the interval is that of resampling."""
    pairs = [{"tgt": "a" * n} for n in (1, 9, 20, 30)]
    found = per_character([10.0, 9.0, 40.0, 15.0], pairs)
    assert found["nll"] == 74 / 60 and found["low"] < found["nll"] < found["high"]
    same = per_character([2.0 * len(p["tgt"]) for p in pairs], pairs)
    assert same["low"] == same["nll"] == same["high"] == 2.0
    rows = [{"src_lang": "de", "tgt_lang": t, "tgt": "ab"} for t in ("en", "is", "is")]
    groups = by_group([2.0, 4.0, 8.0], rows)
    assert {name: g["nll"] for name, g in groups.items()} == {
        "de-en": 1.0,
        "english": 1.0,
        "all": 14 / 6,
        "de-is": 3.0,
        "non_english": 3.0,
    }


def test_command(adapter_folder, sentences, tmp_path):
    write_jsonl(tmp_path / "test.jsonl", sentences[:6])
    script = ROOT / "support/likelihood.py", "--test", tmp_path / "test.jsonl"
    where = "--adapter", adapter_folder, "--out", tmp_path / "out"
    refuses(*script, *where, says="no evaluation's folder; evaluate.py comes first")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/scores.json").write_text("{}")
    shown = inside(*script, "--adapter", adapter_folder, "--out", tmp_path / "out")
    found = read_json(tmp_path / "out/likelihood.json")["nll_per_character"]
    assert f"| all | {found['all']['nll']:.3f} |" in shown and math.isfinite(found["all"]["nll"])
    refuses(*script, "--out", tmp_path / "out", says="--adapter or --model is needed")
