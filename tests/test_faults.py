"""Ranks that die or hang, numbers that go wrong, bits that change, two at once. The long part is
bench/faults.py."""

import contextlib
import gc
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TORCHRUN, inside, read_rows, refuses, run, start
from safetensors.torch import load_file, save_file
from test_train import children, command, same_run, wait_for_lines

from crosslora import read_description
from support.runs import (
    TERMINATED,
    Ranks,
    UserError,
    lock_folder,
    read_json,
    what_befell,
    write_json,
    write_jsonl,
)
from support.watch import Watch
from support.weights import read_checkpoint, read_shapes, read_tensors, write_tensors

pytestmark = pytest.mark.once

# --- ranks ----------------------------------------------------------------------------------------

SHORT = "--micro-batch-size 2 --epochs 20 --max-steps 60"


@pytest.fixture(scope="module")
def straight(checkpoint, data, tmp_path_factory):
    """A run of two ranks that nobody disturbs."""
    out = tmp_path_factory.mktemp("straight") / "run"
    run(*TORCHRUN, *command(checkpoint, data, out, SHORT))
    return out


def test_torchrun_goes_on_after_a_rank_was_killed(checkpoint, data, straight, tmp_path):
    killed = tmp_path / "killed"
    process = start(
        *TORCHRUN,
        "--max-restarts=1",
        *command(checkpoint, data, killed, SHORT),
        stderr=subprocess.PIPE,
    )
    wait_for_lines(process, killed, 9)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    same_run(straight, killed)


def test_a_rank_that_hangs_ends_the_others_in_one_line(checkpoint, data, tmp_path):
    more = "--micro-batch-size 2 --epochs 200 --timeout 0.2"
    process = start(
        *TORCHRUN, *command(checkpoint, data, tmp_path / "run", more), stderr=subprocess.PIPE
    )
    wait_for_lines(process, tmp_path / "run", 5)
    hung = children(process.pid)[-1]
    os.kill(hung, signal.SIGSTOP)
    said = []
    for line in process.stderr:
        if line.startswith("train.py: error: "):
            said.append(line)
            os.kill(hung, signal.SIGKILL)  # torchrun would wait for it half a minute more
    assert process.wait(60) != 0 and len(said) == 1, said
    assert "another process hung or died; the same command continues" in said[0]
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_sigterm_ends_both_ranks_after_the_same_step(checkpoint, data, straight, tmp_path):
    told = tmp_path / "told"
    process = start(*TORCHRUN, *command(checkpoint, data, told, SHORT))
    wait_for_lines(process, told, 9)
    process.terminate()  # torchrun passes it on
    process.wait(30)
    assert read_checkpoint(told / "checkpoint.pt")["step"] >= 9
    run(*TORCHRUN, *command(checkpoint, data, told, SHORT))
    same_run(straight, told)


def test_sigterm_does_not_wait_for_the_dev_loss(checkpoint, data, tmp_path, monkeypatch):
    """All was saved before; the same command ends the epoch."""
    straight, told = tmp_path / "straight", tmp_path / "told"
    inside(*command(checkpoint, data, straight))

    def write(folder, tensors):  # as the adapter is written, at the end of an epoch
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
        raise AssertionError("it went on")

    monkeypatch.setattr("crosslora.write_tensors", write)
    with pytest.raises(SystemExit) as stop:
        inside(*command(checkpoint, data, told))
    monkeypatch.undo()
    assert stop.value.code == TERMINATED == 143
    del stop  # its frames hold the folder's lock
    gc.collect()
    assert (
        read_checkpoint(told / "checkpoint.pt")["step"]
        == len(read_rows(straight / "metrics.jsonl")) // 2 - 1
    )
    inside(*command(checkpoint, data, told))
    same_run(straight, told)


def test_a_lost_process_and_no_memory_are_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ):
        assert what_befell(error).startswith("out of memory; lower --micro-batch-size, then")
    monkeypatch.setattr(sys, "argv", ["support/../evaluate.py"])
    assert what_befell(MemoryError()).startswith("out of memory; lower --batch-size, then")
    assert what_befell(RuntimeError("Connection closed by peer")) is None  # without other processes
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    for text in ("Connection closed by peer [127.0.0.1]:1", "Timed out waiting 6000ms", "NCCL x"):
        assert "another process hung or died" in what_befell(RuntimeError(text))
    assert what_befell(RuntimeError("shapes do not match")) is None  # a bug keeps its traceback


def test_no_memory_left_is_one_line(checkpoint, data, tmp_path):
    """The host's, for real: the process may have no more than it has when training begins."""
    limit = (
        "import resource, runpy, sys, torch, train; "
        "now = 4096 * int(open('/proc/self/statm').read().split()[0]); "
        "resource.setrlimit(resource.RLIMIT_AS, (now + 200_000_000,) * 2); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    script = command(checkpoint, data, tmp_path / "run", "--batch-size 64 --micro-batch-size 64")
    big = shutil.copytree(data, tmp_path / "big")
    rows = [{**row, "tgt": "Hund " * 2000} for row in read_rows(data / "stage1.train.jsonl")]
    write_jsonl(big / "stage1.train.jsonl", rows)
    script = [big if part == data else part for part in script]
    done = run("-c", limit, *script, "--max-length", 100000, check=False)
    assert done.returncode == 2, done.stderr
    assert "out of memory; lower --micro-batch-size" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


LISTENING = """
import glob, os, sys
sys.path.insert(0, {root!r})
from support import runs
ranks = runs.init_distributed("cpu")
ranks.barrier()
own = [os.readlink(link) for link in glob.glob("/proc/self/fd/*") if os.path.islink(link)]
with open({out!r} + str(ranks.rank), "w") as file:
    for line in [*open("/proc/self/net/tcp"), *open("/proc/self/net/tcp6")]:
        fields = line.split()
        if fields[3] == "0A" and f"socket:[{{fields[9]}}]" in own:  # listening, and ours
            print(fields[1], file=file)
ranks.barrier()
"""


def test_what_we_start_listens_to_this_machine_alone(tmp_path):
    """torchrun's own store is torchrun's."""
    (tmp_path / "listening.py").write_text(LISTENING.format(root=str(ROOT), out=f"{tmp_path}/"))
    run(*TORCHRUN, tmp_path / "listening.py")
    addresses = [(tmp_path / rank).read_text().split() for rank in "01"]
    assert addresses[0] and addresses[1]
    for address in addresses[0] + addresses[1]:
        assert address.startswith("0100007F:"), address  # 127.0.0.1
    run(tmp_path / "listening.py")
    assert not (tmp_path / "0").read_text()


ENDING = """
import atexit, os, pathlib, sys
sys.path.insert(0, {root!r})
def note_threads(when):
    names = [task.read_text() for task in pathlib.Path("/proc/self/task").glob("*/comm")]
    pathlib.Path({out!r} + when + os.environ["RANK"]).write_text("".join(names))
atexit.register(note_threads, "after")  # comes after all that is registered later
from support.runs import init_distributed
ranks = init_distributed("cpu")
import torch._dynamo  # as fast/ and DistributedDataParallel do
ranks.broadcast_from_rank0(os.getpid)
note_threads("before")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the names of threads from /proc")
def test_no_thread_of_the_group_outlives_it(tmp_path):
    """It would abort Python at its end, now and then."""
    (tmp_path / "ending.py").write_text(ENDING.format(root=str(ROOT), out=f"{tmp_path}/"))
    run(*TORCHRUN, tmp_path / "ending.py")
    for rank in "01":
        assert "gloo" in (tmp_path / f"before{rank}").read_text()
        names = (tmp_path / f"after{rank}").read_text()
        assert names and "gloo" not in names, names


# --- numbers --------------------------------------------------------------------------------------


class TwoRanks(Watch):
    """As if another rank had answered."""

    def of_all_ranks(self, value):
        return [(value[0], True), value]


@pytest.mark.parametrize(
    ("norm", "nll", "says"),
    [
        (float("nan"), float("nan"), "the loss is no number at step 8 on rank 1"),
        (float("inf"), 1.0, "the gradient norm is no number at step 8 on all ranks"),
    ],
)
def test_what_went_wrong_where_and_on_what(norm, nll, says, tmp_path):
    watch, good = TwoRanks(tmp_path, Ranks(0, 1)), torch.tensor(1.0)
    for step in (5, 6):
        watch.note(step, good, torch.ones(2), [{"src": "fine"}])
    watch.check()
    watch.note(7, good, torch.ones(2), [{"src": "fine"}])
    watch.note(8, torch.tensor(norm), torch.tensor([nll, 0.0]), [{"src": "a"}, {"src": "b"}])
    watch.note(9, torch.tensor(norm), torch.tensor([nll, 0.0]), [{"src": "later"}])
    with pytest.raises(UserError, match=says):
        watch.check()
    assert read_rows(tmp_path / "not_finite.jsonl") == [{"src": "a"}, {"src": "b"}]


def test_a_dev_loss_that_is_no_number_keeps_the_checkpoint_before(checkpoint, data, tmp_path):
    """At the first epoch's end there is a checkpoint of step 4 of 5; that of step 5 goes."""
    out = tmp_path / "run"
    source = (ROOT / "train.py").read_text(encoding="utf-8")
    wild = source.replace("    report = means(sums.sum(0), args.rdrop_alpha)", "    report = BAD")
    assert wild != source
    copy = tmp_path / "train.py"
    copy.write_text(wild.replace("= BAD", "= {'loss': float('nan')}"))
    words = [copy, *command(checkpoint, data, out)[1:]]
    refuses(*words, says=["the dev loss is nan after step 5", "the last checkpoint is of before"])
    assert read_checkpoint(out / "checkpoint.pt")["step"] == 4
    assert not (out / "checkpoint.last.pt").exists() and not (out / "adapter").exists()
    inside(*command(checkpoint, data, out))  # without the fault it goes on


# --- bits -----------------------------------------------------------------------------------------


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_bit_that_changed_is_seen(tmp_path):
    adapter, checkpoint = tmp_path / "adapter.safetensors", tmp_path / "checkpoint.pt"
    tensors = {"a": torch.ones(99), "b": torch.ones((), dtype=torch.bfloat16)}
    write_tensors(adapter, tensors)
    read = read_tensors(adapter)
    assert read.keys() == tensors.keys() and all(torch.equal(read[k], tensors[k]) for k in read)
    flip(adapter, -3)
    with pytest.raises(UserError, match="adapter.safetensors: its numbers are not those"):
        read_tensors(adapter)
    torch.save({"step": 3, "a": torch.ones(999)}, checkpoint)
    assert read_checkpoint(checkpoint)["step"] == 3
    flip(checkpoint, checkpoint.stat().st_size // 2)  # within the numbers
    with pytest.raises(UserError, match="checkpoint.pt: .*cut off or damaged; remove it"):
        read_checkpoint(checkpoint)


def test_quantised_weights_are_refused_by_that_reason(tmp_path):
    save_file({"w": torch.ones(4, dtype=torch.int8)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="w is I8; of quantised checkpoints take the original"):
        read_shapes(tmp_path / "x.safetensors")


@pytest.mark.parametrize("lang", ["../x", "a/b", "", "de is", "\n"])
def test_a_language_can_not_name_a_folder(lang, adapter_folder, tmp_path):
    copy = shutil.copytree(adapter_folder, tmp_path / "adapter")
    description = read_json(copy / "adapter.json")
    description["languages"][1] = lang
    write_json(copy / "adapter.json", description)
    with pytest.raises(UserError, match="adapter.json: languages = .* can't be"):
        read_description(copy)


# --- two at once ----------------------------------------------------------------------------------


def test_a_folder_that_is_worked_in_is_left_alone(checkpoint, data, adapter_folder, tmp_path):
    out = tmp_path / "out"
    busy = "another process is at work in it"
    train = command(checkpoint, data, out)
    with contextlib.closing(lock_folder(out)):
        refuses(*train, says=[out, busy])
        assert [path.name for path in out.iterdir()] == [".lock"]
    inside(*train)
    assert load_file(out / "adapter/adapter.safetensors")


def test_two_that_prepare_the_same_data(tmp_path):
    """One does; the other does too, to the same end, or is told."""
    world = [sys.executable, ROOT / "examples/tiny/world.py", "--out", tmp_path / "world"]
    subprocess.run([*world, "--train", "60", "--dev", "4", "--test", "3"], check=True)
    flags = [ROOT / "data.py", "--data", tmp_path / "world", "--train-pairs", 20]
    run(*flags, "--out", tmp_path / "alone")
    two = [start(*flags, "--out", tmp_path / "shared", stderr=subprocess.PIPE) for _ in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in two]
    for process, error in zip(two, errors):
        assert process.returncode == 0 or "another process is at work" in error
    assert 0 in [process.returncode for process in two]
    for file in (tmp_path / "alone").glob("*.json*"):
        assert (tmp_path / "shared" / file.name).read_bytes() == file.read_bytes()
    assert not list((tmp_path / "shared").glob("*.tmp"))


def test_two_that_translate_into_one_file(adapter_folder, tmp_path):
    rows = [{"src_lang": "de", "tgt_lang": "is", "src": f"Der Hund {n}."} for n in range(4)]
    write_jsonl(tmp_path / "in.jsonl", rows)
    files = "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl"
    flags = ROOT / "generate.py", "--adapter", adapter_folder, *files, "--max-new-tokens", 4
    two = [start(*flags, stderr=subprocess.PIPE) for _ in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in two]
    codes = sorted(process.returncode for process in two)
    assert codes in ([0, 0], [0, 2]), errors  # the second may have come when all was done
    if codes == [0, 2]:
        assert any("another process is at work in it" in e or "exists already" in e for e in errors)
    assert [row["src"] for row in read_rows(tmp_path / "out.jsonl")] == [r["src"] for r in rows]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
