"""The commands on real human translations in the published layouts: quality is not the point, that
nothing breaks is. And the page that reports a run on them."""

import human_text
import pytest
import real_text
import torch
from conftest import ROOT, TORCHRUN, inside, read_rows, refuses, run
from pretrain import config_of, random_model, save_tokenizer, train_tokenizer

from data import LANGUAGES
from support.corpora import NOISE
from support.export import save_backbone
from support.report import better_and_worse, by_direction, write_scores
from support.runs import file_sha256, read_json, write_json, write_jsonl
from support.scores import language_identifier, score

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


EN = ["The dog sees the cat in the garden.", "She buys bread today.", "We go home."]
ZH = ["狗在花园里看见猫。", "她今天买面包。", "我们回家。"]
INTO_ENGLISH = [("The small house stands by the river.", "kept"), ("", "empty")]
FROM_ENGLISH = [  # and the rule that it breaks, in a direction that wants two pairs
    ("Маленький дом стоит у реки.", "kept"),
    ("Маленький дом стоит у реки.", "duplicate"),
    ("The small house stands by the river.", "off_target"),
    ("Дом дом дом дом дом дом дом.", "kept, though it goes round in circles"),
    ("Этот дом больше не нужен.", None),
]


def put(path, value):
    """JSON of a dict, JSON lines of a list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (write_json if isinstance(value, dict) else write_jsonl)(path, value)


def put_system(root, name, pairs):
    """Stage 2 translates perfectly, the others lose a word's end."""
    good, scores = name == real_text.OURS, root / "scores" / name
    summary = {"trainable_parameters": 1234, "train_pairs": 70, "train_dropped": 3, "steps": 9}
    put(root / name / "summary.json", summary)
    steps = [
        {"step": 9, "lr": 0.1, "seconds": 90.0},
        {"step": 9, "dev": {"nll": 0.4, "english": {"nll": 0.5}}},
    ]
    put(root / name / "metrics.jsonl", steps)
    rows = [{**pair, "hyp": pair["tgt"] if good else pair["tgt"][:-3]} for pair in pairs]
    put(scores / "hypotheses.jsonl", rows)
    identify, directions = language_identifier(LANGUAGES), {}
    for (a, b), own in by_direction(rows).items():
        directions[f"{a}-{b}"] = score(own, b, identify)
    write_scores(scores, {}, directions, None, [], "")
    nlls = [len(pair["tgt"]) * (0.25 if good else 0.75) for pair in pairs]
    found = {"nlls": nlls, "test_sha256": file_sha256(root / "data/test.jsonl")}
    put(scores / "likelihood.json", found)


@pytest.fixture
def finished(tmp_path):
    """A folder as `make small` fills it."""
    count = {"read": 90, "empty": 1, "in_dev_or_test": 2, **dict.fromkeys(NOISE, 3)}
    settings = {"train_pairs": 7, "flores_pairs": None}
    put(tmp_path / "data/manifest.json", {"settings": settings, "corpora": {"de": count}})
    pairs = []
    for a, b, texts in (("de", "en", EN), ("zh", "en", EN), ("de", "zh", ZH)):
        pairs += [{"src_lang": a, "tgt_lang": b, "src": "x", "tgt": text} for text in texts]
    put(tmp_path / "data/test.jsonl", pairs)
    for name in real_text.SYSTEMS:
        put_system(tmp_path, name, pairs)
    put(tmp_path / "stage2/config.json", {"epochs": 1, "batch_size": 8, "lr": 0.0005})
    put(tmp_path / "stage2/adapter/adapter.json", {"backbone": "a/model@0123456789"})
    pseudo, source = tmp_path / "pseudo", "Das kleine Haus steht am Fluss."
    put(pseudo / "config.json", {"pairs": 2, "max_ratio": 2.5, "drop_repetitive": False})
    put(pseudo / "report.json", {"de-ru": {"kept": 2}})
    english, targets = [], []
    for hyp, _ in INTO_ENGLISH:
        row = {"src_lang": "de", "tgt_lang": "en", "src": source}
        english.append({**row, "hyp": hyp, "finish": "stop"})
    for hyp, _ in FROM_ENGLISH:
        row = {"src_lang": "en", "tgt_lang": "ru", "src": "x", "x_lang": "de", "x": source}
        targets.append({**row, "hyp": hyp, "finish": "stop"})
    put(pseudo / "rounds/1.english.jsonl", english)
    put(pseudo / "rounds/1.targets.jsonl", targets)
    return tmp_path


def page_command(run):
    where = "--page", run / "page.md", "--data-out", run / "data.json"
    return ROOT / "examples/real_text.py", "--run", run, *where, "--samples", 40


def test_the_page_of_a_finished_run(finished):
    page = finished / "page.md"
    begin, end = "<!-- generated by examples/real_text.py: begin -->", "<!-- generated: end -->"
    page.write_text(f"# T\n\n{begin}{end} and more")
    inside(*page_command(finished), "--machine", "an abacus")
    data, text = read_json(finished / "data.json"), page.read_text()
    assert real_text.page_of(data) in text
    assert text.startswith("# T\n") and text.endswith("--> and more")
    assert "`a/model@0123456` on an abacus: 7 pairs per direction with English and all of" in text
    assert "| CrossLoRA, Stage 2 | 100.00 (100.00 to 100.00) | 100.00 (" in text
    assert "| LoRA in Stage 2's place | 1,234 | 70 | 3 | 9 | 1.5 | 0.500 |  |" in text
    assert "| de | 90 | 1 | 2 | 3 | 3 | 3 |" in text
    for found in data["against"].values():
        assert found["nll"]["all"] == {"mean": -0.5, "interval": [-0.5, -0.5]}
        assert 0 < found["chrf"]["interval"][0] < found["chrf"]["mean"] < 100
    chrf = data["systems"]["lora"]["chrf"]
    assert 0 < chrf["interval"][0] < chrf["mean"] < chrf["interval"][1] < 100
    for hop, expected in (("english", INTO_ENGLISH), ("targets", FROM_ENGLISH)):
        found = {rule: r["count"] for rule, r in data["rules"][hop].items() if r["count"]}
        assert found == {rule: 1 for _, rule in expected if rule}
    here, there = "Das kleine Haus steht am Fluss.", "The small house stands by the river."
    assert f"| de-en | {here} | {there} |" in text and f"| de-ru | {here} | x | {there} |" in text
    # From the data alone, as an auditor has it.
    page.write_text(f"# T\n\n{begin}{end} and more")
    inside(page_command(finished)[0], "--page", page, "--data-out", finished / "data.json")
    assert page.read_text() == text


def test_what_is_no_finished_run_is_one_line(finished):
    command = page_command(finished)
    lora, pseudo = finished / "scores/lora/likelihood.json", finished / "pseudo"
    put(lora, {**read_json(lora), "test_sha256": "of another"})
    refuses(*command, says=["lora/likelihood.json: not of", "run support/likelihood.py again"])
    put_system(finished, "lora", read_rows(finished / "data/test.jsonl"))
    put(finished / "lora/metrics.jsonl", [{"step": 9, "lr": 0.1, "seconds": 90.0}])
    refuses(*command, says="lora/metrics.jsonl: no dev loss in it")
    put_system(finished, "lora", read_rows(finished / "data/test.jsonl"))
    put(pseudo / "report.json", {"de-ru": {"kept": 3}})
    refuses(*command, says="its rounds are not those of its report.json")
    put(pseudo / "report.json", {"de-ru": {"kept": 2}})
    rows = read_rows(finished / "data/test.jsonl")
    put(finished / "data/test.jsonl", [{**rows[0], "tgt": "Other."}, *rows[1:]])
    refuses(*command, says=["its directions differ", "--flores-test"])
    put(finished / "data/test.jsonl", [])
    refuses(*command, says="it needs directions with English and without")
    put(finished / "data/test.jsonl", rows)
    hyps = read_rows(finished / "scores/lora/hypotheses.jsonl")
    put(finished / "scores/lora/hypotheses.jsonl", hyps[:-1])
    refuses(*command, says="scores/lora: not of the run's test set; run evaluate.py again")
    assert not (finished / "page.md").exists() and not (finished / "data.json").exists()


def test_rules_are_those_that_the_pivot_was_run_with(finished):
    config = read_json(finished / "pseudo/config.json")
    put(finished / "pseudo/config.json", {**config, "drop_repetitive": True})
    found = real_text.verdicts(finished / "pseudo")["targets"]
    counts = {rule: len(rows) for rule, rows in found.items()}
    assert counts == {"kept": 2, "duplicate": 1, "off_target": 1, "repetitive": 1}


def test_better_and_worse_directions(sentences):
    rows = [{"tgt": s["src"], "hyp": s["src"]} for s in sentences[:12]]
    bad = [{**row, "hyp": row["hyp"][: len(row["hyp"]) // 2]} for row in rows]
    ours = {("de", "en"): rows, ("de", "is"): bad, ("de", "cs"): bad}
    theirs = {("de", "en"): bad, ("de", "is"): bad, ("de", "cs"): rows}
    assert better_and_worse(ours, theirs, 100) == {"bleu": [1, 1], "chrf": [1, 1]}


def test_human_sentences_are_counted_as_they_are(tmp_path):
    """Of each language's sentence the rule for it and those for the five others."""

    def scores(text):
        return {**dict.fromkeys(LANGUAGES, -9.0), "de": -1.0, "en": -2.0}

    found = human_text.of_language({"de": ["a", "b"], "en": ["c"]}, scores)
    # As German: two right, one wrong by 1. As one of the others: English passes only by the margin.
    assert found["sentences"] == 3
    assert found["margin 0"] == [33.33, round(100 * 14 / 15, 2)]
    assert found["margin 2"] == [0.0, 80.0]
    assert human_text.of_pairs([("ab", "abcd"), ("ab", "abcde")])["above"]["2.0"] == 50.0
    kinds = {kind for kind, belongs in human_text.KINDS.items() if belongs("Пётр в IBM", "ru")}
    assert kinds == {"all", "Russian, Chinese with Latin letters"}
    world, page, data = tmp_path / "world", tmp_path / "page.md", tmp_path / "data.json"
    small = "--train", 40, "--dev", 1, "--test", 1
    inside(ROOT / "examples/tiny/world.py", "--out", world, *small)
    where = "--page", page, "--data-out", data
    inside(ROOT / "examples/human_text.py", "--data", world, "--most", 5, *where)
    found = read_json(data)
    assert sum(of_length["pairs"] for of_length in found["ratios"].values()) == 5 * 40
    assert human_text.page_of(found) in page.read_text(encoding="utf-8")
