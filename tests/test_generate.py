"""Decoding (invariants 9 and 11) and the resumable translation of files."""

import itertools
import os
import signal
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.multiprocessing as mp
from conftest import (
    ROOT,
    TORCHRUN,
    inside,
    make_checkpoint,
    naive,
    read_rows,
    refuses,
    run,
    start,
    translate_batch,
)

from generate import load_engine
from support import translations
from support.runs import Ranks, UserError, open_locked, read_json, write_jsonl
from support.translations import decoding_order, job_of, translate_jsonl


def test_mixed_batch_equals_one_sentence_at_a_time_without_cache(
    eager_folder, fast_or_none, sentences
):
    rows, plain = sentences[:24], load_engine(None, eager_folder, device="cpu")
    expected = [naive(plain, row, 20) for row in rows]
    # Rows leave the batch at different steps.
    assert {finish for _, finish in expected} == {"stop", "length"}
    assert len({text for text, _ in expected}) > 12
    engine = load_engine(None, eager_folder, device="cpu", fast=fast_or_none)
    assert translate_batch(engine, rows, 20) == expected
    assert [translate_batch(engine, [row], 20)[0] for row in rows] == expected


def test_batches_change_no_result(engine, sentences):
    together = translate_batch(engine, sentences[:20], 8)
    for size in (1, 3, 64):
        done = {i: (text, end) for i, text, end in engine.translate_each(sentences[:20], 8, size)}
        assert [done[i] for i in range(20)] == together


def test_order_is_by_length_and_keeps_directions_together():
    rows = []
    for n, t, s in itertools.product((0, 200, 31, 7, 32, 120, 15, 16, 112), ("zh", "is"), "rd"):
        rows.append({"src_lang": s, "tgt_lang": t, "src": "x" * n})
    order = [rows[i] for i in decoding_order(rows)]
    assert sorted(decoding_order(rows)) == list(range(len(rows)))
    assert all(len(a["src"]) > len(b["src"]) - 16 for a, b in itertools.combinations(order, 2))
    keys = [(len(row["src"]) // 16, row["src_lang"], row["tgt_lang"]) for row in order]
    runs = [key for key, _ in itertools.groupby(keys)]
    assert len(runs) == len(set(runs)) == 4 * 5  # four directions at each of five lengths


def test_max_new_tokens_is_exact_and_says_so(engine, plain_engine, sentences):
    rows = [row for row in sentences[:16] if naive(plain_engine, row, 3)[1] == "length"]
    assert len(rows) > 3
    cut = translate_batch(engine, rows, 3)
    assert cut == [naive(plain_engine, row, 3) for row in rows]
    assert {finish for _, finish in cut} == {"length"}


def test_a_long_sentence_does_not_shorten_its_company(engine, plain_engine, sentences):
    """Where the model's positions end, a row is cut off; one whose prompt fills them gets an empty
    output that says so."""

    def length(row):
        return len(engine.tokenizer.prompt(row["src_lang"], row["tgt_lang"], row["src"]))

    rows = sorted(sentences[:8], key=length)
    lengths = [length(row) for row in rows]
    # A frozen dataclass: this test's private copy.
    engine.model.cfg.__dict__["max_position_embeddings"] = lengths[4]
    got = translate_batch(engine, rows, 6)
    assert got[4:] == [("", "length")] * 4
    for row, n, out in zip(rows[:4], lengths, got):
        assert out == naive(plain_engine, row, min(6, lengths[4] - n))
    assert translate_batch(engine, rows[5:], 6) == got[5:]


class Killed(Exception):
    pass


class Dying:
    """An engine's tokenizer that dies at its ninth translation."""

    def __init__(self, tokenizer):
        self.tokenizer, self.calls = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def decode(self, ids):
        self.calls += 1
        if self.calls > 8:
            raise Killed
        return self.tokenizer.decode(ids)


def test_resumed_file_equals_an_unbroken_one(engine, sentences, tmp_path):
    rows, straight = sentences[:30], tmp_path / "straight.jsonl"
    done = translate_jsonl(engine, rows, straight, 4, 8, Ranks(0, 1), "")
    # Input order, unknown keys kept.
    assert [{key: row[key] for key in rows[0]} for row in done] == rows
    for row, given in zip(done, rows):
        assert (row["hyp"], row["finish"]) == translate_batch(engine, [given], 8)[0]
    out, dying = tmp_path / "stopped.jsonl", engine._replace(tokenizer=Dying(engine.tokenizer))
    with pytest.raises(Killed):
        translate_jsonl(dying, rows, out, 4, 8, Ranks(0, 1), "")
    (part,) = tmp_path.glob("stopped.jsonl.part-*")
    assert len(read_rows(part)) == 8 and not out.exists()
    part.write_bytes(part.read_bytes()[:-9])  # the kill cut the last line
    translate_jsonl(engine, rows, out, 4, 8, Ranks(0, 1), "")
    assert out.read_bytes() == straight.read_bytes()
    assert not list(tmp_path.glob("*.part-*"))


def test_a_kill_at_the_end_leaves_nothing_and_no_two_share_a_file(
    plain_engine, sentences, tmp_path
):
    out, rows = tmp_path / "out.jsonl", sentences[:3]

    def call():
        return translate_jsonl(plain_engine, rows, out, 4, 4, Ranks(0, 1), "")

    done = call()
    part = tmp_path / f"out.jsonl.part-{job_of(plain_engine, rows, 4)}-0"
    part.write_text("")  # as if killed after the file, before its parts were removed
    assert call() == done and [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]
    out.unlink()
    busy = pytest.raises(UserError, match="out.jsonl: another process is at work")
    with open_locked(part, out), busy:
        call()
    unseen = pytest.raises(UserError, match="some parts of it are not visible on this machine yet")
    with pytest.MonkeyPatch.context() as patch, unseen:
        # As if another machine's were not there yet.
        patch.setattr(translations, "read_part", lambda path: ({}, 0))
        call()
    assert call() == done


class Shouting(NamedTuple):
    identity: dict
    place: str = "nowhere"

    def translate_each(self, rows, max_new_tokens, batch_size):
        return ((i, row["src"].upper(), "stop") for i, row in enumerate(rows))


class Unseen(type(Path())):
    """A path on a shared file system that this machine has not heard of yet."""

    def exists(self):
        return False

    def read_text(self, **_):
        raise FileNotFoundError(self)


def a_rank_that_sees_late(rank, rows, out):
    meeting = f"file://{out}.meeting"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    if rank == 1:
        translations.Path = Unseen
    for _ in range(2):  # the second time the file is there
        done = translate_jsonl(Shouting({}), rows, out, 4, 8, Ranks(rank, 2), "")
        assert [row["hyp"] for row in done] == [row["src"].upper() for row in rows]
    torch.distributed.destroy_process_group()


@pytest.mark.once
def test_a_rank_that_sees_files_late_does_as_the_first(sentences, tmp_path):
    rows, out = sentences[:30], tmp_path / "out.jsonl"
    part = tmp_path / f"out.jsonl.part-{job_of(Shouting({}), rows, 8)}-0"
    done = []
    for i in decoding_order(rows)[:9]:
        done.append({"id": i, "hyp": rows[i]["src"].upper(), "finish": "stop"})
    write_jsonl(part, done)
    mp.spawn(a_rank_that_sees_late, (rows, out), nprocs=2)


@pytest.mark.once
def test_commands(adapter_folder, sentences, tmp_path):
    base = ROOT / "generate.py", "--max-new-tokens", 6
    ours = *base, "--adapter", adapter_folder
    one = run(*ours, "--src", "de", "--tgt", "is", "Der Hund.").stdout
    lines = run(*ours, "--src", "de", "--tgt", "is", input="Der Hund.\n\nDie Katze.\n").stdout
    first, second, *_ = lines.split("\n")
    assert first + "\n" == one and second == "" and lines.count("\n") == 3
    write_jsonl(tmp_path / "in.jsonl", sentences[:20])
    out = tmp_path / "out.jsonl"
    files = "--input", tmp_path / "in.jsonl", "--output", out, "--batch-size", 3
    inside(*ours, *files)
    single = out.read_bytes()
    out.unlink()
    assert "cut off" in run(*TORCHRUN, *ours, *files).stderr
    assert out.read_bytes() == single  # two processes write the same file
    refuses(*ours, *files, says="exists already")
    out.unlink()
    inside(*ours, *files, "--plain")
    assert out.read_bytes() == single
    out.unlink()
    backbone = read_json(adapter_folder / "adapter.json")["backbone"]
    inside(*base, "--model", backbone, *files)
    assert out.read_bytes() != single  # without --adapter the bare backbone translates


@pytest.mark.once
def test_kill_and_resume_command(adapter_folder, sentences, tmp_path):
    write_jsonl(tmp_path / "in.jsonl", [{**s, "n": i} for i, s in enumerate(sentences * 3)])
    base = ROOT / "generate.py", "--adapter", adapter_folder, "--input", tmp_path / "in.jsonl"
    base = *base, "--max-new-tokens", 40, "--batch-size", 2, "--output"
    straight, killed = tmp_path / "straight.jsonl", tmp_path / "killed.jsonl"
    run(*base, straight)
    process = start(*base, killed)
    deadline = time.time() + 60
    while process.poll() is None and time.time() < deadline:
        if any(p.stat().st_size > 2000 for p in tmp_path.glob("killed.jsonl.part-*")):
            break
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not killed.exists()
    run(*base, killed)
    assert killed.read_bytes() == straight.read_bytes()


def test_bad_input(adapter_folder, tmp_path, monkeypatch):
    script, ours = ROOT / "generate.py", (ROOT / "generate.py", "--adapter", adapter_folder)
    hund = "--src", "de", "--tgt", "is", "Hund"
    refuses(*ours, "--src", "de", "--tgt", "xx", "Hund", says=["--tgt xx", "known: en, de"])
    refuses(*ours, "--src", "de", "Hund", says="--tgt is needed; known: en, de")
    refuses(*ours, "--src", "de", "--tgt", "de", "Hund", says="both de")
    refuses(*ours, *hund, "--output", tmp_path / "o", says="--input goes with --output")
    refuses(script, "--adapter", tmp_path, *hund, says="no adapter.json")
    none, cut = tmp_path / "none.jsonl", tmp_path / "cut.jsonl"
    refuses(*ours, "--input", none, "--output", tmp_path / "o", says="none.jsonl")
    cut.write_text('{"src_lang": "de", "tgt_lang": "is", "src": "a"}\n{"src_l')
    refuses(*ours, "--input", cut, "--output", tmp_path / "o", says="cut.jsonl:2")
    says = "its folder does not exist"
    refuses(*ours, "--input", cut, "--output", tmp_path / "none/o", says=says)
    refuses(*ours, "--batch-size", 0, *hund, says="--batch-size 0")
    other = make_checkpoint(tmp_path / "other", seed=5)
    refuses(*ours, "--model", other, *hund, says="made for another backbone")
    says = ["trained with another prompt", "here it would be 'Translate the following"]
    refuses(*ours, "--prompt-format", "plain", *hund, says=says)
    for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "::1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    refuses(*ours, *hund, says="is for one process")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    says = ["no runs/stage2/adapter or runs/stage1/adapter", "`train.py --stage 1` makes one"]
    refuses(script, *hund, says=says)


def test_the_engine_remembers_what_a_result_depends_on(adapter_folder, checkpoint, engine):
    identity = engine.identity
    assert identity["adapter"] and identity["prompt_sha256"] and identity["backbone"]
    assert identity["engine"] in ("plain", "fast") and engine.tokenizer.format == "chat"
    bare = load_engine(str(checkpoint), None, device="cpu")
    assert bare.identity["adapter"] is None and bare.identity["backbone"] == identity["backbone"]
