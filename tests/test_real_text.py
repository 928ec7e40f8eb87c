"""The commands on real human translations in the published layouts; quality is not the point, that
nothing breaks is."""

import pytest
import torch
from conftest import ROOT, TORCHRUN, inside, read_rows, run
from pretrain import config_of, random_model, save_tokenizer, train_tokenizer

from data import LANGUAGES
from support.export import save_backbone
from support.runs import read_json, write_jsonl

pytestmark = pytest.mark.once

HARD = [
    "„So etwas“, sagte er – ‚nie‘.",
    "Þetta er\u00a0ágætt\u2028ekki satt?",
    "他说：“好。”\u3000<|eot_id|>",
    "x" * 3000,
    "A",
]


def test_real_text_through_the_whole_chain(shared, tmp_path):
    t = tmp_path
    where = "--data", shared / "data", "--out", t / "data"
    inside(
        ROOT / "data.py", *where, *["--train-pairs", "200", "--dev-pairs", "3", "--test-pairs", "3"]
    )
    counts = read_json(t / "data/manifest.json")["files"]
    assert counts["stage1.train.jsonl"]["pairs"] == 10 * (200 + 997)
    assert counts["stage2.flores.jsonl"]["pairs"] == 20 * 997
    train_rows = read_rows(t / "data/stage1.train.jsonl")
    assert {row["src_lang"] for row in train_rows} == set(LANGUAGES)
    tokenizer = train_tokenizer([row["src"] for row in train_rows[::4]], 3000)
    (t / "backbone").mkdir()
    save_tokenizer(tokenizer, t / "backbone")
    config = config_of(tokenizer, 32, 2)
    torch.manual_seed(0)
    save_backbone(random_model(config, t / "backbone"), config, t / "backbone")

    source, few = read_rows(t / "data/pivot.source.jsonl"), []
    for lang in list(LANGUAGES)[1:]:
        few += [row for row in source if row["src_lang"] == lang][:6]
    few += [{**few[0], "src": text} for text in HARD]
    write_jsonl(t / "data/pivot.source.jsonl", few)
    test_rows = read_rows(t / "data/test.jsonl")
    test_rows += [{**test_rows[0], "src": text} for text in HARD]
    write_jsonl(t / "data/test.jsonl", test_rows)

    # The counts are checked; a tenth of the text will do from here.
    for name in ("stage1.train", "stage2.flores"):
        write_jsonl(t / f"data/{name}.jsonl", read_rows(t / f"data/{name}.jsonl")[::10])
    train = "--model", t / "backbone", "--data", t / "data", "--max-steps", 3, "--max-length", 128
    decode = "--max-new-tokens", 8, "--batch-size", 32
    run(*TORCHRUN, ROOT / "train.py", "--stage", 1, *train, "--out", t / "stage1")
    # Long sentences are counted.
    assert read_json(t / "stage1/summary.json")["train_dropped"] > 0
    where = "--adapter", t / "stage1/adapter", "--data", t / "data", "--out", t / "pseudo"
    inside(ROOT / "pivot.py", *where, "--pairs", 5, *decode)
    report = read_json(t / "pseudo/report.json")["de-zh"]
    assert report["generated"] == 6 + len(HARD) and "source ran out" in report["ended"]
    # A backbone that knows nothing leaves no pseudo pair; human ones in the same format take their
    # place.
    pairs = read_rows(t / "data/stage2.flores.jsonl")[::5]
    pseudo = [{**row, "origin": "pseudo", "pivot": "-"} for row in pairs]
    write_jsonl(t / "pseudo/pseudo.train.jsonl", pseudo)
    inside(ROOT / "train.py", "--stage", 2, *train, "--pseudo", t / "pseudo", "--out", t / "stage2")
    where = (
        "--adapter",
        t / "stage2/adapter",
        "--test",
        t / "data/test.jsonl",
        "--out",
        t / "scores",
    )
    run(*TORCHRUN, ROOT / "evaluate.py", "--all-directions", *where, *decode)
    directions = read_json(t / "scores/scores.json")["directions"].values()
    assert len(directions) == 30 and all(s["off_target_ref"] <= 34 for s in directions)
    assert sum(s["sentences"] for s in directions) == 30 * 3 + len(HARD)
