"""Metrics, tables, figures and significance, each held against something independent."""

import json
import random
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import sacrebleu
from conftest import ROOT, inside, read_rows, refuses

from data import LANGUAGES, all_directions, group_of
from support.report import PAPER, audit, averages, heat_maps, tables_8_9
from support.runs import UserError, read_json, write_json, write_jsonl
from support.scores import (
    RougeTokens,
    comet_scores,
    load_comet,
    paired_bootstrap,
    resampled,
    score,
)

pytestmark = pytest.mark.once

REFS = {
    "de": ["Der Hund sieht den Tisch.", "Die Katze kauft ein schönes Haus."],
    "zh": ["那只狗看见桌子。", "那只猫买房子。"],
}
HYPS = {
    "de": ["Der Hund sieht einen Tisch.", "Katze kauft schönes altes Haus."],
    "zh": ["那只狗看见了桌子。", "猫买房子。"],
}


def rows_of(lang):
    return [{"tgt": r, "hyp": h} for r, h in zip(REFS[lang], HYPS[lang])]


def lcs(a, b):
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1, j + 1] = (
                table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
            )
    return table[-1, -1]


@pytest.mark.parametrize("lang", ["de", "zh"])
def test_rouge_l_is_the_longest_common_subsequence(lang):
    def tokens(text):
        return list(text) if lang == "zh" else re.findall(r"\w+|[^\w\s]", text.lower())

    want = []
    for row in rows_of(lang):
        r, h = tokens(row["tgt"]), tokens(row["hyp"])
        p, q = lcs(r, h) / len(h), lcs(r, h) / len(r)
        want.append(2 * p * q / (p + q))
    assert score(rows_of(lang), lang, lambda text: lang)["rouge_l"] == pytest.approx(
        100 * sum(want) / len(want)
    )


def test_rouge_keeps_letters_that_its_own_tokenizer_deletes():
    assert RougeTokens("ru").tokenize("Собака спит.") == ["собака", "спит", "."]
    assert RougeTokens("zh").tokenize("他 说：好。") == list("他说：好。")
    assert RougeTokens("is").tokenize("Þetta er ágætt") == ["þetta", "er", "ágætt"]


def test_an_empty_hypothesis_scores_nothing():
    got = score([{"tgt": "Der Hund.", "hyp": ""}], "de", lambda text: "de")
    assert (
        got["bleu"] == got["rouge_l"] == got["chrf"] == 0
        and got["off_target"] == got["empty"] == 100
    )


def hypotheses(path, seed, noise):
    """A JSONL file of twelve sentences in four directions whose words are dropped at random."""
    rng, rows = random.Random(seed), []
    for src_lang, tgt_lang in (("en", "de"), ("de", "en"), ("de", "zh"), ("zh", "de")):
        for i in range(12):
            words = [f"wort{(7 * i + j) % 50}" for j in range(12)]
            hyp = " ".join(w for w in words if rng.random() > noise)
            rows.append(
                {
                    "src_lang": src_lang,
                    "tgt_lang": tgt_lang,
                    "src": f"satz {i}",
                    "tgt": " ".join(words),
                    "hyp": hyp,
                    "finish": "stop",
                }
            )
    write_jsonl(path, rows)
    return rows


def scored(hypotheses, out, *more, directions="en-de"):
    """evaluate.py on hypotheses that are there already."""
    flags = "--directions", directions, "--hypotheses", hypotheses, "--out", out
    return ROOT / "evaluate.py", *flags, *more


@pytest.mark.filterwarnings("ignore:`isinstance")  # of pytorch-lightning's own
def test_comet_scores_every_row_in_its_place(comet_folder, monkeypatch, tmp_path):
    """unbabel-comet itself loads and runs the checkpoint, offline; its averages are those of its
    scores one by one."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows, out = hypotheses(tmp_path / "h.jsonl", 1, 0.4), tmp_path / "out"
    again = scored(tmp_path / "h.jsonl", out, directions="en-de,zh-de")
    shown = inside(*again, "--comet", comet_folder)
    assert "COMET-22" in shown and f"COMET: {comet_folder}, times 100" in shown
    model = load_comet(str(comet_folder))
    got = read_json(out / "scores.json")["directions"]
    for direction in ("en-de", "zh-de"):
        part = [r for r in rows if f"{r['src_lang']}-{r['tgt_lang']}" == direction]
        every = comet_scores(model, part)
        one_by_one = [comet_scores(model, [row])[0] for row in part[:2]]
        assert every[:2] == pytest.approx(one_by_one, abs=1e-3)
        assert got[direction]["comet"] == pytest.approx(np.mean(every), abs=1e-3)
    assert got["en-de"]["comet"] != got["zh-de"]["comet"]
    # Scored again without --comet, or when COMET is no longer to be had, the same hypotheses keep
    # theirs.
    monkeypatch.setattr("support.scores.load_comet", None)
    for more in ((), ("--comet", comet_folder)):
        assert "COMET-22" in inside(*again, *more)
        assert read_json(out / "scores.json")["directions"] == got
    monkeypatch.undo()
    printed = inside(*again, "--comet", tmp_path / "h.jsonl")  # another one, which can't be loaded
    assert "can't be loaded" in printed and f"COMET: {comet_folder}, times 100" in printed
    assert read_json(out / "scores.json")["directions"] == got
    # Other hypotheses don't.
    others = {**read_json(out / "scores.json"), "hypotheses_sha256": "others"}
    write_json(out / "scores.json", others)
    inside(*again)
    for of_direction in read_json(out / "scores.json")["directions"].values():
        assert "comet" not in of_direction


class Full:
    """A COMET without memory."""

    def predict(self, *args, **kwargs):
        raise RuntimeError("CUDA out of memory")


def test_a_failing_comet_keeps_the_other_scores(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hypotheses(tmp_path / "h.jsonl", 1, 0.4)
    broken = tmp_path / "broken"
    (broken / "checkpoints").mkdir(parents=True)
    (broken / "checkpoints/model.ckpt").write_bytes(b"no checkpoint")
    printed = inside(*scored(tmp_path / "h.jsonl", tmp_path / "out", "--comet", broken))
    scores = read_json(tmp_path / "out/scores.json")
    of_direction, (note,) = scores["directions"]["en-de"], scores["notes"]
    assert of_direction["bleu"] > 0 and "comet" not in of_direction
    assert f"--comet {broken}: can't be loaded (" in note and note in printed
    why = "Unbabel/wmt22-comet-da: the hub did not give it .*HF_HUB_OFFLINE"
    with pytest.raises(UserError, match=why):
        load_comet("Unbabel/wmt22-comet-da")
    monkeypatch.setattr("support.scores.load_comet", lambda name: Full())
    printed = inside(*scored(tmp_path / "h.jsonl", tmp_path / "full", "--comet", "loaded"))
    notes = read_json(tmp_path / "full/scores.json")["notes"]
    assert notes == ["--comet: scoring failed (RuntimeError: CUDA out of memory)"]
    assert notes[0] in printed and (tmp_path / "full/heatmaps/bleu.png").exists()


def test_paired_bootstrap_is_sacrebleus_command(tmp_path):
    """The same p-values and intervals as `sacrebleu --paired-bs` prints."""
    ours = hypotheses(tmp_path / "a.jsonl", 1, 0.2)[:12]  # en-de
    theirs = hypotheses(tmp_path / "b.jsonl", 2, 0.5)[:12]
    got = paired_bootstrap(ours, theirs, "de", samples=200)
    files = {"ref": [r["tgt"] for r in ours], "ours": [r["hyp"] for r in ours]}
    for name, lines in {**files, "theirs": [r["hyp"] for r in theirs]}.items():
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    command = "-m sacrebleu ref -i theirs ours -m bleu chrf --chrf-word-order 2 --paired-bs "
    command += "--paired-bs-n 200 --format json"
    flags = [sys.executable, *command.split()]
    out = subprocess.run(flags, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    baseline, system = json.loads(out)
    for key, name in (("bleu", "BLEU"), ("chrf", "chrF2++")):
        a, b = baseline[name], system[name]
        assert got[key]["theirs"] == pytest.approx(a["score"], abs=0.06)
        assert got[key]["ours"] == pytest.approx(b["score"], abs=0.06)
        assert got[key]["ours_ci"] == pytest.approx(b["ci"], abs=0.06)
        assert got[key]["p"] == pytest.approx(b["p_value"], abs=1e-3)
    with pytest.raises(UserError, match="translated other sentences"):
        paired_bootstrap(ours, [{**r, "tgt": "x"} for r in theirs], "de", 10)
    with pytest.raises(UserError, match="12 and 3 sentences"):
        paired_bootstrap(ours, theirs[:3], "de", 10)


REPORT = ROOT / "support/report.py"


@pytest.fixture
def good_and_bad(tmp_path):
    """Two finished evaluations."""
    for name, seed, noise in (("good", 1, 0.1), ("bad", 2, 0.6)):
        given = tmp_path / f"{name}.jsonl"
        hypotheses(given, seed, noise)
        inside(
            *scored(given, tmp_path / "runs/scores" / name, directions="en-de,de-en,de-zh,zh-de")
        )
        assert read_rows(tmp_path / "runs/scores" / name / "hypotheses.jsonl") == read_rows(given)
    return tmp_path / "runs/scores/good", tmp_path / "runs/scores/bad"


def test_tables_of_finished_evaluations(good_and_bad, tmp_path, monkeypatch):
    good, bad = good_and_bad
    pictures = {p.name: p.read_bytes() for p in (good / "heatmaps").iterdir()}
    assert {"bleu.png", "chrf.png", "rouge_l.png", "off_target.png"} <= set(pictures)
    assert "comet.png" not in pictures
    assert all(data.startswith(b"\x89PNG") for data in pictures.values())
    table = inside(REPORT, good, bad, "--paper")
    paper = "| paper: LLaMA-3-8B-Instruct CrossLoRA Stage 2 | 29.69 | 20.60 | 23.63 | 78.74 | "
    assert paper + "81.94 | 80.88 |" in table
    bleu = read_json(good / "scores.json")["directions"]["de-zh"]["bleu"]
    (row,) = [x for x in table.split("###")[1].splitlines() if x.startswith("| de-zh |")]
    assert f"| de-zh | {bleu:.2f} |" in row and row.endswith("| 37.96 |")
    # Two of one name are two rows.
    shutil.copytree(bad, tmp_path / "elsewhere/good")
    both = inside(REPORT, good, tmp_path / "elsewhere/good")
    assert f"| {good} |" in both and f"| {tmp_path / 'elsewhere/good'} |" in both
    # By default all of runs/scores.
    monkeypatch.chdir(tmp_path)
    assert inside(REPORT) == inside(REPORT, bad, good)
    shutil.rmtree("runs")
    says = ["runs/scores: no finished evaluation", "`python evaluate.py --all-directions` makes"]
    refuses(REPORT, says=says)
    refuses(REPORT, tmp_path, says="scores.json")


def test_significance_of_finished_evaluations(good_and_bad, tmp_path):
    good, bad = good_and_bad
    resampled = inside(REPORT, good, "--against", bad, "--samples", 100)
    assert "BLEU: good better in 4, bad better in 0 of 4 directions (p < 0.05)" in resampled
    assert "| de-zh |" in resampled
    shutil.copytree(good, tmp_path / "again/good")
    with_itself = inside(REPORT, good, "--against", tmp_path / "again/good", "--samples", 100)
    assert with_itself.splitlines()[2].split(" | ")[3] == "-"  # no difference has no p
    assert with_itself.count("good better in 0, good better in 0 of 4 directions") == 2
    refuses(REPORT, good, "--against", bad, "--samples", 0, says="--samples 0")
    refuses(REPORT, good, good, "--against", bad, says="--against compares one folder")


def test_training_curves(tmp_path):
    metrics, png = tmp_path / "run/metrics.jsonl", tmp_path / "curves.png"
    metrics.parent.mkdir()
    lines = [{"step": 8, "dev": {"nll": 0.5, "kl": 0.1, "loss": 0.51}}]
    for step in range(1, 9):
        lines.append({"step": step, "lr": 1e-3 / step, "nll": 3 / step, "kl": 0.1})
    write_jsonl(metrics, lines)
    inside(REPORT, tmp_path / "run", "--curves", png)
    assert png.read_bytes().startswith(b"\x89PNG")
    metrics.write_text("")
    refuses(REPORT, tmp_path / "run", "--curves", png, says="no steps in it")
    metrics.write_text('{"step": 1')
    refuses(REPORT, tmp_path / "run", "--curves", png, says="not JSON lines")
    nowhere = tmp_path / "no/c.png"
    refuses(REPORT, tmp_path / "run", "--curves", nowhere, says="a folder that exists")


def test_heat_map_has_source_rows_and_target_columns(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn, original = [], Axes.imshow
    monkeypatch.setattr(
        Axes,
        "imshow",
        lambda self, grid, **kwargs: drawn.append(grid) or original(self, grid, **kwargs),
    )
    bleu = {
        f"{s}-{t}": {"bleu": 10 * i + j}
        for i, s in enumerate(LANGUAGES)
        for j, t in enumerate(LANGUAGES)
        if s != t
    }
    heat_maps(bleu, tmp_path / "maps")
    (grid,) = drawn
    assert all(grid[i][j] == 10 * i + j for i in range(6) for j in range(6) if i != j) and np.isnan(
        grid[2][2]
    )


def test_the_papers_tables_as_an_auditor_reads_them():
    """All 30 directions, groups of 10 and 20, and the one system whose directions do not average to
    Table 1."""
    paper = read_json(PAPER)
    directions = {"-".join(pair) for pair in all_directions(list(LANGUAGES))}
    assert all(set(scores) == directions for scores in paper["directions"].values())
    lines = audit(paper)
    wrong = [line for line in lines if "Tables 8 and 9 average" in line]
    assert (
        lines[0] == "Table 1, BigTranslate-13B: its groups average to 19.97 BLEU, it prints 19.98."
    )
    assert len(lines) == 1 + 2 + len(paper["notes"])
    average = "CrossLoRA Stage 2: the directions of Tables 8 and 9 average to"
    assert wrong == [
        f"{average} 29.79 / 22.46 / 24.90 BLEU, Table 1 prints 29.69 / 20.60 / 23.63.",
        f"{average} 78.74 / 82.13 / 81.00 COMET-22, Table 1 prints 78.74 / 81.94 / 80.88.",
    ]
    assert len(paper["table1"]) == 16 and paper["table7"]["NLLB-3.3B"]["english"]["bleu"] == 29.72
    english = [
        s["bleu"]
        for d, s in paper["directions"]["NLLB-3.3B"].items()
        if group_of(*d.split("-")) == "english"
    ]
    assert averages(paper["directions"]["NLLB-3.3B"])["english"]["bleu"] == pytest.approx(
        sum(english) / 10
    )
    assert "| ru-zh | 24.96 |" in tables_8_9({"NLLB": paper["directions"]["NLLB-3.3B"]})
    assert sacrebleu.__version__ == "2.6.0"  # the signature that README prints


@pytest.mark.parametrize("tgt_lang", ["de", "zh"])
def test_a_resample_is_scored_as_a_corpus_of_its_sentences(tgt_lang, sentences):
    texts = [s["src"] for s in sentences if s["src_lang"] == tgt_lang][:9]
    rows = [{"tgt": text, "hyp": text[: len(text) - 3 * i]} for i, text in enumerate(texts)]
    draws = np.random.default_rng(0).integers(0, len(rows), (3, len(rows)))
    found = resampled(rows, tgt_lang, draws)
    for i, chosen in enumerate((range(len(rows)), *draws)):
        picked = [rows[j] for j in chosen]
        wanted = score(picked, tgt_lang, str)
        for key, (own, samples) in found.items():
            assert (own, *samples)[i] == pytest.approx(wanted[key])
    assert len(set(found["bleu"][1])) > 1
