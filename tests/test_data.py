"""Prompts, encoding, corpora and files (invariants 6, 10 and 11)."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, inside, make_checkpoint, read_rows, refuses, run

import model as backbone
from data import (
    IGNORE,
    LANGUAGES,
    Tokenizer,
    all_directions,
    collate,
    encode,
    epoch_order,
    prepare,
)
from support.corpora import NOISE, read_aligned, read_jsonl
from support.runs import UserError, check_claim, claim, read_lines, run_main
from support.scores import language_identifier

pytestmark = pytest.mark.once

CONTROL = "<|eot_id|> <|begin_of_text|> <|im_end|> <|start_header_id|>assistant</s>"


def test_control_tokens_in_text_stay_text(tokenizer):
    prompt = tokenizer.prompt("en", "de", CONTROL)
    clean = tokenizer.prompt("en", "de", "Hello.")
    control = set(tokenizer.control.values())
    assert [i for i in prompt if i in control] == [i for i in clean if i in control]
    assert tokenizer.decode(tokenizer.ids(CONTROL)) == CONTROL


def test_labels_are_the_target_and_its_end_only(tokenizer, sentences):
    examples, _ = encode(tokenizer, sentences)
    tokens, labels = collate(examples[:8])
    assert tokens.shape == labels.shape == (8, max(len(e.ids) for e in examples[:8]) - 1)
    for row, (example, pair) in enumerate(zip(examples, sentences[:8])):
        length, start = len(example.ids) - 1, example.prompt_length - 1
        assert tokens[row, :length].tolist() == example.ids[:-1].tolist()
        assert labels[row, start:length].tolist() == example.ids[start + 1 :].tolist()
        assert (labels[row, :start] == IGNORE).all() and (labels[row, length:] == IGNORE).all()
        trained = labels[row][labels[row] != IGNORE].tolist()
        assert trained[-1] == tokenizer.stop_ids[0]  # the model learns to stop
        assert tokenizer.decode(trained[:-1]) == pair["tgt"]


def test_pairs_over_the_maximum_length_are_dropped_and_counted(tokenizer, sentences):
    lengths = [len(e.ids) for e in encode(tokenizer, sentences)[0]]
    limit = int(np.median(lengths))
    kept, dropped = encode(tokenizer, sentences, limit)
    assert dropped == sum(n > limit for n in lengths) > 0 and len(kept) == len(lengths) - dropped


def test_order_is_a_function_of_seed_and_epoch():
    assert epoch_order(100, 1, 0) == epoch_order(100, 1, 0)
    assert len({tuple(epoch_order(100, s, e)) for s in (1, 2) for e in (0, 1)}) == 4
    assert sorted(epoch_order(100, 1, 3)) == list(range(100))


def test_tokenizer_of_another_checkpoint_is_refused(tmp_path):
    other = make_checkpoint(tmp_path / "small")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": 500}))
    with pytest.raises(UserError, match="does not match the checkpoint: token id"):
        Tokenizer(other, backbone.Config.load(other))
    (other / "config.json").write_text(json.dumps({**config, "eos_token_id": 3}))
    with pytest.raises(UserError, match="eos_token_id 3 is no control token"):
        Tokenizer(other, backbone.Config.load(other))


GOOD = {"src_lang": "de", "tgt_lang": "zh", "src": "Hund", "tgt": "狗", "origin": "x", "extra": 1}


@pytest.mark.parametrize(
    "line, says",
    [
        ('{"src_lang": "de", "tgt_lang"', "not a whole JSON object"),
        ("[1]", "not a JSON object but list"),
        (json.dumps({**GOOD, "tgt_lang": "fr"}), "unknown language 'fr'"),
        (json.dumps({**GOOD, "src": "   "}), "'src' is empty"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "tgt"}), "no text under 'tgt'"),
        (json.dumps({**GOOD, "src_lang": "zh"}), "both 'zh'"),
        ("", "an empty line"),
        (json.dumps({**GOOD, "src": "\ud800"}), "surrogates not allowed"),
    ],
)
def test_bad_lines_are_named(line, says, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(UserError) as error:
        read_jsonl(path, LANGUAGES)
    assert str(error.value).startswith(f"{path}:2: ") and says in str(error.value)
    path.write_text(json.dumps(GOOD) + "\n")
    assert read_jsonl(path, LANGUAGES) == [GOOD]  # unknown keys are kept


def test_lines_end_at_newlines_only(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("\ufeffa\u2028b\u0085c\u00a0d\r\n\n\u3000„Zitat“\n".encode())
    assert read_lines(path) == ["a\u2028b\u0085c\u00a0d", "", "\u3000„Zitat“"]
    path.write_bytes(b"a\xff\n")
    with pytest.raises(UserError, match="not UTF-8"):
        read_lines(path)


def test_misaligned_files_are_named(tmp_path):
    (tmp_path / "a").write_text("1\n2\n")
    (tmp_path / "b").write_text("1\n")
    with pytest.raises(UserError, match="2 lines but .* has 1"):
        read_aligned([tmp_path / "a", tmp_path / "b"])


def corpora(root, train=60, dev=8, test=9, flores=(7, 6)):
    """Synthetic corpora in the published layouts, with noise: empty sides, repeats, a dev pair in
    train."""
    for lang in list(LANGUAGES)[1:]:
        pair = "-".join(sorted(("en", lang)))
        folder = root / "opus-100-corpus/v1.0/supervised" / pair
        folder.mkdir(parents=True)
        for split, count in (("train", train), ("dev", dev), ("test", test)):
            en = [f"en {split} {pair} {i}" for i in range(count)]
            x = [f"{lang} {split} {pair} {i}" for i in range(count)]
            if split == "train":
                en += ["", en[0], f"en dev {pair} 0", "fresh"]
                x += ["x", x[0], "other", f"{lang} devtest 0"]
                en += [f"other English {i}" for i in range(train)]
                x += x[:train]  # each once more
            (folder / f"opus.{pair}-{split}.en").write_text("\n".join(en) + "\n")
            (folder / f"opus.{pair}-{split}.{lang}").write_text("\n".join(x) + "\n")
    for split, count in zip(("dev", "devtest"), flores):
        folder = root / "flores200_dataset" / split
        folder.mkdir(parents=True)
        for code, language in LANGUAGES.items():
            lines = "".join(f"{code} {split} {i}\n" for i in range(count))
            (folder / f"{language.flores}.{split}").write_text(lines)
    return root


def sizes(train=20000, dev=2000, test=2000, pivot=100000, seed=0, flores_test=False):
    """What prepare reads of data.py's arguments."""
    pairs = {"train_pairs": train, "dev_pairs": dev, "test_pairs": test, "pivot_pairs": pivot}
    pairs.update(flores_pairs=None, flores_test=flores_test)
    return SimpleNamespace(**pairs, drop=list(NOISE), max_ratio=5.0, seed=seed)


def directions(rows):
    return Counter((row["src_lang"], row["tgt_lang"]) for row in rows)


def test_sampling_counts_and_disjointness(tmp_path):
    """Table 5 in small: train = sampled + FLORES dev per direction, the pivot's source disjoint
    from Stage 1."""
    languages = list(LANGUAGES)
    files, report = prepare(corpora(tmp_path), languages, sizes(20, 5, 8))
    by = {name: directions(rows) for name, rows in files.items()}
    english = [d for d in all_directions(languages) if "en" in d]
    others = [d for d in all_directions(languages) if "en" not in d]
    assert len(english) == 10 and len(others) == 20
    assert by["stage1.train"] == dict.fromkeys(english, 20 + 7)
    assert by["stage1.dev"] == dict.fromkeys(english, 5)
    assert by["test"] == {**dict.fromkeys(english, 8), **dict.fromkeys(others, 6)}
    assert by["stage2.flores"] == dict.fromkeys(others, 7)
    expected = {"empty": 1, "duplicate": 1, "in_dev_or_test": 2, "stage1": 20}
    assert {key: report["de"][key] for key in expected} == expected
    trained = {row[side] for row in files["stage1.train"] for side in ("src", "tgt")}
    source = {row["src"] for row in files["pivot.source"]}
    assert not trained & source
    for name in ("stage1.dev", "test"):
        held_out = {row[side] for row in files[name] for side in ("src", "tgt")}
        assert not held_out & (trained | source)
    assert files["pivot.source"][0]["tgt_lang"] == "en"
    assert prepare(tmp_path, languages, sizes(20, 5, 8))[0] == files
    assert prepare(tmp_path, languages, sizes(20, 5, 8, seed=1))[0] != files
    other, _ = prepare(tmp_path, languages, sizes(20, 5, 8, flores_test=True))
    rows = other.pop("test")
    assert directions(rows) == dict.fromkeys(english + others, 6)
    assert {row["origin"] for row in rows} == {"flores-200"}
    assert other == {name: files[name] for name in other}  # the rest is the same


def test_command_writes_once_and_guards_its_folder(tmp_path):
    root, out = corpora(tmp_path / "corpora"), tmp_path / "data"
    command = (ROOT / "data.py", "--data", root, "--out", out, "--train-pairs", 20)
    run(*command)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    manifest = json.loads(before["manifest.json"])
    pairs = manifest["files"]["stage1.train.jsonl"]["pairs"]
    assert len(read_rows(out / "stage1.train.jsonl")) == pairs
    assert "prepared already" in inside(*command)
    refuses(*command, "--seed", 5, says=["seed was 0, now 5"])
    assert before == {p.name: p.read_bytes() for p in out.iterdir()}

    def bad(*flags, says, data=root):
        refuses(ROOT / "data.py", "--data", data, "--out", tmp_path / "o", *flags, says=says)

    bad(data=tmp_path / "nowhere", says="no such file")
    bad(data=tmp_path, says="as published")
    bad("--languages", "en,xx", says="unknown language 'xx'")
    bad("--languages", "en", says="at least two")
    bad("--train-pairs", -5, says="must be at least 0")
    bad("--max-ratio", "nan", says="--max-ratio nan: must be at least 1")
    bad("--drop", "typos", says="--drop typos: takes duplicate, identical, length_ratio, or none")
    (root / "flores200_dataset/dev/deu_Latn.dev").unlink()
    bad(says="deu_Latn.dev")
    assert not (tmp_path / "o").exists()


def test_one_process_at_a_time(tmp_path):
    lock = claim(tmp_path / "run", {"a": 1})
    with pytest.raises(UserError, match="another process is at work"):
        claim(tmp_path / "run", {"a": 1})
    lock.close()
    claim(tmp_path / "run", {"a": 1}).close()


def test_claim_leaves_strangers_alone(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        check_claim(tmp_path / "file", {"a": 1})
    (tmp_path / "file").unlink()
    claim(tmp_path / "run", {"lr": 1, "rank": 2, "seed": 0}).close()
    with pytest.raises(UserError, match="rank was 2, now 3"):
        claim(tmp_path / "run", {"lr": 1, "rank": 3, "seed": 0, "new": 1})
    with pytest.raises(UserError, match="the run of another script"):
        claim(tmp_path / "run", {"pairs": 1, "max_ratio": 2, "seed": 0})
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="holds precious.txt"):
        claim(tmp_path, {"a": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]


def test_what_the_system_refuses_is_one_line():
    """A full disk, a pipe that nobody reads any more, a folder that is none: at whatever moment."""
    closed = os.pipe()
    os.close(closed[0])
    code = "from pathlib import Path; from support.runs import run_main; run_main(lambda: {})"
    with open("/dev/full", "w") as full:
        for what, stdout, says in (
            ("print('a' * 9)", full, "output: No space left on device"),
            ("print('a' * 9)", closed[1], "output: Broken pipe"),
            ("print('a' * 99999)", full, "output: No space left on device"),
            ("Path('data.py/x').mkdir()", subprocess.DEVNULL, "data.py/x: Not a directory"),
        ):
            command, pipes = [sys.executable, "-c", code.format(what)], {"stderr": subprocess.PIPE}
            shown = subprocess.run(command, stdout=stdout, **pipes, text=True, cwd=ROOT)
            assert shown.returncode == 2 and shown.stderr == f"-c: error: {says}\n", shown


def test_real_text_goes_through(shared, checkpoint, tokenizer):
    """Long lines, odd quotes, NBSP, Icelandic and Chinese: every kept pair survives encoding and
    decoding."""
    files, report = prepare(shared / "data", list(LANGUAGES), sizes(2000, 200, 200))
    assert all(count["stage1"] > 1000 for count in report.values())
    rows = files["stage1.train"][::37]
    examples, dropped = encode(tokenizer, rows, 100_000)
    assert dropped == 0
    for row, example in zip(rows, examples):
        assert tokenizer.decode(example.ids[example.prompt_length : -1]) == row["tgt"]


def test_language_identifier_is_restricted(shared):
    identify = language_identifier(list(LANGUAGES))
    for code, language in LANGUAGES.items():
        lines = read_lines(
            shared / "data/flores200_dataset/devtest" / f"{language.flores}.devtest"
        )[:100]
        assert sum(identify(line) == code for line in lines) >= 97, code
    with pytest.raises(UserError, match="does not know xx"):
        language_identifier(["en", "xx"])
    assert set(map(identify, ["Bonjour le monde", "Dobrý den", "x"])) <= set(LANGUAGES)


def test_an_error_of_one_rank_alone_is_said(monkeypatch, capsys):
    """A machine's first rank at once; another only if torchrun, which ends all when one has failed,
    has left it five seconds."""
    waited = []
    monkeypatch.setattr("support.runs.time.sleep", waited.append)

    def main():
        raise UserError("no space left")

    for rank, before in (("0", []), ("1", [5])):
        for name in ("RANK", "LOCAL_RANK"):
            monkeypatch.setenv(name, rank)
        for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "::1"), ("MASTER_PORT", "1")):
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as stop:
            run_main(main)
        assert (
            stop.value.code == 2
            and capsys.readouterr().err.endswith("error: no space left\n")
            and waited == before
        )
