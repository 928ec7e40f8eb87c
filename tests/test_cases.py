"""Inputs that other people's tools fell over: text that can't be seen, damaged files, environments
taken at face value, folders under two names, odd checkpoints."""

import contextlib
import io
import json
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, inside, make_checkpoint, read_rows, refuses, run, start
from safetensors.torch import load_file, save_file

import model as backbone
from data import LANGUAGES, Tokenizer
from pivot import PseudoCorpus
from support.corpora import clean, read_jsonl
from support.report import compare, curves, heat_maps
from support.runs import (
    Launch,
    UserError,
    file_errors,
    launch,
    print_cost,
    read_json,
    replacing,
    write_json,
)
from support.scores import score
from support.text import comparable, is_empty, is_repetitive
from support.translations import report_cut

pytestmark = pytest.mark.once

UNSEEN = ["\u200b", "\u00ad", "\ufeff", "\u2060", "\u200e", " \u00a0\u200d\t"]


# --- A: what is text, what is empty, what is equal ------------------------------------------------


def test_texts_are_equal_as_a_reader_sees_them():
    assert comparable("Cafe\u0301 \u00a0 de\u200b \ufeffla\u00ad paix\n") == "Caf\u00e9 de la paix"
    assert comparable("e\u200b\u0301") == "\u00e9"  # what can't be seen does not keep them apart
    assert comparable("a b") != comparable("ab") and comparable("A") != comparable("a")
    assert comparable("\u4f60\u597d\u3000\u4e16\u754c") == "\u4f60\u597d \u4e16\u754c"
    assert all(map(is_empty, ["", " \n", *UNSEEN])) and not is_empty(".")


@pytest.mark.parametrize(
    "leak",
    ["Cafe\u0301 ouvert", "Caf\u00e9\u00a0ouvert", "Caf\u00e9  ouvert", "Caf\u00e9 \u200bouvert"]
    + ["Caf\u00e9 ou\u00advert", "\ufeffCaf\u00e9 ouvert", "Caf\u00e9 ouvert\u200b "],
)
def test_no_spelling_of_a_test_sentence_is_trained_on(leak):
    held_out = {comparable("Caf\u00e9 ouvert")}
    assert clean([("Open", leak)], set(), held_out, (), 99)[1]["in_dev_or_test"] == 1
    pairs = [
        ("One", "Caf\u00e9 ouvert"),
        ("One", leak),
        ("x", "\u200b"),
        (leak, "Caf\u00e9 ouvert"),
    ]
    kept, count = clean(pairs, set(), set(), ("duplicate", "identical"), 99)
    assert kept == pairs[:1]
    assert (count["duplicate"], count["empty"], count["identical"]) == (1, 1, 1)
    kept, _ = clean([("One", leak)], set(), set(), (), 99)
    assert kept == [("One", leak)]  # what is kept stays as it was


def test_the_pivot_counts_unseen_text_as_empty_and_spellings_as_duplicates():
    corpus = PseudoCorpus({"de": ["a", "b", "c"], "cs": ["d"]}, 3, lambda text: "cs", 99)
    row = {"x_lang": "de", "tgt_lang": "cs", "src": "e", "finish": "stop"}
    corpus.add(
        [{**row, "x": x, "hyp": hyp} for x, hyp in (("a", "Kafe\u0301"), ("b", "Kaf\u00e9"))]
    )
    corpus.add([{**row, "x": "c", "hyp": "\u200b"}])
    counts = corpus.counts["de", "cs"]
    assert counts["duplicate"] == counts["empty"] == 1
    assert [pair["tgt"] for pair in corpus.kept["de", "cs"].values()] == ["Kafe\u0301"]


def test_going_round_in_circles_is_seen():
    for text in (
        "\u00feess a\u00f0 \u00feess a\u00f0 \u00feess a\u00f0 fara",
        "ja, ja, ja, ja, ja, ja, ja",
    ):
        assert is_repetitive(text)
    for text in ("1 000 000 000", "------------", "Ja, ja, das ist gut.", "Das Das Haus"):
        assert not is_repetitive(text)


def test_scores_take_unseen_text_for_empty():
    rows = [{"src": "a", "tgt": "Gut.", "hyp": hyp} for hyp in ("Gut.", "\u200b", "\ufeff ")]
    found = score(rows, "de", lambda text: "de")
    assert found["empty"] == found["off_target"] == pytest.approx(200 / 3)


def test_stdin_drops_a_byte_order_mark_and_keeps_unseen_lines_empty(adapter_folder, monkeypatch):
    def translated(text):
        stdin = SimpleNamespace(buffer=io.BytesIO(text.encode()))
        monkeypatch.setattr(sys, "stdin", stdin)
        command = ROOT / "generate.py", "--adapter", adapter_folder, "--device", "cpu"
        return inside(*command, "--src", "de", "--tgt", "is", "--max-new-tokens", 5)

    plain = translated("Der Hund.\nDie Katze.\n")
    assert translated("\ufeffDer Hund.\nDie Katze.\n") == plain
    with_unseen = translated("".join(f"{text}\n" for text in UNSEEN) + "Der Hund.\n")
    assert with_unseen == "\n" * len(UNSEEN) + plain.splitlines()[0] + "\n"


def test_jsonl_without_text_is_named(tmp_path):
    for text in UNSEEN:
        row = {"src_lang": "de", "tgt_lang": "is", "src": text, "tgt": "x"}
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
        with pytest.raises(UserError, match="rows.jsonl:1: 'src' is empty"):
            read_jsonl(tmp_path / "rows.jsonl", LANGUAGES)
    (tmp_path / "rows.jsonl").write_text(json.dumps([row], indent=1))
    with pytest.raises(UserError, match="rows.jsonl:1: not a whole JSON object, one per line"):
        read_jsonl(tmp_path / "rows.jsonl", LANGUAGES)


# --- B: errors of libraries, F: files as they are written -----------------------------------------


@contextlib.contextmanager
def full_disk(size):
    """Writing past `size` bytes fails, as on a full disk, with another reason."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def torch_writes(path):
    with open(path, "wb") as file:
        torch.save({"a": torch.ones(300_000)}, file)


def safetensors_writes(path):
    save_file({"a": torch.ones(300_000)}, path)


def text_writes(path):
    path.write_text("x" * 1_200_000)


@pytest.mark.parametrize("write", [torch_writes, safetensors_writes, text_writes])
def test_a_full_disk_is_one_line_and_keeps_the_old_file(write, tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    refused = pytest.raises(UserError, match=f"{path}: File too large")
    with full_disk(200_000), refused, replacing(path) as temporary:
        write(temporary)
    assert path.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["file"]
    with replacing(path) as temporary:
        write(temporary)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask()


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_files_that_others_may_read(adapter_folder):
    for name in ("adapter.safetensors", "adapter.json"):
        assert stat.S_IMODE((adapter_folder / name).stat().st_mode) == 0o666 & ~umask()


@pytest.fixture
def train_command(checkpoint, data):
    def command(out, *flags):
        settings = ["--rank", 4, "--micro-batch-size", 16, "--device", "cpu", "--max-steps", 2]
        where = ["--model", checkpoint, "--data", data, "--out", out]
        return [ROOT / "train.py", "--stage", 1, *where, *settings, *flags]

    return command


@pytest.mark.parametrize("size", [0, 5000])
def test_a_damaged_checkpoint_says_what_to_remove(size, train_command, tmp_path):
    inside(*train_command(tmp_path / "run"))
    (tmp_path / "run/summary.json").unlink()
    os.truncate(tmp_path / "run/checkpoint.pt", size)
    says = ["run/checkpoint.pt: ", "cut off or damaged; remove it to start the run over"]
    refuses(*train_command(tmp_path / "run"), says=says)


@pytest.mark.parametrize("size", [None, 0, 50])
def test_a_log_that_was_cut_is_not_filled_up(size, train_command, tmp_path):
    command = train_command(tmp_path / "run", "--log-every", 1)
    inside(*command)
    (tmp_path / "run/summary.json").unlink()
    log = tmp_path / "run/metrics.jsonl"
    if size is None:
        log.unlink()
    else:
        os.truncate(log, size)
    inside(*command)
    assert "\0" not in log.read_text()


def test_a_file_that_may_not_be_read_says_so(tmp_path):
    with pytest.raises(UserError, match="x: Permission denied"), file_errors("x"):
        raise PermissionError(13, "Permission denied", "x")
    with pytest.raises(UserError, match="x: Permission denied"), file_errors("x"):
        raise RuntimeError("I/O error: Permission denied (os error 13)")


def test_figures_whatever_the_backend_and_the_names(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    heat_maps({"en-de": {"bleu": 1.0}}, tmp_path / "maps")
    assert (tmp_path / "maps/bleu.png").stat().st_size > 1000
    odd = tmp_path / "a$b_{c$"
    odd.mkdir()
    step = {"step": 1, "lr": 1e-3, "nll": 1.0, "kl": 0.1}
    (odd / "metrics.jsonl").write_text(json.dumps(step) + "\n")
    curves([str(odd)], str(tmp_path / "curves.png"))
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_translations_are_utf_8_whatever_the_locale(adapter_folder):
    command = ROOT / "generate.py", "--adapter", adapter_folder, "--src", "de", "--tgt", "zh"
    text = "Der Hund schl\u00e4ft.", "--max-new-tokens", 8, "--device", "cpu"
    env = {"PYTHONIOENCODING": "ascii"}
    ours = run(*command, *text, env_add=env, encoding="utf-8")
    assert ours.stdout == run(*command, *text, encoding="utf-8").stdout


# --- C: the environment ---------------------------------------------------------------------------


def test_a_rank_without_a_world_is_rank_0(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert launch() == Launch(0, 1, 0, 1)
    monkeypatch.setenv("RANK", "1")
    assert launch() == Launch(0, 1, 0, 1)
    for empty in ("", "1", " "):
        monkeypatch.setenv("WORLD_SIZE", empty)
        assert launch() == Launch(0, 1, 0, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE=2 in the environment, but no .*torchrun"):
        launch()
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="WORLD_SIZE=two in the environment is no number"):
        launch()


def test_a_lone_rank_trains_and_names_its_device(train_command, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    printed = inside(*train_command(tmp_path / "run"))
    assert "steps on cpu in float32" in printed and (tmp_path / "run/summary.json").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    refuses(*train_command(tmp_path / "other"), says="start several processes by torchrun")


# --- D: identity of files and folders -------------------------------------------------------------


def test_a_folder_is_the_same_by_any_of_its_names(train_command, data, tmp_path, monkeypatch):
    inside(*train_command(tmp_path / "run"))
    monkeypatch.chdir(data)
    for name in (".", f"{data}/", os.path.relpath(data)):
        again = [name if part == data else part for part in train_command(tmp_path / "run")]
        assert "finished already" in inside(*again)


def test_finished_is_said_only_where_it_is_so(train_command, tmp_path):
    inside(*train_command(tmp_path / "run"))
    before = load_file(tmp_path / "run/adapter/adapter.safetensors")
    shutil.rmtree(tmp_path / "run/adapter")
    assert "finished already" not in inside(*train_command(tmp_path / "run"))
    after = load_file(tmp_path / "run/adapter/adapter.safetensors")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_folders_that_are_none(train_command, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    refuses(*train_command(tmp_path / "link"), says="link: a link that leads nowhere")
    (tmp_path / "used").mkdir()
    (tmp_path / "used/.DS_Store").write_text("")
    inside(*train_command(tmp_path / "used"))
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/train.log").write_text("")
    refuses(*train_command(tmp_path / "logs"), says="logs: holds train.log")


def test_a_home_folder_that_the_shell_leaves(train_command, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    inside(*train_command("~/run"))
    assert (tmp_path / "run/summary.json").exists()


def test_a_table_has_names_and_says_what_its_averages_are_of(tmp_path, monkeypatch):
    for name, directions in (("one", ["en-de"]), ("two", ["en-de", "de-en"])):
        scores = {direction: {"bleu": 1.0} for direction in directions}
        (tmp_path / name).mkdir()
        averages = {"english": {"bleu": 1.0}, "average": {"bleu": 1.0}}
        write_json(tmp_path / name / "scores.json", {"averages": averages, "directions": scores})
    monkeypatch.chdir(tmp_path / "one")
    assert "| one |" in compare(["."], False)
    both = compare([tmp_path / "one", tmp_path / "two"], False)
    assert "The averages are of different directions (one 1, two 2)." in both
    assert "different" not in compare([tmp_path / "one", tmp_path / "one"], False)


# --- E: checkpoints that transformers loads -------------------------------------------------------


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_tied_head_may_be_published_if_it_is_the_embeddings(tmp_path):
    folder = make_checkpoint(tmp_path / "tied")
    assert read_json(folder / "config.json")["tie_word_embeddings"]
    before = backbone.load(folder).fingerprint()

    def publish(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # of old files

    change_weights(folder, publish)
    assert backbone.load(folder).fingerprint() == before

    def differ(tensors):
        tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1

    change_weights(folder, differ)
    with pytest.raises(UserError, match="ties lm_head.weight to the embeddings, but it is another"):
        backbone.load(folder)


def test_a_whole_file_counts_more_than_a_leftover_index(tmp_path):
    folder = make_checkpoint(tmp_path / "whole")
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    write_json(folder / "model.safetensors.index.json", index)
    backbone.load(folder)
    (folder / "model.safetensors").rename(folder / "kept")
    with pytest.raises(UserError, match="model-00001-of-00002.safetensors: no such file"):
        backbone.load(folder)
    for outside in ("../kept", "/etc/passwd", 7):
        write_json(folder / "model.safetensors.index.json", {"weight_map": {"a": outside}})
        with pytest.raises(UserError, match="which is no file in its folder"):
            backbone.load(folder)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "pytorch_model.bin").write_text("")
    with pytest.raises(UserError, match="read from safetensors only; transformers converts"):
        backbone.load(folder)


def test_an_unknown_rope_is_named_where_it_stands(tmp_path):
    folder = make_checkpoint(tmp_path / "rope")
    config = read_json(folder / "config.json")
    config.pop("rope_scaling", None)
    config["rope_parameters"] = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    write_json(folder / "config.json", config)
    with pytest.raises(UserError, match="rope_parameters = {'rope_type': 'yarn'"):
        backbone.Config.load(folder)


def add_token(folder, **token):
    path = folder / "tokenizer.json"
    raw = read_json(path)
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    raw["added_tokens"].append({**usual, **token})
    write_json(path, raw)


def test_added_words_are_text_and_unused_ids_need_no_row(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = make_checkpoint(tmp_path / "words", vocab_size=900)
    cfg = backbone.Config.load(folder)
    largest = max(token["id"] for token in read_json(folder / "tokenizer.json")["added_tokens"])
    largest = max(largest, *Tokenizer(folder, cfg).text.get_vocab().values())
    add_token(folder, id=largest + 1, content="<tool>", special=False)
    add_token(folder, id=5000, content="[PAD]", special=True)
    tokenizer = Tokenizer(folder, cfg)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    text = "Das <tool> ist [PAD] gut."
    assert tokenizer.decode(tokenizer.ids(text)) == text
    assert largest + 1 in tokenizer.ids(text) and 5000 not in tokenizer.ids(text)
    word = "Das <tool> ist gut."
    assert tokenizer.ids(word) == theirs.encode(word, add_special_tokens=False)


# --- G: messages that state the wrong cause -------------------------------------------------------


def test_what_is_not_whole_says_why(capsys):
    row = {"hyp": "x", "finish": "length"}
    report_cut([row, {**row, "hyp": ""}, {**row, "finish": "stop"}], 7)
    lines = capsys.readouterr().err.splitlines()
    assert "1 of 3 outputs were cut off at --max-new-tokens 7 or the model's" in lines[0]
    assert "1 of 3 sources alone fill the model's positions" in lines[1]


def test_a_long_command_says_what_it_took(capsys, monkeypatch):
    print_cost(59.0)
    monkeypatch.setenv("RANK", "1")
    print_cost(75.4)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    print_cost(75.4)
    said = capsys.readouterr().err
    line = re.fullmatch(r"took 0:01:15, ([\d.]+) GiB of memory at most.*\n", said)
    here = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
    assert float(line[1]) == pytest.approx(here / 2**20, abs=0.11)


def test_bad_flags_are_one_line(tmp_path):
    refuses(ROOT / "train.py", "--stage", 3, says="invalid choice")
    refuses(ROOT / "train.py", "--stage", 1, "--no-such", says="--no-such; --help lists the flags")
    pretrain = ROOT / "examples/tiny/pretrain.py", "--world", "w", "--out", "o"
    for flag, value in (("--lines", 0), ("--steps", 0), ("--phrase-steps", -1), ("--asked", 1)):
        refuses(*pretrain, flag, value, says=[f"{flag} {value}", ": must"])


def test_another_backbone_is_blamed_on_the_backbone(lm, tokenizer, adapter_folder, tmp_path):
    other = make_checkpoint(tmp_path / "other", seed=3)
    refuses(
        *(ROOT / "generate.py", "--adapter", adapter_folder, "--model", other, "--device", "cpu"),
        *("--src", "de", "--tgt", "is", "Hallo."),
        says="made for another backbone",
    )


# --- Ctrl-C before anything has begun -------------------------------------------------------------


@pytest.mark.parametrize("script", ["data", "train", "generate", "pivot", "evaluate"])
def test_ctrl_c_while_torch_is_imported_is_one_line(script):
    """Torch's import stands for itself: the signal comes as it begins."""
    interrupt = (
        "import builtins, runpy, sys\n"
        "real = builtins.__import__\n"
        "def as_torch_begins(name, *rest):\n"
        "    if name == 'torch':\n"
        "        raise KeyboardInterrupt\n"
        "    return real(name, *rest)\n"
        "builtins.__import__ = as_torch_begins\n"
        f"sys.argv = ['{script}.py']\n"
        f"runpy.run_path('{script}.py', run_name='__main__')\n"
    )
    done = run("-c", interrupt, check=False)
    assert (done.returncode, done.stderr) == (130, "stopped before it began\n")


# --- a scheduler's SIGTERM ------------------------------------------------------------------------


def test_a_run_that_is_told_to_end_leaves_a_checkpoint(train_command, tmp_path):
    straight, told = tmp_path / "straight", tmp_path / "told"
    command = train_command(straight, "--epochs", 99, "--max-steps", 150)
    inside(*command)
    command = [told if part == straight else part for part in command]
    process = start(*command, stdout=subprocess.PIPE)
    for line in process.stdout:  # its first lines come when training begins
        if line.startswith("batch "):
            break
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143 and (told / "checkpoint.pt").exists()
    assert not list(told.rglob("*.tmp"))
    inside(*command)
    weights = "adapter/adapter.safetensors"
    assert (told / weights).read_bytes() == (straight / weights).read_bytes()
    logs = [read_rows(run / "metrics.jsonl") for run in (told, straight)]
    for row in logs[0] + logs[1]:
        row.pop("seconds", None), row.pop("tokens_per_s", None)  # the clock's
    assert logs[0] == logs[1]
