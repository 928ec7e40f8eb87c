"""The commands on real human translations in the published layouts; quality is not the point, that nothing breaks is."""

import json

import torch

import model as backbone
from conftest import ROOT, TORCHRUN, inside, read_rows, run
from data import LANGUAGES
from files import write_jsonl
from pretrain import config_of, random_model, train_tokenizer

HARD = ["„So etwas“, sagte er – ‚nie‘.", "Þetta er\u00a0ágætt\u2028ekki satt?", "他说：“好。”\u3000<|eot_id|>", "x" * 3000, "A"]


def test_real_text_through_the_whole_chain(shared, tmp_path):
    t = tmp_path
    inside(ROOT / "data.py", "--data", shared / "data", "--out", t / "data", "--train-pairs", 200, "--dev-pairs", 3, "--test-pairs", 3)
    counts = json.loads((t / "data/manifest.json").read_text())["files"]
    assert counts["stage1.train.jsonl"]["pairs"] == 10 * (200 + 997) and counts["stage2.flores.jsonl"]["pairs"] == 20 * 997
    train_rows = read_rows(t / "data/stage1.train.jsonl")
    assert {r["src_lang"] for r in train_rows} == set(LANGUAGES)
    tokenizer = train_tokenizer([r["src"] for r in train_rows[::4]], 3000)
    (t / "backbone").mkdir()
    tokenizer.save(str(t / "backbone/tokenizer.json"))
    config = config_of(tokenizer, 32, 2)
    torch.manual_seed(0)
    backbone.save(random_model(config, t / "backbone"), config, t / "backbone")

    source = read_rows(t / "data/pivot.source.jsonl")
    few = [r for lang in list(LANGUAGES)[1:] for r in [r for r in source if r["src_lang"] == lang][:6]]
    few += [{**few[0], "src": text} for text in HARD]
    write_jsonl(t / "data/pivot.source.jsonl", few)
    test_rows = read_rows(t / "data/test.jsonl")
    write_jsonl(t / "data/test.jsonl", test_rows + [{**test_rows[0], "src": text} for text in HARD])

    for name in ("stage1.train", "stage2.flores"):  # the counts are checked; a tenth of the text will do from here
        write_jsonl(t / f"data/{name}.jsonl", read_rows(t / f"data/{name}.jsonl")[::10])
    train = ("--model", t / "backbone", "--data", t / "data", "--max-steps", 3, "--max-length", 128)
    decode = ("--max-new-tokens", 8, "--batch-size", 32)
    run(*TORCHRUN, ROOT / "train.py", "--stage", 1, *train, "--out", t / "stage1")
    assert json.loads((t / "stage1/summary.json").read_text())["train_dropped"] > 0  # long sentences are counted
    inside(ROOT / "pivot.py", "--adapter", t / "stage1/adapter", "--data", t / "data", "--out", t / "pseudo", "--pairs", 5, *decode)
    report = json.loads((t / "pseudo/report.json").read_text())
    assert report["de-zh"]["generated"] == 6 + len(HARD) and "source ran out" in report["de-zh"]["ended"]
    # A backbone that knows nothing leaves no pseudo pair; human ones in the same format take their place.
    pairs = read_rows(t / "data/stage2.flores.jsonl")[::5]
    write_jsonl(t / "pseudo/pseudo.train.jsonl", [{**r, "origin": "pseudo", "pivot": "-"} for r in pairs])
    inside(ROOT / "train.py", "--stage", 2, *train, "--pseudo", t / "pseudo", "--out", t / "stage2")
    run(*TORCHRUN, ROOT / "evaluate.py", "--all-directions", "--adapter", t / "stage2/adapter", "--test", t / "data/test.jsonl",
        "--out", t / "scores", *decode)
    scores = json.loads((t / "scores/scores.json").read_text())
    assert len(scores["directions"]) == 30 and all(s["off_target_ref"] <= 34 for s in scores["directions"].values())
    assert sum(s["sentences"] for s in scores["directions"].values()) == 30 * 3 + len(HARD)
