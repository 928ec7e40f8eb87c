"""The toy world: grammar against sentences written by hand, corpora in the published layouts, no overlap."""

import random

import pytest

from compare import CLAIMS, SYSTEMS, claims_table, results_table
from conftest import ROOT, TORCHRUN, inside, read_rows, refuses, run
from data import LANGUAGES, read_flores, read_opus
from files import read_json
from tables import PAPER
from world import WORDS, meanings, sentence

ENGLISH = {kind: [row[0] for row in rows] for kind, rows in WORDS.items()}


def meaning(time, subject, subject_adj, verb, obj, obj_adj, place):
    kinds = ("time", "animate", "adjective", "verb", "noun", "adjective", "place")
    return tuple(None if w is None else ENGLISH[k].index(w) for k, w in zip(kinds, (time, subject, subject_adj, verb, obj, obj_adj, place)))


BY_HAND = [
    (meaning("today", "boy", "good", "sees", "doctor", "new", "in the garden"), {
        "en": "Today the good boy sees the new doctor in the garden.",
        "de": "Heute sieht der gute Junge den neuen Arzt im Garten.",
        "is": "Í dag sér góði strákurinn nýja lækninn í garðinum.",
        "cs": "Dnes dobrý chlapec vidí nového lékaře v zahradě.",
        "ru": "Сегодня хороший мальчик видит нового врача в саду.",
        "zh": "今天那个好男孩在花园里看见那位新医生。"}),
    (meaning(None, "woman", "small", "buys", "key", "black", None), {
        "en": "The small woman buys the black key.",
        "de": "Die kleine Frau kauft den schwarzen Schlüssel.",
        "is": "Litla konan kaupir svarta lykilinn.",
        "cs": "Malá žena kupuje černý klíč.",
        "ru": "Маленькая женщина покупает чёрный ключ.",
        "zh": "那个小女人买那把黑色的钥匙。"}),
    (meaning(None, "cat", None, "hears", "girl", "beautiful", "by the river"), {
        "en": "The cat hears the beautiful girl by the river.",
        "de": "Die Katze hört das schöne Mädchen am Fluss.",
        "is": "Kötturinn heyrir fallegu stúlkuna við ána.",
        "cs": "Kočka slyší krásnou dívku u řeky.",
        "ru": "Кошка слышит красивую девочку у реки.",
        "zh": "那只猫在河边听见那个美丽的女孩。"}),
    (meaning("in winter", "man", "big", "loves", "flower", "white", None), {
        "en": "In winter the big man loves the white flower.",
        "de": "Im Winter liebt der große Mann die weiße Blume.",
        "is": "Á veturna elskar stóri maðurinn hvíta blómið.",
        "cs": "V zimě velký muž miluje bílou květinu.",
        "ru": "Зимой большой мужчина любит белый цветок.",
        "zh": "冬天那个大男人爱那朵白色的花。"}),
]


@pytest.mark.parametrize("case", range(len(BY_HAND)))
def test_forms_written_by_hand(case):
    what, expected = BY_HAND[case]
    assert {lang: sentence(what, lang) for lang in LANGUAGES} == expected


def test_a_sentence_means_one_thing_in_every_language():
    stream = meanings(random.Random(0))
    drawn = [next(stream) for _ in range(5000)]
    for lang in LANGUAGES:
        assert len({sentence(m, lang) for m in drawn}) == 5000, lang


def test_corpora(tmp_path):
    world = tmp_path / "world"
    command = (ROOT / "examples/tiny/world.py", "--out", world, "--train", 50, "--dev", 6, "--test", 7)
    inside(*command)
    seen = set()
    for lang in list(LANGUAGES)[1:]:
        for split, count in (("train", 50), ("dev", 6), ("test", 7)):
            pairs = read_opus(world, lang, split)
            assert len(pairs) == count and not seen & {en for en, _ in pairs}
            seen |= {en for en, _ in pairs}
    for split, count in (("dev", 6), ("devtest", 7)):
        rows = read_flores(world, list(LANGUAGES), split)
        assert len(rows) == count and not seen & {row[0] for row in rows}
        seen |= {row[0] for row in rows}
    assert len(list((world / "opus-100-corpus/v1.0/supervised").iterdir())) == 5  # English-centric pairs only
    assert "made already" in inside(*command)
    refuses(*command, "--seed", 1, says="seed was 0, now 1")


def test_the_comparison_reads_its_seeds_as_a_statistician_would():
    """Mean and standard deviation over seeds; differences paired by seed; a verdict only where Student's 95 % interval leaves out zero."""
    means = lambda bleu: {g: {"bleu": bleu, "chrf": bleu, "off_target": 1.0} for g in ("english", "non_english", "average")}
    scores = {"LoRA": [means(b) for b in (10, 20, 30)], "CrossLoRA": [means(b) for b in (12, 22.5, 31.5)],
              "3 Experts": [means(b) for b in (11, 24, 33)], "w/o R-Drop": [means(b) for b in (15, 25, 34.6)]}
    table = results_table(scores, {"LoRA": 1234})
    assert "| LoRA | 1,234 | 20.00 ± 10.00 | 20.00 ± 10.00 | 20.00 ± 10.00 | 20.00 ± 10.00 | 1.0 ± 0.0 |" in table
    lines = claims_table(scores, read_json(PAPER)).splitlines()
    assert "| CrossLoRA over LoRA (Table 1) | +4.13 | 2.00 ± 0.50 | agrees |" in lines
    says = lambda start, end: any(line.startswith(start) and line.endswith(end) for line in lines)
    assert says("| CrossLoRA over 3 Experts (Table 3) | +0.38", "| the seeds don't tell |")
    assert says("| CrossLoRA over w/o R-Drop (Table 6) | +0.53", "| contradicts |")
    assert len(lines) == 2 + 3 and set(SYSTEMS) >= {name for claim in CLAIMS for name in claim[:2]}


def test_the_whole_chain_by_its_commands(tmp_path):
    """Every shipped command in the order of `make tiny`, on a world and a backbone too small to translate well."""
    t = tmp_path
    inside(ROOT / "examples/tiny/world.py", "--out", t / "world", "--train", 90, "--dev", 4, "--test", 3)
    run(ROOT / "examples/tiny/pretrain.py", "--world", t / "world", "--out", t / "backbone", "--hidden-size", 32, "--layers", 2,
        "--steps", 300, "--phrase-steps", 100, "--lines", 16, "--lr", "1e-2")
    inside(ROOT / "data.py", "--data", t / "world", "--out", t / "data", "--train-pairs", 30)
    train = ("--model", t / "backbone", "--data", t / "data", "--max-steps", 40, "--lr", "1e-2", "--epochs", 20, "--micro-batch-size", 16)
    decode = ("--max-new-tokens", 24, "--batch-size", 64)
    run(*TORCHRUN, ROOT / "train.py", "--stage", 1, *train, "--out", t / "stage1")
    run(*TORCHRUN, ROOT / "pivot.py", "--adapter", t / "stage1/adapter", "--data", t / "data", "--out", t / "pseudo", "--pairs", 5,
        "--max-ratio", 9, *decode)
    assert read_rows(t / "pseudo/pseudo.train.jsonl"), (t / "pseudo/report.md").read_text()
    run(*TORCHRUN, ROOT / "train.py", "--stage", 2, *train, "--pseudo", t / "pseudo", "--out", t / "stage2")
    for name, what in (("scores/base", ("--model", t / "backbone")), ("scores/stage2", ("--adapter", t / "stage2/adapter"))):
        inside(ROOT / "evaluate.py", "--all-directions", *what, "--test", t / "data/test.jsonl", "--out", t / name, *decode)
    table = inside(ROOT / "evaluate.py", "--table", t / "scores/base", t / "scores/stage2")
    assert table.count("\n") == 4
    one = run(ROOT / "generate.py", "--adapter", t / "stage2/adapter", "--src", "de", "--tgt", "is", "Der Hund sieht die Katze.")
    assert one.stdout.strip()
