"""Invariants 4 to 8: the loss, its one denominator, processes, resumption; plain and by fast/."""

import contextlib
import math
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
from conftest import (
    FAST,
    ROOT,
    TORCHRUN,
    inside,
    randomise,
    read_rows,
    refuses,
    run,
    start,
    translate_batch,
    two_machines,
)
from safetensors.torch import load_file

import model as backbone
import train
from crosslora import CrossLoRA
from data import LANGUAGES, Tokenizer, collate, encode, epoch_order
from generate import load_engine
from support.runs import Ranks, device_and_dtype, read_json, write_jsonl
from train import Loss, backward, data_parallel, evaluate_dev, forward_sums, lr_factor

ENGINES = {"plain": train, **({"fast": FAST} if FAST else {})}
both = pytest.mark.parametrize("engine", ENGINES)


def settings(**changes):
    return SimpleNamespace(
        **{"micro_batch_size": 4, "max_length": 64, "rdrop_alpha": 0.1, **changes}
    )


def setup(checkpoint, sentences, dropout=0.0):
    lm = backbone.load(checkpoint)
    adapter = randomise(CrossLoRA(lm.cfg, list(LANGUAGES), rank=4, alpha=8, dropout=dropout))
    return lm, adapter, encode(Tokenizer(checkpoint, lm.cfg), sentences[:32])[0]


def loss_of(lm, adapter, engine="plain"):
    if engine == "fast":
        FAST.prepare(lm, adapter, training=True)
    return Loss(lm, adapter, ENGINES[engine].forward_sums)


def gradients(adapter):
    return {name: p.grad.clone() for name, p in adapter.named_parameters() if p.grad is not None}


def one_process(checkpoint, sentences, size, engine="plain", **changes):
    """(sums, gradients) of an effective batch in micro-batches of `size`."""
    lm, adapter, examples = setup(checkpoint, sentences)
    args, cut = settings(micro_batch_size=size, **changes), ENGINES[engine].micro_batches
    sums = backward(loss_of(lm, adapter, engine), examples, args, Ranks(0, 1), cut)
    return sums, gradients(adapter)


def two_processes(rank, checkpoint, sentences, out, engine):
    torch.set_num_threads(1)
    meeting = f"file://{out}/meeting"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    lm, adapter, examples = setup(checkpoint, sentences)
    ranks, cut = Ranks(rank, 2), ENGINES[engine].micro_batches
    ddp = data_parallel(loss_of(lm, adapter, engine), ranks)
    sums = ranks.sum(backward(ddp, examples, settings(), ranks, cut), lm.device)
    torch.save((sums, gradients(adapter)), f"{out}/{rank}.pt")
    del ddp  # or its reducer would end the group under the lock for which gloo's thread may wait
    torch.distributed.destroy_process_group()


def close(a, b):
    assert a[1].keys() == b[1].keys()
    assert torch.allclose(a[0], b[0], rtol=1e-5)
    for name in a[1]:
        assert torch.allclose(a[1][name], b[1][name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("alpha", [0.1, 5.0])
def test_the_loss_is_eqs_7_to_9_over_two_different_passes(alpha, checkpoint, sentences):
    """backward() against two passes with the same masks and the equations in loops over tokens and
    vocabulary: value, and gradient."""
    lm, adapter, examples = setup(checkpoint, sentences, dropout=0.3)
    examples = sorted(examples[:6], key=lambda e: len(e.ids))
    torch.manual_seed(11)
    args = settings(micro_batch_size=6, rdrop_alpha=alpha)
    sums, ours = backward(loss_of(lm, adapter), examples, args, Ranks(0, 1)), gradients(adapter)
    adapter.zero_grad(set_to_none=True)
    torch.manual_seed(11)
    src_langs, tgt_langs = [e.src_lang for e in examples], [e.tgt_lang for e in examples]
    lora = adapter(src_langs * 2, tgt_langs * 2, dropout=True)
    logits = lm.lm_head(lm(collate(examples)[0].repeat(2, 1), lora))  # (2B, T, V)
    nll = kl = count = 0
    for row, example in enumerate(examples):
        for t in range(example.prompt_length, len(example.ids)):
            z1, z2 = logits[row, t - 1], logits[row + len(examples), t - 1]
            p1, p2 = z1.exp() / z1.exp().sum(), z2.exp() / z2.exp().sum()
            y = example.ids[t]
            nll = nll - (p1[y].log() + p2[y].log()) / 2  # eq. 8, times M
            # Eq. 7, times M: sums over the vocabulary.
            kl = kl + ((p1 * (p1 / p2).log()).sum() + (p2 * (p2 / p1).log()).sum()) / 2
            count += 1
    ((nll + alpha * kl) / count).backward()  # eq. 9
    assert torch.allclose(sums, torch.stack([nll, kl]).detach(), rtol=1e-3) and kl > 1
    theirs = gradients(adapter)
    assert theirs.keys() == ours.keys()
    for name, g in theirs.items():
        near = {"rtol": 1e-2, "atol": 1e-3 * float(g.abs().max()) + 1e-7}
        assert torch.allclose(ours[name], g, **near), name


@both
def test_accumulation_equals_one_batch(engine, checkpoint, sentences):
    whole = one_process(checkpoint, sentences, 32)
    close(one_process(checkpoint, sentences, 4, engine), whole)
    close(one_process(checkpoint, sentences, 1, engine), whole)


@both
def test_gradient_is_that_of_the_mean_over_target_tokens(engine, checkpoint, sentences):
    """Against the whole batch's own mean, each sentence alone and unpadded, no batching code."""
    lm, adapter, examples = setup(checkpoint, sentences)
    total, count = 0.0, 0
    for e in examples:
        ids = torch.tensor(e.ids).long()
        logits = lm.lm_head(lm(ids[None], adapter([e.src_lang], [e.tgt_lang])))[0].log_softmax(-1)
        for t in range(e.prompt_length, len(ids)):
            total, count = total - logits[t - 1, ids[t]], count + 1
    (total / count).backward()
    theirs = torch.tensor([total.item(), 0.0]), gradients(adapter)
    close(one_process(checkpoint, sentences, 4, engine), theirs)


@both
@pytest.mark.parametrize("batch", ["three languages", "one pair", "first micro-batch"])
def test_two_processes_give_one_process_gradients(batch, engine, checkpoint, sentences, tmp_path):
    """The others' experts have no gradient on either rank. Of one pair the second rank has nothing
    to do; an expert that one rank uses, and not in its last micro-batch, is added up all the
    same."""
    kept = [s for s in sentences[:32] if {s["src_lang"], s["tgt_lang"]} <= {"en", "de", "zh"}]
    if batch == "one pair":
        kept = kept[:1]
    if batch == "first micro-batch":  # of two of four each, in the order of their lengths
        one = {"src_lang": "cs", "tgt_lang": "ru", "src": "pes", "tgt": "кот"}
        kept = [one, *[s for s in sentences if s["src_lang"] not in ("cs", "ru")][:15]]
    mp.spawn(two_processes, (checkpoint, kept, tmp_path, engine), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])
    close(first, one_process(checkpoint, kept, 32))
    used = {(side, s[f"{lang}_lang"]) for s in kept for side, lang in (("A", "src"), ("B", "tgt"))}
    assert {tuple(name.split("lora_")[1].split(".")) for name in first[1]} == used


def test_precision_bf16_backbone_fp32_everything_trained(checkpoint, sentences):
    """As on a GPU: activations in bf16; adapter, its gradients and moments, log-softmax and loss in
    fp32."""
    lm = backbone.load(checkpoint, dtype=torch.bfloat16)
    torch.manual_seed(0)
    adapter = randomise(CrossLoRA(lm.cfg, list(LANGUAGES), rank=4, alpha=8, dropout=0.0))
    examples = encode(Tokenizer(checkpoint, lm.cfg), sentences[:32])[0]
    seen = []
    lm.model.norm.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    sums = backward(loss_of(lm, adapter), examples, settings(), Ranks(0, 1))
    assert set(seen) == {torch.bfloat16} and sums.dtype == torch.float32
    optimizer = torch.optim.AdamW(adapter.parameters(), fused=True)
    optimizer.step()
    for p in adapter.parameters():
        assert p.dtype == torch.float32 and (p.grad is None or p.grad.dtype == torch.float32)
        assert all(v.dtype == torch.float32 for v in optimizer.state[p].values())
    exact, _ = one_process(checkpoint, sentences, 4)
    # bf16 keeps 8 bits; the random model exaggerates them
    assert math.isclose(sums[0], exact[0], rel_tol=0.02)


def test_dtype_flag_decides_in_one_place(checkpoint, data, tmp_path):
    assert device_and_dtype("cpu") == (torch.device("cpu"), torch.float32)
    assert device_and_dtype("cpu", "bfloat16") == (torch.device("cpu"), torch.bfloat16)
    inside(*command(checkpoint, data, tmp_path / "run", "--max-steps 2 --dtype bfloat16"))
    trained = load_file(tmp_path / "run/adapter/adapter.safetensors")
    assert all(t.dtype == torch.float32 for t in trained.values())
    for fast in {None, FAST}:
        engine = load_engine(
            None, tmp_path / "run/adapter", dtype="bfloat16", device="cpu", fast=fast
        )
        assert {p.dtype for p in engine.model.parameters()} == {torch.bfloat16}
        translate_batch(engine, read_rows(data / "stage1.dev.jsonl"), 4)


@both
def test_rdrop_passes_differ_and_none_is_run_without_it(engine, checkpoint, sentences):
    lm, adapter, examples = setup(checkpoint, sentences, dropout=0.3)
    loss = loss_of(lm, adapter, engine)
    assert loss(examples[:4], 0.1, True)[2] > 1e-3
    assert abs(loss(examples[:4], 0.1, False)[2]) < 1e-4
    sizes = []
    lm.model.embed_tokens.register_forward_hook(lambda m, i, o: sizes.append(o.shape[:2].numel()))
    assert loss(examples[:4], 0, True)[2] == 0
    lengths = [len(e.ids) - 1 for e in examples[:4]]
    assert sizes == [4 * max(lengths) if engine == "plain" else sum(lengths)]


@both
def test_dev_loss_by_group(engine, checkpoint, sentences):
    lm, adapter, examples = setup(checkpoint, sentences, dropout=0.2)
    nll = {"all": 0.0, "english": 0.0}
    english = []
    for e in examples:
        one = forward_sums(lm, adapter, [e], 0, False)[1].item()
        nll["all"] += one
        if "en" in (e.src_lang, e.tgt_lang):
            nll["english"] += one
            english.append(e)
    loss = loss_of(lm, adapter, engine)
    report = evaluate_dev(loss, examples, settings(), Ranks(0, 1))
    assert math.isclose(
        report["nll"], nll["all"] / sum(e.target_count for e in examples), rel_tol=1e-4
    )
    total = report["nll"] + 0.1 * report["kl"]
    assert math.isclose(report["loss"], total, abs_tol=2e-6) and report["kl"] > 0
    mean = nll["english"] / sum(e.target_count for e in english)
    assert math.isclose(report["english"]["nll"], mean, rel_tol=1e-4)
    assert report == evaluate_dev(loss, examples, settings(), Ranks(0, 1))


def test_schedule():
    factors = [lr_factor(step, 100, 0.1) for step in range(100)]
    assert factors[:10] == [(step + 1) / 10 for step in range(10)]
    assert factors[10] == 1 and math.isclose(factors[55], 0.5)
    # The paper's warm-up ratio: 10 of Stage 1's steps.
    assert lr_factor(0, 19_686, 5e-4) == 1 / 10


def command(checkpoint, data, out, more="", *paths, stage=1):
    """train.py with small settings; `more`: flags without blanks in them."""
    where = "--model", checkpoint, "--data", data, "--out", out
    small = "--epochs 2 --batch-size 4 --lr 1e-2 --rank 4 --save-every 2 --log-every 1"
    flags = ("--stage", stage, *where, *small.split(), *more.split(), *paths)
    return ROOT / "train.py", *flags


def contents(out):
    """Every file of a run folder; the checkpoint by its values, since zip archives may differ in
    layout."""
    files = {}
    for path in out.rglob("*"):
        if path.name == "metrics.jsonl":
            files[path.name] = read_rows(path)
            for row in files[path.name]:  # the clock's fields are never the same twice
                row.pop("seconds", None)
                row.pop("tokens_per_s", None)
        elif path.is_file() and path.name != "checkpoint.pt":
            files[str(path.relative_to(out))] = path.read_bytes()
    return files, torch.load(out / "checkpoint.pt", weights_only=True)


def same_run(a, b):
    (files_a, state_a), (files_b, state_b) = contents(a), contents(b)
    assert files_a == files_b
    for key in ("step", "backbone_fingerprint"):
        assert state_a[key] == state_b[key], key
    for name in state_a["adapter"]:
        assert torch.equal(state_a["adapter"][name], state_b["adapter"][name]), name
    assert state_a["optimizer"]["state"].keys() == state_b["optimizer"]["state"].keys()
    for key, moments in state_a["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, state_b["optimizer"]["state"][key][name])


def children(pid):
    """Processes that `pid` has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it may have ended
            if int(stat.read_text().rpartition(") ")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


def wait_for_lines(process, out, lines):
    """Until out/metrics.jsonl has so many lines."""
    metrics, deadline = out / "metrics.jsonl", time.time() + 120
    while process.poll() is None and time.time() < deadline:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= lines:
            return
        time.sleep(0.005)
    raise AssertionError(f"{metrics}: no {lines} lines in it")


def kill_when(command, out, lines):
    """Start a command, and kill -9 it and its ranks once out/metrics.jsonl has so many lines."""
    process = start(*command)
    wait_for_lines(process, out, lines)
    for pid in [process.pid, *children(process.pid)]:
        os.kill(pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it was killed midway, not finished


@both
def test_kill_and_resume_is_as_if_never_stopped(engine, checkpoint, data, tmp_path):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    more = "--plain" if engine == "plain" else ""
    assert "done; the adapter is in" in run(*command(checkpoint, data, straight, more)).stdout
    for lines in (3, 7):
        kill_when(command(checkpoint, data, stopped, more), stopped, lines)
    assert "resuming at step" in run(*command(checkpoint, data, stopped, more)).stdout
    same_run(straight, stopped)
    assert "finished already" in inside(*command(checkpoint, data, stopped, more))
    same_run(straight, stopped)
    again = command(checkpoint, data, stopped, f"{more} --seed 9")
    refuses(*again, says=["other settings", "seed was 0, now 9"])
    if FAST:
        was, other = ("plain", "") if engine == "plain" else ("fast", "--plain")
        now = {"plain": "fast", "fast": "plain"}[was]
        says = f"engine was {was!r}, now {now!r}"
        refuses(*command(checkpoint, data, stopped, other), says=says)
    same_run(straight, stopped)


@pytest.mark.once
def test_two_ranks_killed_and_resumed(checkpoint, data, tmp_path):
    """On the same number of processes the same bytes, through DistributedDataParallel."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    more = "--micro-batch-size 1"  # two micro-batches per rank
    run(*TORCHRUN, *command(checkpoint, data, straight, more))
    kill_when([*TORCHRUN, *command(checkpoint, data, stopped, more)], stopped, 5)
    done = run(*TORCHRUN, *command(checkpoint, data, stopped, more))
    assert "resuming at step" in done.stdout
    assert "batch 4 = 2 processes x 1 x accumulation 2" in done.stdout
    same_run(straight, stopped)


@pytest.mark.once
def test_stage_2_under_torchrun_sees_all_data(checkpoint, data, tmp_path):
    out, pseudo = tmp_path / "two", ("--pseudo", data / "pseudo")
    more = command(checkpoint, data, out, "--micro-batch-size 2", *pseudo, stage=2)
    done = run(*TORCHRUN, *more)
    # Not "auto": resumed elsewhere it would be another.
    assert read_json(out / "config.json")["dtype"] == "float32"
    summary = read_json(out / "summary.json")
    files = ("stage1.train.jsonl", "stage2.flores.jsonl", "pseudo/pseudo.train.jsonl")
    assert summary["train_pairs"] == sum(len(read_rows(data / file)) for file in files)
    assert "batch 4 = 2 processes x 2 x accumulation 1" in done.stdout
    rows = read_rows(out / "metrics.jsonl")
    dev = [row["dev"] for row in rows if "dev" in row]
    assert set(dev[-1]) == {"english", "non_english", "nll", "kl", "loss"}
    steps = [row for row in rows if "lr" in row]
    assert steps[-1]["loss"] < steps[0]["loss"]
    for row in steps[1:]:
        assert row["kl"] > 0
        assert math.isclose(row["loss"], row["nll"] + 0.1 * row["kl"], rel_tol=1e-6)


@both
def test_one_and_two_processes_train_the_same_adapter(engine, checkpoint, data, tmp_path):
    """Same examples in the same order, same gradients, same dev loss: only rounding differs
    (dropout off)."""
    more = "--dropout 0 --micro-batch-size 2 --max-steps 6 --lr 1e-3"
    more += " --plain" if engine == "plain" else ""
    run(*command(checkpoint, data, tmp_path / "one", more))
    run(*TORCHRUN, *command(checkpoint, data, tmp_path / "two", more))
    one, two = (load_file(tmp_path / f"{n}/adapter/adapter.safetensors") for n in ("one", "two"))
    for name in one:
        # AdamW turns rounding of tiny gradients into steps
        assert torch.allclose(one[name], two[name], atol=2e-4), name
    for a, b in zip(*(read_rows(tmp_path / n / "metrics.jsonl") for n in ("one", "two"))):
        assert a.keys() == b.keys() and a["step"] == b["step"]
        a, b = a.get("dev", a), b.get("dev", b)
        assert math.isclose(a["loss"], b["loss"], rel_tol=1e-4)


@pytest.mark.once
def test_two_machines_train_what_two_processes_train(checkpoint, data, tmp_path):
    more = "--micro-batch-size 2 --max-steps 4"
    outputs = two_machines(*command(checkpoint, data, tmp_path / "machines", more))
    # The first machine alone reports.
    reports = [output for output in outputs if output]
    assert len(reports) == 1 and "4 = 2 processes x 2 x accumulation 1" in reports[0]
    run(*TORCHRUN, *command(checkpoint, data, tmp_path / "processes", more))
    same_run(tmp_path / "machines", tmp_path / "processes")


@both
def test_training_leaves_an_absent_language_alone(engine, checkpoint, data, tmp_path):
    """train.py itself, on data without Icelandic: its experts end as they were drawn, and AdamW has
    no state of them."""
    some = tmp_path / "data"
    shutil.copytree(data, some)
    rows = read_rows(data / "stage1.train.jsonl")
    without = [row for row in rows if "is" not in (row["src_lang"], row["tgt_lang"])]
    write_jsonl(some / "stage1.train.jsonl", without)
    more = "--micro-batch-size 2 --max-steps 5 --seed 3" + " --plain" * (engine == "plain")
    run(*TORCHRUN, *command(checkpoint, some, tmp_path / "run", more))
    torch.manual_seed(3)
    start = CrossLoRA(backbone.load(checkpoint).cfg, list(LANGUAGES), rank=4)
    state = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    for index, (name, p) in enumerate(start.named_parameters()):
        icelandic = name.endswith(".is")
        assert torch.equal(p, state["adapter"][name]) == icelandic, name
        assert (index not in state["optimizer"]["state"]) == icelandic, name


@pytest.mark.once
def test_bad_input_under_torchrun_shows_the_line(checkpoint, data, tmp_path):
    bad = command(checkpoint, data, tmp_path / "out", "--micro-batch-size 4")
    done = run(*TORCHRUN, *bad, check=False)
    why = "--batch-size 4 cannot be divided into 2 processes x --micro-batch-size 4"
    assert done.returncode and why in done.stderr
    assert done.stderr.count("error: --batch-size") == 1 and not (tmp_path / "out").exists()


def test_every_step_and_rank_draws_its_own_dropout(checkpoint, data, tmp_path, monkeypatch):
    """What sets the masks, in a run of one process and in what the second of two would do (it
    writes nothing)."""
    seeds, alone = {0: [], 1: []}, shutil.copytree(data, tmp_path / "no dev")
    (alone / "stage1.dev.jsonl").write_text("")
    real = torch.manual_seed

    def run_as(rank):
        def remember(seed):
            seeds[rank].append(seed)
            return real(seed)

        monkeypatch.setattr("support.runs.init_distributed", lambda *args: Ranks(rank, 1))
        monkeypatch.setattr("torch.manual_seed", remember)
        inside(*command(checkpoint, alone, tmp_path / str(rank), "--seed 7"))
        monkeypatch.undo()

    run_as(0)
    run_as(1)
    steps = read_json(tmp_path / "0/summary.json")["steps"]
    # The smaller ones: A's beginning.
    of_steps = {rank: [seed for seed in found if seed > 4096] for rank, found in seeds.items()}
    assert len(of_steps[0]) == len(of_steps[1]) == steps > 4
    assert len({*of_steps[0], *of_steps[1]}) == 2 * steps


@pytest.mark.parametrize("log_every", [1, 5, 1000])
def test_an_adapter_that_is_no_number_is_never_kept(log_every, checkpoint, data, tmp_path):
    """Whatever is logged: before each checkpoint and each adapter the run looks back at all its
    steps."""
    wild = f"--lr 1e30 --max-grad-norm 0 --epochs 2 --save-every 4 --log-every {log_every}"
    says = ["the loss is no number at step 2 on rank 0; its 4 pairs are in", "lower --lr"]
    refuses(*command(checkpoint, data, tmp_path / "out", wild), says=says)
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left <= {"config.json", "metrics.jsonl", ".lock", "not_finite.jsonl"}
    rows = read_rows(data / "stage1.train.jsonl")
    second = [rows[i] for i in epoch_order(len(rows), 0, 0)[4:8]]
    assert read_rows(tmp_path / "out/not_finite.jsonl") == second


def test_init_adapter_starts_where_the_other_ended(checkpoint, data, adapter_folder, tmp_path):
    more = "--max-steps 1 --lr 0 --alpha 8 --init-adapter"
    inside(*command(checkpoint, data, tmp_path / "a", more, adapter_folder))
    a = load_file(tmp_path / "a/adapter/adapter.safetensors")
    b = load_file(adapter_folder / "adapter.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_bad_input_is_one_line_before_any_work(checkpoint, data, adapter_folder, tmp_path):
    out = tmp_path / "out"

    def bad(more="", *paths, says, model=checkpoint, data=data, stage=1):
        refuses(*command(model, data, out, more, *paths, stage=stage), says=says)

    why = "--batch-size 4 cannot be divided into 1 processes x --micro-batch-size 3"
    bad("--micro-batch-size 3", says=why)
    bad("--pseudo", tmp_path, stage=2, says=["finished pivot.py run", "pivot.py` makes"])
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "pseudo.train.jsonl").write_text("")
    bad("--pseudo", empty, stage=2, says="no pairs in it; Stage 2 would be")
    bad(data=tmp_path, says=["no manifest.json", "`python data.py --source publisher` makes it"])
    bad(model="./nowhere", says="no such folder")
    bad("--dropout 1.5", says="--dropout 1.5")
    bad("--max-length 5", says="no training pair fits")
    bad("--rank 8 --alpha 8 --init-adapter", adapter_folder, says="rank was 4, now 8")
    bad("--init-adapter", adapter_folder, says="alpha was 8, now 64")
    bad("--alpha 8 --prompt-format plain --init-adapter", adapter_folder, says="prompt_sha256 was")
    bad("--pseudo", tmp_path, says="--pseudo and --stage-2-data are Stage 2's")
    bad("--stage-2-data pseudo", says="--pseudo and --stage-2-data are Stage 2's")
    numbers = "--seed -1|--max-steps -1|--epochs 0|--lr -1|--rdrop-alpha -1|--warmup-ratio 5"
    for flag in f"{numbers}|--lr nan".split("|"):
        bad(flag, says=flag)
    assert not out.exists()
    broken = tmp_path / "broken"
    shutil.copytree(data, broken)
    with open(broken / "stage1.train.jsonl", "ab") as file:
        file.write(b'{"src_lang": "de", "tg')
    lines = len(read_rows(data / "stage1.train.jsonl"))
    bad(data=broken, says=f"stage1.train.jsonl:{lines + 1}: not a whole JSON object")
    assert not out.exists()


def test_a_checkout_without_fast_says_so_once(checkpoint, data, tmp_path, monkeypatch, capsys):
    """And runs plain; with --plain it says nothing."""
    monkeypatch.setattr("support.runs.__file__", str(tmp_path / "support/runs.py"))
    inside(*command(checkpoint, data, tmp_path / "a", "--max-steps 1"))
    said = capsys.readouterr().err
    assert said.count("no fast/ in this checkout: running the plain scripts\n") == 1
    assert read_json(tmp_path / "a/config.json")["engine"] == "plain"
    inside(*command(checkpoint, data, tmp_path / "a", "--max-steps 1 --plain"))
    assert "no fast/" not in capsys.readouterr().err


PAPER = [("llama3", 8_030_261_248, 169_869_312), ("qwen2.5", 7_615_616_512, 181_665_792)]


@pytest.mark.parametrize("name, frozen, trained", PAPER)
def test_dry_run_of_the_papers_backbones(name, frozen, trained, shared, tmp_path):
    """From config.json alone: published parameter counts, the adapter's by hand, Table 5's pairs in
    batches of 32."""
    shutil.copy(shared / "tokenizers" / name / "config.json", tmp_path)
    where = "--model", tmp_path, "--data", tmp_path / "none"
    out = inside(ROOT / "train.py", "--stage", 2, "--dry-run", *where)
    assert f"{frozen:,} parameters, frozen" in out and f"{trained:,} parameters, trained" in out
    assert f"{math.ceil((10 * 20997 + 20 * 18997) / 32):,} per epoch" in out
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_dry_run_counts_what_training_sees(checkpoint, data, tmp_path):
    out = inside(*command(checkpoint, data, tmp_path / "out", "--dry-run"))
    tokenizer = Tokenizer(checkpoint, backbone.Config.load(checkpoint))
    lengths = [len(e.ids) for e in encode(tokenizer, read_rows(data / "stage1.train.jsonl"))[0]]
    short = command(checkpoint, data, tmp_path / "out", "--dry-run --max-length 5")
    refuses(*short, says="no training pair fits")
    none = "--pseudo", tmp_path / "none"
    stage_2 = inside(*command(checkpoint, data, tmp_path / "out", "--dry-run", *none, stage=2))
    assert f"{math.ceil((10 * 20997 + 20 * 18997) / 4):,} per epoch" in stage_2
    assert f"{sum(lengths):,} per epoch" in out and f"longest {max(lengths)}" in out
    assert not (tmp_path / "out").exists()
