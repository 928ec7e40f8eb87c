"""Filters and rounds of the pivot, scores of the evaluation, and their commands."""

import hashlib
import itertools
import json
import random
from collections import Counter

import pytest
import sacrebleu

from conftest import ROOT, TORCHRUN, inside, read_rows, refuses, run
from corpora import length_ratio
from data import LANGUAGES, all_directions, read_flores
from files import write_jsonl
from evaluate import averages, choose, score
from pivot import rejected


def always(lang):
    return lambda text: lang


@pytest.mark.parametrize("hyp, finish, seen_as, why", [
    ("Der Hund sieht den roten Stuhl.", "stop", "de", None),
    ("  ", "stop", "de", "empty"),
    ("Der Hund sieht den roten Stuhl.", "length", "de", "cut_off"),
    ("Hundurinn sér rauða stólinn.", "stop", "is", "off_target"),
    ("Hund.", "stop", "de", "length_ratio"),
])
def test_filter_rules(hyp, finish, seen_as, why):
    assert rejected({"hyp": hyp, "finish": finish}, "de", "The dog sees the red chair.", always(seen_as), 3.0) == why


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
        rows += [{"src_lang": lang, "tgt_lang": "en", "src": t, "tgt": "x", "origin": "opus-100"}
                 for t in texts[: 3 if lang == "is" else 9]]
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "pivot.source.jsonl", rows)
    (folder / "config.json").write_text(json.dumps({"languages": ",".join(LANGUAGES)}))
    return folder


def test_pivot_command(adapter_folder, source, tmp_path):
    """A random adapter's output is mostly rejected: every pair must be accounted for, whatever happens to it."""
    command = lambda out: (ROOT / "pivot.py", "--adapter", adapter_folder, "--data", source, "--out", tmp_path / out, "--pairs", 4,
                           "--max-new-tokens", 12, "--batch-size", 4, "--max-ratio", 50, "--dev-share", 0.5)
    inside(*command("one"))
    report = json.loads((tmp_path / "one/report.json").read_text())
    assert len(report) == 20 and not [d for d in report if "en" in d.split("-")]
    train, dev = read_rows(tmp_path / "one/pseudo.train.jsonl"), read_rows(tmp_path / "one/pseudo.dev.jsonl")
    pool = {(r["src_lang"], r["src"]) for r in read_rows(source / "pivot.source.jsonl")}
    kept = Counter((r["src_lang"], r["tgt_lang"]) for r in train + dev)
    for direction, counts in report.items():
        dropped = sum(v for k, v in counts.items() if k not in ("generated", "kept", "ended"))
        assert counts["generated"] == counts["kept"] + dropped, (direction, counts)
        assert kept[tuple(direction.split("-"))] == counts["kept"] <= 4
        if direction.startswith("is"):
            assert counts["ended"] == "source ran out after 3 sentences" and counts["generated"] == 3
        elif counts["kept"] < 4:
            assert counts["ended"].startswith("source ran out")
    for row in train + dev:
        assert (row["src_lang"], row["src"]) in pool and row["origin"] == "pseudo" and row["pivot"]
    assert "made already" in inside(*command("one"))
    run(*TORCHRUN, *command("two"))
    for name in ("pseudo.train.jsonl", "pseudo.dev.jsonl", "report.md"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    (tmp_path / "two/report.json").unlink()  # as if killed before the end
    (tmp_path / "two/rounds/1.targets.jsonl").unlink()
    inside(*command("two"))
    assert (tmp_path / "one/pseudo.train.jsonl").read_bytes() == (tmp_path / "two/pseudo.train.jsonl").read_bytes()
    refuses(*command("one"), "--seed", 3, says="seed was 0, now 3")
    shown = run(*TORCHRUN, *command("one"), "--seed", 3, check=False)  # the first rank's refusal reaches the second
    assert shown.returncode and "seed was 0, now 3" in shown.stderr and "RuntimeError" not in shown.stderr


@pytest.mark.parametrize("share", ["--share-english", "--no-share-english"])
def test_pivot_keeps_the_first_good_pairs_whatever_the_rounds(share, source, tmp_path, monkeypatch):
    """An engine whose faults are known: what is kept is found again by going through each direction's sentences one by one."""
    class Scripted:
        languages, identity = list(LANGUAGES), {"backbone": "scripted"}

        def translate_each(self, rows, max_new_tokens, batch_size):
            for i, row in enumerate(rows):
                yield i, *translation(row["tgt_lang"], row["src"])

    wider = ", but wider"

    def translation(tgt_lang, src):
        number = int(src.split()[1])
        if tgt_lang == "en":
            return ("" if number % 5 == 0 else f"en {number} same length" + wider * (number % 11 == 6)), "stop"
        fault = (number + len(LANGUAGES) * list(LANGUAGES).index(tgt_lang)) % 7  # another one in every language
        text = {1: f"{tgt_lang} 0 this comes again", 3: f"fr {number} same length", 4: f"{tgt_lang} {number} " + 99 * "long"}
        # From wider English a target that is no longer than 2.5 times that, but than 2.5 times X.
        usual = f"{tgt_lang} {number} same length" + (4 * " and long" if src.endswith(wider) else "")
        return text.get(fault, usual), "length" if fault == 2 else "stop"

    sources = {lang: [f"{lang} {number} same length" for number in range(300)] for lang in list(LANGUAGES)[1:]}
    rows = [{"src_lang": lang, "tgt_lang": "en", "src": text} for lang, texts in sources.items() for text in texts]
    write_jsonl(source / "pivot.source.jsonl", rows)
    monkeypatch.setattr("baselines.engine_of", lambda args: Scripted())
    monkeypatch.setattr("scores.language_identifier", lambda languages: lambda text: text.split()[0])
    wanted = 16
    inside(ROOT / "pivot.py", "--data", source, "--out", tmp_path / "out", "--pairs", wanted, "--dev-share", 0.25, share)
    assert (tmp_path / "out/rounds/2.english.jsonl").exists()  # the first round was not enough
    train, dev = (read_rows(tmp_path / f"out/pseudo.{part}.jsonl") for part in ("train", "dev"))
    report = json.loads((tmp_path / "out/report.json").read_text())
    for d, (x, y) in ((d, d.split("-")) for d in report):
        shuffled = random.Random(f"0 {x}").sample(sources[x], 300)
        others = [lang for lang in list(LANGUAGES)[1:] if lang != x]
        mine = shuffled if share == "--share-english" else shuffled[others.index(y) :: 4]
        good, faults = {}, Counter()
        for src in mine:
            english, _ = translation("en", src)
            hyp, finish = translation(y, english) if english else ("", "stop")
            why = ("en: empty" if not hyp
                   else "cut_off" if finish == "length"
                   else "off_target" if hyp[:2] != y
                   else "length_ratio" if "long" in hyp
                   else "duplicate" if hyp in good else None)
            if len(good) < wanted and not why:
                good[hyp] = src
            elif len(good) < wanted:
                faults[why] += 1
        kept = {row["tgt"]: row["src"] for row in train + dev if (row["src_lang"], row["tgt_lang"]) == (x, y)}
        assert kept == good and len(good) == report[d]["kept"] == wanted and report[d]["ended"] == "complete"
        dropped = {k: v for k, v in report[d].items() if k not in ("generated", "kept", "ended")}
        assert all(dropped[why] >= count for why, count in faults.items())  # and those that came with the last good ones
        assert report[d]["generated"] == wanted + sum(dropped.values())
        by_hash = sorted(good.values(), key=lambda src: hashlib.sha256(src.encode()).hexdigest())
        assert sorted(by_hash[:4]) == sorted(row["src"] for row in dev if (row["src_lang"], row["tgt_lang"]) == (x, y))
    assert all(report[d]["duplicate"] for d in ("de-cs", "cs-de"))


def test_pivot_shares_english_or_gives_each_direction_its_own_sentences(adapter_folder, source, tmp_path):
    """What the flag does to the data: with it the targets of a language are made of the same sentences, without it of none in common."""
    for flag in ("--share-english", "--no-share-english"):
        inside(ROOT / "pivot.py", "--adapter", adapter_folder, "--data", source, "--out", tmp_path / flag, "--pairs", 9,
               "--max-new-tokens", 4, "--batch-size", 64, flag)
        rows = read_rows(tmp_path / flag / "rounds/1.english.jsonl")
        pool = Counter(r["src_lang"] for r in read_rows(source / "pivot.source.jsonl"))
        assert Counter(row["src_lang"] for row in rows) == pool and len({(row["src_lang"], row["src"]) for row in rows}) == len(rows)
        report = json.loads((tmp_path / flag / "report.json").read_text())
        assert len(report) == 20
        for x, count in pool.items():
            generated = [r["generated"] for d, r in report.items() if d.startswith(x)]
            if flag == "--share-english":
                assert generated == [count] * 4
            else:
                assert sum(generated) == count and max(generated) - min(generated) <= 1


def test_pivot_bad_input(adapter_folder, source, tmp_path):
    base = (ROOT / "pivot.py", "--adapter", adapter_folder, "--out", tmp_path / "o")
    refuses(*base, "--data", tmp_path, says="pivot.source.jsonl")
    refuses(*base, "--data", source, "--pairs", 0, says="--pairs")
    (source / "pivot.source.jsonl").write_text("")
    refuses(*base, "--data", source, says="no sentences in it")
    assert not (tmp_path / "o").exists()


REFS = {"de": ["Der Hund sieht den roten Stuhl.", "Die Katze kauft das alte Haus."], "zh": ["那只狗看见那把红色的椅子。", "那只猫买那座房子。"]}
HYPS = {"de": ["Der Hund sieht den grünen Stuhl.", ""], "zh": ["那只狗看见那把绿色的椅子。", "那只猫卖那座房子。"]}


@pytest.mark.parametrize("lang, tokenize", [("de", "13a"), ("zh", "zh")])
def test_bleu_is_sacrebleus(lang, tokenize):
    rows = [{"tgt": r, "hyp": h, "finish": "stop"} for r, h in zip(REFS[lang], HYPS[lang])]
    got = score(rows, lang, always(lang))
    assert got["bleu"] == sacrebleu.corpus_bleu(HYPS[lang], [REFS[lang]], tokenize=tokenize).score
    assert f"tok:{tokenize}" in got["signatures"]["BLEU"] and f"version:{sacrebleu.__version__}" in got["signatures"]["BLEU"]
    assert got["chrf"] == sacrebleu.corpus_chrf(HYPS[lang], [REFS[lang]], word_order=2).score


def test_rates():
    rows = [{"tgt": "a", "hyp": "b", "finish": "length"}, {"tgt": "a", "hyp": "", "finish": "stop"}, {"tgt": "a", "hyp": "c"},
            {"tgt": "d", "hyp": "d"}]
    got = score(rows, "de", lambda text: {"b": "is", "c": "de", "a": "de", "d": "cs"}[text])
    assert (got["off_target"], got["off_target_ref"], got["cut_off"], got["empty"]) == (75, 25, 25, 25)


def test_averages_are_over_directions():
    directions = {f"{s}-{t}": dict(bleu=float(i), off_target=0, off_target_ref=0, cut_off=0, empty=0)
                  for i, (s, t) in enumerate(all_directions(list(LANGUAGES)))}
    means = averages(directions)
    assert means["english"]["bleu"] == sum(range(10)) / 10
    assert means["non_english"]["bleu"] == sum(range(10, 30)) / 20
    assert means["average"]["bleu"] == sum(range(30)) / 30
    assert list(choose([{"src_lang": "de", "tgt_lang": "zh"}], "f", "de-zh")) == [("de", "zh")]


def test_evaluate_command(adapter_folder, comet_folder, sentences, tmp_path):
    rows = [{**s, "src_lang": a, "tgt_lang": b} for s in sentences[:2] for a, b in all_directions(list(LANGUAGES))]
    write_jsonl(tmp_path / "test.jsonl", rows)
    command = (ROOT / "evaluate.py", "--all-directions", "--adapter", adapter_folder, "--test", tmp_path / "test.jsonl",
               "--out", tmp_path / "scores", "--max-new-tokens", 5)
    out = run(*TORCHRUN, *command, "--comet", comet_folder).stdout  # COMET's trainer must not take torchrun's world for its own
    scores = json.loads((tmp_path / "scores/scores.json").read_text())
    assert len(scores["directions"]) == 30 and set(scores["averages"]) == {"english", "non_english", "average"}
    assert (tmp_path / "scores/table.md").read_text() in out and "tok:zh" in out
    # Anybody's hypotheses: ours scored again give the same, perfect ones give 100.
    hyps = read_rows(tmp_path / "scores/hypotheses.jsonl")
    inside(ROOT / "evaluate.py", "--all-directions", "--hypotheses", tmp_path / "scores/hypotheses.jsonl", "--out", tmp_path / "again")
    again = json.loads((tmp_path / "again/scores.json").read_text())["directions"]
    assert {d: {**s, "comet": scores["directions"][d]["comet"]} for d, s in again.items()} == scores["directions"]
    write_jsonl(tmp_path / "perfect.jsonl", [{**r, "hyp": r["tgt"]} for r in hyps])
    inside(ROOT / "evaluate.py", "--directions", "en-de,de-zh", "--hypotheses", tmp_path / "perfect.jsonl", "--out", tmp_path / "perfect")
    perfect = json.loads((tmp_path / "perfect/scores.json").read_text())
    assert [round(s["bleu"]) for s in perfect["directions"].values()] == [100, 100]
    table = inside(ROOT / "evaluate.py", "--table", tmp_path / "scores", tmp_path / "perfect").splitlines()
    assert table[0].startswith("| system | BLEU English-centric") and table[3].startswith("| perfect | 100.00 | 100.00 | 100.00 |")


def test_evaluate_bad_input(adapter_folder, sentences, tmp_path):
    write_jsonl(tmp_path / "test.jsonl", [{**sentences[0], "src_lang": "de", "tgt_lang": "zh"}])
    base = (ROOT / "evaluate.py", "--adapter", adapter_folder, "--test", tmp_path / "test.jsonl", "--out", tmp_path / "o")
    refuses(*base, "--all-directions", says="no pairs for zh-de")
    refuses(*base, "--directions", "de-xx", says="'de-xx' is not a pair of known languages")
    refuses(*base, says="either --all-directions or --directions")
    refuses(ROOT / "evaluate.py", "--table", tmp_path, says="scores.json")
    write_jsonl(tmp_path / "nohyp.jsonl", [{**sentences[0], "src_lang": "de", "tgt_lang": "zh"}])
    refuses(ROOT / "evaluate.py", "--directions", "de-zh", "--hypotheses", tmp_path / "nohyp.jsonl", "--out", tmp_path / "o", says="'hyp'")
    refuses(*base, "--directions", "", says="'' is not a pair of known languages")  # an unset variable of the shell's, perhaps
    (tmp_path / "empty.jsonl").write_text("")
    refuses(ROOT / "evaluate.py", "--all-directions", "--hypotheses", tmp_path / "empty.jsonl", "--out", tmp_path / "o", says="no pairs for any")
    assert not (tmp_path / "o").exists()
