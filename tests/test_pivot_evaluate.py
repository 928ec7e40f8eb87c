"""Filters and rounds of the pivot, scores of the evaluation, and their commands."""

import hashlib
import itertools
import random
from collections import Counter

import pytest
import sacrebleu
from conftest import ROOT, TORCHRUN, inside, read_rows, refuses, run, two_machines

from data import LANGUAGES, all_directions, read_flores
from evaluate import choose
from pivot import rejected
from support.corpora import length_ratio
from support.report import averages
from support.runs import read_json, write_json, write_jsonl
from support.scores import score


def always(lang):
    return lambda text: lang


@pytest.mark.parametrize(
    "hyp, finish, seen_as, why",
    [
        ("Der Hund sieht den roten Stuhl.", "stop", "de", None),
        ("  ", "stop", "de", "empty"),
        ("Der Hund sieht den roten Stuhl.", "length", "de", "cut_off"),
        ("Hundurinn sér rauða stólinn.", "stop", "is", "off_target"),
        ("Hund.", "stop", "de", "length_ratio"),
    ],
)
def test_filter_rules(hyp, finish, seen_as, why):
    assert (
        rejected(
            {"hyp": hyp, "finish": finish},
            "de",
            "The dog sees the red chair.",
            always(seen_as),
            3.0,
        )
        == why
    )


def test_length_ratio_counts_letters():
    assert length_ratio("abc", "abcdef") == length_ratio("abcdef", "abc") == 2
    assert length_ratio("那只狗", "собака..!") == 1
    assert length_ratio("", "abc") == 3


def test_length_bound_keeps_real_translations(shared):
    """The default bound of 2.5 against human translations in all 30 directions."""
    rows = read_flores(shared / "data", list(LANGUAGES), "devtest")
    ratios = sorted(length_ratio(a, b) for row in rows for a, b in itertools.combinations(row, 2))
    assert sum(r > 2.5 for r in ratios) / len(ratios) < 0.001
    assert ratios[int(0.999 * len(ratios))] < 2.2  # as the docstring says


@pytest.fixture
def source(sentences, tmp_path):
    """data.py's folder: 9 sentences of each language for the pivot, Icelandic only 3."""
    rows = []
    for lang in list(LANGUAGES)[1:]:
        texts = [s["src"] for s in sentences if s["src_lang"] == lang]
        for text in texts[: 3 if lang == "is" else 9]:
            row = {"src_lang": lang, "tgt_lang": "en", "src": text, "tgt": "x"}
            rows.append({**row, "origin": "opus-100"})
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "pivot.source.jsonl", rows)
    write_json(folder / "config.json", {"languages": ",".join(LANGUAGES)})
    return folder


@pytest.mark.once
def test_pivot_command(adapter_folder, source, tmp_path):
    """A random adapter's output is mostly rejected: every pair must be accounted for, whatever
    happens to it."""

    def command(out):
        where = "--adapter", adapter_folder, "--data", source, "--out", tmp_path / out
        small = "--pairs 4 --max-new-tokens 12 --batch-size 4 --max-ratio 50 --dev-share 0.5"
        return ROOT / "pivot.py", *where, *small.split()

    inside(*command("one"))
    report = read_json(tmp_path / "one/report.json")
    assert len(report) == 20 and not [d for d in report if "en" in d.split("-")]
    both = [read_rows(tmp_path / f"one/pseudo.{part}.jsonl") for part in ("train", "dev")]
    train, dev = both
    pool = {(r["src_lang"], r["src"]) for r in read_rows(source / "pivot.source.jsonl")}
    kept = Counter((r["src_lang"], r["tgt_lang"]) for r in train + dev)
    for direction, counts in report.items():
        apart = ("generated", "kept", "ended")
        dropped = sum(value for key, value in counts.items() if key not in apart)
        assert counts["generated"] == counts["kept"] + dropped, (direction, counts)
        assert kept[tuple(direction.split("-"))] == counts["kept"] <= 4
        if direction.startswith("is"):
            assert counts["ended"] == "source ran out after 3 sentences"
            assert counts["generated"] == 3
        elif counts["kept"] < 4:
            assert counts["ended"].startswith("source ran out")
    for row in train + dev:
        assert (row["src_lang"], row["src"]) in pool and row["origin"] == "pseudo" and row["pivot"]
    assert "made already" in inside(*command("one"))
    two_machines(*command("two"))
    for name in ("pseudo.train.jsonl", "pseudo.dev.jsonl", "report.md"):
        same = (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        assert same, name
    (tmp_path / "two/report.json").unlink()  # as if killed before the end
    (tmp_path / "two/rounds/1.targets.jsonl").unlink()
    inside(*command("two"))
    one, two = (tmp_path / f"{name}/pseudo.train.jsonl" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    refuses(*command("one"), "--seed", 3, says="seed was 0, now 3")
    # The first rank's refusal reaches the second.
    shown = run(*TORCHRUN, *command("one"), "--seed", 3, check=False)
    assert shown.returncode and "seed was 0, now 3" in shown.stderr
    assert "RuntimeError" not in shown.stderr


WIDER = ", but wider"


def scripted(tgt_lang, src):
    """(hypothesis, finish) of an engine whose faults are known: by the number in the sentence."""
    number = int(src.split()[1])
    if tgt_lang == "en":
        if number % 5 == 0:
            return "", "stop"
        return f"en {number} same length" + WIDER * (number % 11 == 6), "stop"
    # Another one in every language.
    fault = (number + len(LANGUAGES) * list(LANGUAGES).index(tgt_lang)) % 7
    if fault == 1:
        return f"{tgt_lang} 0 this comes again", "stop"
    if fault == 3:
        return f"fr {number} same length", "stop"
    if fault == 4:
        return f"{tgt_lang} {number} " + 99 * "long", "stop"
    # From wider English a target that is no longer than 2.5 times that, but than 2.5 times X.
    wider = 4 * " and long" if src.endswith(WIDER) else ""
    return f"{tgt_lang} {number} same length{wider}", "length" if fault == 2 else "stop"


class Scripted:
    languages, identity, place = list(LANGUAGES), {"backbone": "scripted"}, "nowhere"

    def translate_each(self, rows, max_new_tokens, batch_size):
        for i, row in enumerate(rows):
            yield i, *scripted(row["tgt_lang"], row["src"])


def fault_of(x_sentence, tgt_lang, good):
    """(target, why the pivot drops it or None) of one sentence, by the rules in their order."""
    english, _ = scripted("en", x_sentence)
    if not english:
        return "", "en: empty"
    hyp, finish = scripted(tgt_lang, english)
    if finish == "length":
        return hyp, "cut_off"
    if hyp[:2] != tgt_lang:
        return hyp, "off_target"
    if "long" in hyp:
        return hyp, "length_ratio"
    return hyp, "duplicate" if hyp in good else None


def test_pivot_keeps_the_first_good_pairs_whatever_the_rounds(source, tmp_path, monkeypatch):
    """An engine whose faults are known: what is kept is found again by going through each
    direction's sentences one by one."""
    sources, rows, wanted = {}, [], 16
    for lang in list(LANGUAGES)[1:]:
        sources[lang] = [f"{lang} {number} same length" for number in range(300)]
        rows += [{"src_lang": lang, "tgt_lang": "en", "src": text} for text in sources[lang]]
    write_jsonl(source / "pivot.source.jsonl", rows)
    monkeypatch.setattr("support.baselines.engine_of", lambda args, ranks: Scripted())
    first_word = lambda languages: lambda text: text.split()[0]  # noqa: E731
    monkeypatch.setattr("support.scores.language_identifier", first_word)
    flags = "--data", source, "--out", tmp_path / "out", "--pairs", wanted, "--dev-share", 0.25
    inside(ROOT / "pivot.py", *flags)
    assert (tmp_path / "out/rounds/2.english.jsonl").exists()  # the first round was not enough
    train, dev = (read_rows(tmp_path / f"out/pseudo.{part}.jsonl") for part in ("train", "dev"))
    report = read_json(tmp_path / "out/report.json")
    for d, counts in report.items():
        x, y = d.split("-")
        good, faults = {}, Counter()
        for src in random.Random(f"0 {x}").sample(sources[x], 300):
            hyp, why = fault_of(src, y, good)
            if len(good) < wanted and not why:
                good[hyp] = src
            elif len(good) < wanted:
                faults[why] += 1
        of_direction = [r for r in train + dev if (r["src_lang"], r["tgt_lang"]) == (x, y)]
        assert {row["tgt"]: row["src"] for row in of_direction} == good
        assert len(good) == counts["kept"] == wanted and counts["ended"] == "complete"
        apart = ("generated", "kept", "ended")
        dropped = {key: value for key, value in counts.items() if key not in apart}
        # And those that came with the last good ones.
        assert all(dropped[why] >= count for why, count in faults.items())
        assert counts["generated"] == wanted + sum(dropped.values())
        by_hash = sorted(good.values(), key=lambda src: hashlib.sha256(src.encode()).hexdigest())
        aside = [row["src"] for row in dev if (row["src_lang"], row["tgt_lang"]) == (x, y)]
        assert sorted(by_hash[:4]) == sorted(aside)
    assert all(report[d]["duplicate"] for d in ("de-cs", "cs-de"))


def test_english_is_translated_once_for_all_targets(adapter_folder, source, tmp_path):
    """The targets of a language are made of the same sentences."""
    where = "--adapter", adapter_folder, "--data", source, "--out", tmp_path / "out"
    small = "--pairs 9 --max-new-tokens 4 --batch-size 64"
    inside(ROOT / "pivot.py", *where, *small.split())
    rows = read_rows(tmp_path / "out/rounds/1.english.jsonl")
    pool = Counter(row["src_lang"] for row in read_rows(source / "pivot.source.jsonl"))
    assert Counter(row["src_lang"] for row in rows) == pool
    assert len({(row["src_lang"], row["src"]) for row in rows}) == len(rows)
    report = read_json(tmp_path / "out/report.json")
    for x, count in pool.items():
        assert [r["generated"] for d, r in report.items() if d.startswith(x)] == [count] * 4


def test_pivot_bad_input(adapter_folder, source, tmp_path, monkeypatch):
    base = ROOT / "pivot.py", "--adapter", adapter_folder, "--out", tmp_path / "o", "--data"
    says = ["pivot.source.jsonl: no such file", "`python data.py --source publisher` makes it"]
    refuses(*base, tmp_path, says=says)
    refuses(*base, source, "--pairs", 0, says="--pairs")
    monkeypatch.chdir(tmp_path)
    says = ["runs/stage1/adapter: no adapter.json", "`train.py --stage 1` makes runs/stage1"]
    refuses(ROOT / "pivot.py", "--data", source, says=says)
    (source / "pivot.source.jsonl").write_text("")
    refuses(*base, source, says="no sentences in it")
    assert not (tmp_path / "o").exists()


REFS = {
    "de": ["Der Hund sieht den roten Stuhl.", "Die Katze kauft das alte Haus."],
    "zh": ["那只狗看见那把红色的椅子。", "那只猫买那座房子。"],
}
HYPS = {
    "de": ["Der Hund sieht den grünen Stuhl.", ""],
    "zh": ["那只狗看见那把绿色的椅子。", "那只猫卖那座房子。"],
}


@pytest.mark.parametrize("lang, tokenize", [("de", "13a"), ("zh", "zh")])
def test_bleu_is_sacrebleus(lang, tokenize):
    rows = [{"tgt": r, "hyp": h, "finish": "stop"} for r, h in zip(REFS[lang], HYPS[lang])]
    got = score(rows, lang, always(lang))
    assert got["bleu"] == sacrebleu.corpus_bleu(HYPS[lang], [REFS[lang]], tokenize=tokenize).score
    assert (
        f"tok:{tokenize}" in got["signatures"]["BLEU"]
        and f"version:{sacrebleu.__version__}" in got["signatures"]["BLEU"]
    )
    assert got["chrf"] == sacrebleu.corpus_chrf(HYPS[lang], [REFS[lang]], word_order=2).score


def test_rates():
    rows = [
        {"tgt": "a", "hyp": "b", "finish": "length"},
        {"tgt": "a", "hyp": "", "finish": "stop"},
        {"tgt": "a", "hyp": "c"},
        {"tgt": "d", "hyp": "d"},
    ]
    got = score(rows, "de", lambda text: {"b": "is", "c": "de", "a": "de", "d": "cs"}[text])
    assert (got["off_target"], got["off_target_ref"], got["cut_off"], got["empty"]) == (
        75,
        25,
        25,
        25,
    )


def test_averages_are_over_directions():
    directions, rates = {}, dict.fromkeys(("off_target", "off_target_ref", "cut_off", "empty"), 0)
    for i, pair in enumerate(all_directions(list(LANGUAGES))):
        directions["-".join(pair)] = {"bleu": float(i), **rates}
    means = averages(directions)
    assert means["english"]["bleu"] == sum(range(10)) / 10
    assert means["non_english"]["bleu"] == sum(range(10, 30)) / 20
    assert means["average"]["bleu"] == sum(range(30)) / 30
    assert list(choose([{"src_lang": "de", "tgt_lang": "zh"}], "f", "de-zh")) == [("de", "zh")]


@pytest.mark.once
def test_evaluate_command(adapter_folder, comet_folder, sentences, tmp_path):
    rows = []
    for s, (a, b) in itertools.product(sentences[:2], all_directions(list(LANGUAGES))):
        rows.append({**s, "src_lang": a, "tgt_lang": b})
    write_jsonl(tmp_path / "test.jsonl", rows)
    script, out = ROOT / "evaluate.py", tmp_path / "scores"
    where = "--adapter", adapter_folder, "--test", tmp_path / "test.jsonl", "--out", out
    command = script, "--all-directions", *where, "--max-new-tokens", 5
    # COMET's trainer must not take torchrun's world for its own.
    shown = run(*TORCHRUN, *command, "--comet", comet_folder).stdout
    scores = read_json(out / "scores.json")
    assert len(scores["directions"]) == 30
    assert set(scores["averages"]) == {"english", "non_english", "average"}
    assert (out / "table.md").read_text() in shown and "tok:zh" in shown
    # Anybody's hypotheses: ours scored again give the same, perfect ones give 100.
    hyps = read_rows(out / "hypotheses.jsonl")
    two_machines(*(tmp_path / "machines" if part == out else part for part in command))
    assert read_rows(tmp_path / "machines/hypotheses.jsonl") == hyps
    anybody = "--hypotheses", out / "hypotheses.jsonl", "--out", tmp_path / "again"
    inside(script, "--all-directions", *anybody)
    again = read_json(tmp_path / "again/scores.json")["directions"]
    for direction, of_direction in scores["directions"].items():
        assert {**again[direction], "comet": of_direction["comet"]} == of_direction
    write_jsonl(tmp_path / "perfect.jsonl", [{**row, "hyp": row["tgt"]} for row in hyps])
    anybody = "--hypotheses", tmp_path / "perfect.jsonl", "--out", tmp_path / "perfect"
    inside(script, "--directions", "en-de,de-zh", *anybody)
    perfect = read_json(tmp_path / "perfect/scores.json")
    assert [round(s["bleu"]) for s in perfect["directions"].values()] == [100, 100]
    table = inside(ROOT / "support/report.py", out, tmp_path / "perfect").splitlines()
    assert table[0].startswith("| system | BLEU English-centric")
    assert table[3].startswith("| perfect | 100.00 | 100.00 | 100.00 |")


def test_evaluate_bad_input(adapter_folder, sentences, tmp_path, monkeypatch):
    script, o = ROOT / "evaluate.py", ("--out", tmp_path / "o")
    write_jsonl(tmp_path / "test.jsonl", [{**sentences[0], "src_lang": "de", "tgt_lang": "zh"}])
    base = script, "--adapter", adapter_folder, "--test", tmp_path / "test.jsonl", *o
    refuses(*base, "--all-directions", says="no pairs for zh-de")
    refuses(*base, "--directions", "de-xx", says="'de-xx' is no pair, such as de-zh")
    refuses(*base, says="either --all-directions or --directions")
    # An unset variable of the shell's, perhaps.
    refuses(*base, "--directions", "", says="'' is no pair, such as de-zh")
    anybody = script, "--directions", "de-zh", *o, "--hypotheses"
    refuses(*anybody, tmp_path / "test.jsonl", says="'hyp'")
    refuses(*anybody, tmp_path / "test.jsonl", "--via-english", says="have no part in it")
    (tmp_path / "empty.jsonl").write_text("")
    empty = script, "--all-directions", "--hypotheses", tmp_path / "empty.jsonl", *o
    refuses(*empty, says="no pairs for any")
    monkeypatch.chdir(tmp_path)
    none = script, "--all-directions", "--adapter", adapter_folder
    says = ["data/test.jsonl: no such file", "`python data.py --source publisher` makes it"]
    refuses(*none, says=says)
    says = "no runs/stage2/adapter or runs/stage1/adapter here"
    refuses(script, "--all-directions", "--test", "test.jsonl", says=says)
    assert not (tmp_path / "o").exists()
