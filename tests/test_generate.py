"""Decoding (invariants 9 and 11) and the resumable translation of files."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.multiprocessing as mp

import generate
import model as backbone
from conftest import ROOT, TORCHRUN, inside, make_checkpoint, read_rows, refuses, run, translate_batch
from devices import Ranks
from files import UserError, open_alone, write_jsonl
from generate import decoding_order, load_engine, translate_jsonl
from kernels import packed, shortlist


def naive(engine, row, max_new_tokens):
    """One sentence, no batch, no cache, no padding: the whole prefix again for every token."""
    ids = engine.tokenizer.prompt(row["src_lang"], row["tgt_lang"], row["src"])
    out = []
    with torch.no_grad():
        while len(out) < max_new_tokens:
            lora = engine.adapter([row["src_lang"]], [row["tgt_lang"]])
            token = int(engine.model.head(engine.model(torch.tensor([ids + out]), lora))[0, -1].argmax())
            if token in engine.tokenizer.stop_ids:
                return engine.tokenizer.decode(out), "stop"
            out.append(token)
    return engine.tokenizer.decode(out), "length"


def eager_to_stop(engine):
    """Random weights hardly ever say stop; lengthening that token's row makes some sentences end early."""
    weight = engine.model.model.embed_tokens.weight
    weight[engine.tokenizer.stop_ids[0]] *= 3.0
    if engine.model.shortlist:
        engine.model.shortlist = shortlist(weight)
    else:
        engine.model.lm_head.weight = packed(weight)
    return engine


def test_mixed_batch_equals_one_sentence_at_a_time_without_cache(engine, sentences):
    eager_to_stop(engine)
    rows = sentences[:24]
    expected = [naive(engine, row, 20) for row in rows]
    assert {finish for _, finish in expected} == {"stop", "length"}  # rows leave the batch at different steps
    assert len({text for text, _ in expected}) > 12
    assert translate_batch(engine, rows, 20) == expected
    assert [translate_batch(engine, [row], 20)[0] for row in rows] == expected


@pytest.mark.parametrize("slots, prompts", [(1, 1), (400, 70), (400, 2**10), (2**17, 50)])
def test_memory_bounds_change_no_result(engine, sentences, slots, prompts, monkeypatch):
    """A cache for a few rows only, prompts read a few at a time: the same translations, in whatever order they end."""
    eager_to_stop(engine)
    expected = translate_batch(engine, sentences[:24], 12)
    monkeypatch.setattr(generate, "SLOTS", {"cpu": slots})
    monkeypatch.setattr(generate, "PROMPTS", {"cpu": prompts})
    sizes, passes, where = [], [], backbone.KVCache.where

    def watched(cache, rows, heads):
        sizes.append(len(cache.k[0]))
        passes.append(len(rows.lengths) if rows.places is not None else 0)
        return where(cache, rows, heads)

    monkeypatch.setattr(backbone.KVCache, "where", watched)
    assert translate_batch(engine, sentences[:24], 12) == expected
    assert max(sizes) == 24 if slots == 2**17 else max(sizes) * 30 < max(slots, 31)  # prompts alone have 30 tokens and more
    assert max(passes) <= prompts // 30 + 1


def test_order_is_by_length_and_keeps_directions_together():
    rows = [dict(src_lang=s, tgt_lang=t, src="x" * n)
            for n in (0, 200, 31, 7, 32, 120, 15, 16, 112) for t in ("zh", "is") for s in ("ru", "de")]
    order = [rows[i] for i in decoding_order(rows)]
    assert sorted(decoding_order(rows)) == list(range(len(rows)))
    assert all(len(a["src"]) > len(b["src"]) - 16 for a, b in itertools.combinations(order, 2))
    runs = [key for key, _ in itertools.groupby((len(row["src"]) // 16, row["src_lang"], row["tgt_lang"]) for row in order)]
    assert len(runs) == len(set(runs)) == 4 * 5  # four directions at each of five lengths


def test_max_new_tokens_is_exact_and_says_so(engine, sentences):
    rows = [row for row in sentences[:16] if naive(engine, row, 3)[1] == "length"]
    assert len(rows) > 3
    for text, finish in translate_batch(engine, rows, 3):
        assert finish == "length"
    whole = [naive(engine, row, 3) for row in rows]
    assert translate_batch(engine, rows, 3) == whole


def test_a_long_sentence_does_not_shorten_its_company(engine, sentences):
    """Where the model's positions end, a row is cut off; one whose prompt fills them gets an empty output that says so."""
    rows = sorted(sentences[:8], key=lambda r: len(engine.tokenizer.prompt(r["src_lang"], r["tgt_lang"], r["src"])))
    lengths = [len(engine.tokenizer.prompt(r["src_lang"], r["tgt_lang"], r["src"])) for r in rows]
    engine.model.cfg.__dict__["max_position_embeddings"] = lengths[4]  # frozen dataclass: this test's private copy
    got = translate_batch(engine, rows, 6)
    assert got[4:] == [("", "length")] * 4
    assert got[:4] == [naive(engine, row, min(6, lengths[4] - n)) for row, n in zip(rows[:4], lengths)]
    assert translate_batch(engine, rows[5:], 6) == got[5:]


def test_resumed_file_equals_an_unbroken_one(engine, sentences, tmp_path):
    rows = sentences[:30]
    straight = translate_jsonl(engine, rows, tmp_path / "straight.jsonl", 4, 8, Ranks(0, 1), "")
    assert [{k: r[k] for k in rows[0]} for r in straight] == rows  # input order, unknown keys kept
    assert [(r["hyp"], r["finish"]) for r in straight] == [translate_batch(engine, [r], 8)[0] for r in rows]

    class Killed(Exception):
        pass

    class Dying:
        """An engine's tokenizer that dies in the middle of the third batch."""
        def __init__(self, tokenizer):
            self.tokenizer, self.calls = tokenizer, 0
        def __getattr__(self, name):
            return getattr(self.tokenizer, name)
        def prompt(self, *args):
            self.calls += 1
            if self.calls > 10:
                raise Killed
            return self.tokenizer.prompt(*args)

    out = tmp_path / "stopped.jsonl"
    with pytest.raises(Killed):
        translate_jsonl(engine._replace(tokenizer=Dying(engine.tokenizer)), rows, out, 4, 8, Ranks(0, 1), "")
    part, = tmp_path.glob("stopped.jsonl.part-*")
    assert len(read_rows(part)) == 8 and not out.exists()
    part.write_bytes(part.read_bytes()[:-9])  # the kill cut the last line
    translate_jsonl(engine, rows, out, 4, 8, Ranks(0, 1), "")
    assert out.read_bytes() == (tmp_path / "straight.jsonl").read_bytes()
    assert not list(tmp_path.glob("*.part-*"))


def test_a_kill_at_the_very_end_leaves_nothing_behind_and_no_two_share_a_file(engine, sentences, tmp_path):
    out, call = tmp_path / "out.jsonl", lambda: translate_jsonl(engine, sentences[:3], tmp_path / "out.jsonl", 4, 4, Ranks(0, 1), "")
    done = call()
    part = tmp_path / f"out.jsonl.part-{generate.job_of(engine, sentences[:3], 4)}-0"
    part.write_text("")  # as if killed after the file, before its parts were removed
    assert call() == done and [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]
    out.unlink()
    with open_alone(part, out), pytest.raises(UserError, match="out.jsonl: another process is at work"):
        call()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="not all parts of it are to be seen here yet"):
        patch.setattr(generate, "read_part", lambda path: ({}, 0))  # as if another machine's were not there yet
        call()
    assert call() == done


class Shouting(NamedTuple):
    identity: dict

    def translate_each(self, rows, max_new_tokens, batch_size):
        return ((i, row["src"].upper(), "stop") for i, row in enumerate(rows))


class Unseen(type(Path())):
    """A path on a shared file system that this machine has not heard of yet."""
    def exists(self):
        return False
    def read_text(self, **_):
        raise FileNotFoundError(self)


def a_rank_that_sees_late(rank, rows, out):
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}.meeting", rank=rank, world_size=2)
    if rank == 1:
        generate.Path = Unseen
    for _ in range(2):  # the second time the file is there
        done = translate_jsonl(Shouting({}), rows, out, 4, 8, Ranks(rank, 2), "")
        assert [row["hyp"] for row in done] == [row["src"].upper() for row in rows]
    torch.distributed.destroy_process_group()


def test_a_rank_that_sees_files_late_does_as_the_first(sentences, tmp_path):
    rows, out = sentences[:30], tmp_path / "out.jsonl"
    part = tmp_path / f"out.jsonl.part-{generate.job_of(Shouting({}), rows, 8)}-0"
    write_jsonl(part, [{"id": i, "hyp": rows[i]["src"].upper(), "finish": "stop"} for i in decoding_order(rows)[:9]])
    mp.spawn(a_rank_that_sees_late, (rows, out), nprocs=2)


def test_commands(adapter_folder, sentences, tmp_path):
    base = (ROOT / "generate.py", "--adapter", adapter_folder, "--max-new-tokens", 6)
    one = run(*base, "--src", "de", "--tgt", "is", "Der Hund.").stdout
    lines = run(*base, "--src", "de", "--tgt", "is", input="Der Hund.\n\nDie Katze.\n").stdout
    assert lines.split("\n")[0] + "\n" == one and lines.split("\n")[1] == "" and lines.count("\n") == 3
    write_jsonl(tmp_path / "in.jsonl", sentences[:20])
    files = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--batch-size", 3)
    inside(*base, *files)
    single = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").unlink()
    assert "cut off" in run(*TORCHRUN, *base, *files).stderr
    assert (tmp_path / "out.jsonl").read_bytes() == single  # two processes write the same file
    refuses(*base, *files, says="exists already")
    (tmp_path / "out.jsonl").unlink()
    backbone = json.loads((adapter_folder / "adapter.json").read_text())["backbone"]
    inside(ROOT / "generate.py", "--model", backbone, "--max-new-tokens", 6, *files)
    assert (tmp_path / "out.jsonl").read_bytes() != single  # without --adapter the bare backbone translates


def test_kill_and_resume_command(adapter_folder, sentences, tmp_path):
    write_jsonl(tmp_path / "in.jsonl", [{**s, "n": i} for i, s in enumerate(sentences * 3)])
    command = lambda out: (ROOT / "generate.py", "--adapter", adapter_folder, "--max-new-tokens", 40, "--batch-size", 2,
                           "--input", tmp_path / "in.jsonl", "--output", tmp_path / out)
    run(*command("straight.jsonl"))
    process = subprocess.Popen([sys.executable, *map(str, command("killed.jsonl"))], cwd=ROOT, stderr=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.time() + 60
    while process.poll() is None and time.time() < deadline:
        if any(p.stat().st_size > 2000 for p in tmp_path.glob("killed.jsonl.part-*")):
            break
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "killed.jsonl").exists()
    run(*command("killed.jsonl"))
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "straight.jsonl").read_bytes()


def test_bad_input(adapter_folder, tmp_path):
    base = (ROOT / "generate.py", "--adapter", adapter_folder)
    refuses(*base, "--src", "de", "--tgt", "xx", "Hund", says=["--tgt xx", "known: en, de"])
    refuses(*base, "--src", "de", "Hund", says="--tgt is needed; known: en, de")
    refuses(*base, "--src", "de", "--tgt", "de", "Hund", says="both de")
    refuses(*base, "--src", "de", "--tgt", "is", "--output", tmp_path / "o", "Hund", says="--input goes with --output")
    refuses(ROOT / "generate.py", "--src", "de", "--tgt", "is", "Hund", says="--adapter or --model is needed")
    refuses(ROOT / "generate.py", "--adapter", tmp_path, "--src", "de", "--tgt", "is", "Hund", says="no adapter.json")
    refuses(*base, "--input", tmp_path / "none.jsonl", "--output", tmp_path / "o", says="none.jsonl")
    (tmp_path / "cut.jsonl").write_text('{"src_lang": "de", "tgt_lang": "is", "src": "a"}\n{"src_l')
    refuses(*base, "--input", tmp_path / "cut.jsonl", "--output", tmp_path / "o", says="cut.jsonl:2")
    refuses(*base, "--input", tmp_path / "cut.jsonl", "--output", tmp_path / "none/o", says="its folder does not exist")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        refuses(*base, "--src", "de", "--tgt", "is", "Hund", says="work for one process")
    refuses(*base, "--batch-size", 0, "--src", "de", "--tgt", "is", "Hund", says="--batch-size 0")
    other = make_checkpoint(tmp_path / "other", seed=5)
    refuses(*base, "--model", other, "--src", "de", "--tgt", "is", "Hund", says="made for another backbone")
    refuses(*base, "--prompt-format", "plain", "--src", "de", "--tgt", "is", "Hund", says="was trained with llama3")


def test_engine_defaults_to_the_adapters_backbone(adapter_folder):
    engine = load_engine(None, adapter_folder, device="cpu")
    assert engine.tokenizer.format == "llama3" and engine.identity["adapter"]
