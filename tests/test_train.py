"""Invariants 4 to 8: the loss, its one denominator, processes, resumption."""

import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

import model as backbone
from attention import Rows
from conftest import ROOT, TORCHRUN, inside, randomise, read_rows, refuses, run, translate_batch
from crosslora import CrossLoRA
from data import LANGUAGES, Tokenizer, encode
from devices import Ranks, device_and_dtype
from files import write_jsonl
from generate import load_engine
from kernels import head_loss
from plan import saved_bytes
from train import backward, denominator, evaluate_dev, forward_sums, lr_factor


def test_rdrop_equals_the_equations_written_out():
    torch.manual_seed(0)
    hidden, head = torch.randn(5, 2, 6, requires_grad=True), torch.randn(11, 6)
    logits = [(hidden[:, p].double() @ head.double().t()) for p in range(2)]
    labels = torch.tensor([3, 0, 10, 7, 7])
    total = torch.zeros((), dtype=torch.float64)
    nll_naive, kl_naive = total.clone(), total.clone()
    for token in range(5):
        p1, p2 = (torch.exp(l[token]) / torch.exp(l[token]).sum() for l in logits)
        nll_naive = nll_naive - (torch.log(p1[labels[token]]) + torch.log(p2[labels[token]])) / 2  # eq. 8, times M
        for v in range(11):  # eq. 7, times M
            kl_naive = kl_naive + (p1[v] * torch.log(p1[v] / p2[v]) + p2[v] * torch.log(p2[v] / p1[v])) / 2
    for alpha in (0.1, 5.0):
        loss, nll, kl = head_loss(hidden, head, labels, alpha)
        assert torch.allclose(nll.double(), nll_naive, rtol=1e-5) and torch.allclose(kl.double(), kl_naive, rtol=1e-5)
        assert torch.allclose(loss.double(), nll_naive + alpha * kl_naive, rtol=1e-5)
        naive = torch.autograd.grad(3 * (nll_naive + alpha * kl_naive), hidden, retain_graph=True)[0]  # eq. 9
        assert torch.allclose(torch.autograd.grad(3 * loss, hidden)[0], naive, rtol=1e-4, atol=1e-4)


def settings(**changes):
    return SimpleNamespace(**{**dict(normalize="tokens", micro_batch_size=4, micro_batch_tokens=0, rdrop_alpha=0.1), **changes})


def setup(checkpoint, sentences, dropout=0.0):
    lm = backbone.load(checkpoint)
    adapter = randomise(CrossLoRA(lm.cfg, list(LANGUAGES), rank=4, alpha=8, dropout=dropout))
    return lm, adapter, encode(Tokenizer(checkpoint, lm.cfg), sentences[:32])[0]


def gradients(adapter):
    return {name: p.grad.clone() for name, p in adapter.named_parameters() if p.grad is not None}


def one_process(checkpoint, sentences, size, **changes):
    lm, adapter, examples = setup(checkpoint, sentences)
    sums = backward(lm, adapter, examples, settings(micro_batch_size=size, **changes), Ranks(0, 1), torch.float32)
    return sums, gradients(adapter)


def two_processes(rank, checkpoint, sentences, out, used_langs):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}/meeting", rank=rank, world_size=2)
    lm, adapter, examples = setup(checkpoint, [s for s in sentences if {s["src_lang"], s["tgt_lang"]} <= used_langs])
    sums = backward(lm, adapter, examples, settings(), Ranks(rank, 2), torch.float32)
    torch.save((sums, gradients(adapter)), f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


def close(a, b):
    assert a[1].keys() == b[1].keys()
    assert torch.allclose(a[0], b[0], rtol=1e-5)
    for name in a[1]:
        assert torch.allclose(a[1][name], b[1][name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("normalize", ["tokens", "sequences"])
def test_accumulation_equals_one_batch(normalize, checkpoint, sentences):
    whole = one_process(checkpoint, sentences, 32, normalize=normalize)
    close(one_process(checkpoint, sentences, 4, normalize=normalize), whole)
    close(one_process(checkpoint, sentences, 1, normalize=normalize), whole)


def test_gradient_is_that_of_the_mean_over_target_tokens(checkpoint, sentences):
    """Against the whole batch's own mean, each sentence alone and unpadded, no batching code."""
    lm, adapter, examples = setup(checkpoint, sentences)
    total, count = 0.0, 0
    for e in examples:
        ids = torch.tensor(e.ids).long()
        logits = lm.head(lm(ids[None], adapter([e.src_lang], [e.tgt_lang])))[0].log_softmax(-1)
        for t in range(e.prompt_length, len(ids)):
            total, count = total - logits[t - 1, ids[t]], count + 1
    (total / count).backward()
    close(one_process(checkpoint, sentences, 4), (torch.tensor([total.item(), 0.0]), gradients(adapter)))


def test_two_processes_give_one_process_gradients(checkpoint, sentences, tmp_path):
    some = {"en", "de", "zh"}  # the other experts must have no gradient, on either rank
    mp.spawn(two_processes, (checkpoint, sentences, tmp_path, some), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])
    kept = [s for s in sentences if {s["src_lang"], s["tgt_lang"]} <= some]
    close(first, one_process(checkpoint, kept, 32))
    assert not [name for name in first[1] if name.split(".")[-1] not in some]


def test_a_training_step_is_eq_9_over_two_different_passes(checkpoint, sentences):
    """backward() against two passes written out, with the same masks: value, and gradient of NLL + alpha KL."""
    lm, adapter, examples = setup(checkpoint, sentences, dropout=0.3)
    examples = sorted(examples[:6], key=lambda e: (e.src_lang, e.tgt_lang, len(e.ids)))
    torch.manual_seed(11)
    sums = backward(lm, adapter, examples, settings(micro_batch_size=6, rdrop_alpha=5.0), Ranks(0, 1), torch.float32)
    ours = gradients(adapter)
    adapter.zero_grad(set_to_none=True)
    torch.manual_seed(11)
    twice = [e for e in examples for _ in range(2)]
    tokens = torch.tensor([token for e in twice for token in e.ids[:-1]])
    targets, lengths = [len(e.ids) - e.prompt_length for e in examples], [len(e.ids) - 1 for e in twice]
    ends = list(itertools.accumulate(lengths))
    lora = adapter([e.src_lang for e in examples], [e.tgt_lang for e in examples], dropout=True,
                   counts=[2 * (len(e.ids) - 1) for e in examples], last=[2 * n for n in targets])
    # The last layer draws masks for these only.
    wanted = [end - n + t for i, n in enumerate(targets) for t in range(n) for end in ends[2 * i : 2 * i + 2]]
    p = lm.head(lm(tokens[None], lora, rows=Rows.of(lengths, "cpu"), wanted=torch.tensor([wanted]))[0]).softmax(-1)
    nll = kl = count = 0
    for e in examples:
        for y in e.ids[e.prompt_length :]:
            p1, p2 = p[2 * count], p[2 * count + 1]
            nll = nll - (p1[y].log() + p2[y].log()) / 2
            kl = kl + ((p1 * (p1 / p2).log()).sum() + (p2 * (p2 / p1).log()).sum()) / 2
            count += 1
    ((nll + 5.0 * kl) / count).backward()
    assert torch.allclose(sums, torch.stack([nll, kl]).detach(), rtol=1e-3) and kl > 1
    for name, g in gradients(adapter).items():
        assert torch.allclose(ours[name], g, rtol=1e-2, atol=1e-3 * float(g.abs().max()) + 1e-7), name


def test_precision_bf16_backbone_fp32_everything_trained(checkpoint, sentences):
    """As on a GPU: activations in bf16; adapter, its gradients and moments, log-softmax and loss in fp32."""
    lm = backbone.load(checkpoint, dtype=torch.bfloat16)
    torch.manual_seed(0)
    adapter = randomise(CrossLoRA(lm.cfg, list(LANGUAGES), rank=4, alpha=8, dropout=0.0))
    examples = encode(Tokenizer(checkpoint, lm.cfg), sentences[:32])[0]
    seen = []
    lm.model.norm.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    sums = backward(lm, adapter, examples, settings(), Ranks(0, 1), torch.bfloat16)
    assert set(seen) == {torch.bfloat16} and sums.dtype == torch.float32
    optimizer = torch.optim.AdamW(adapter.parameters(), fused=True)
    optimizer.step()
    for p in adapter.parameters():
        assert p.dtype == torch.float32 and (p.grad is None or p.grad.dtype == torch.float32)
        assert all(v.dtype == torch.float32 for v in optimizer.state[p].values())
    exact, _ = one_process(checkpoint, sentences, 4)
    assert math.isclose(sums[0], exact[0], rel_tol=0.02)  # bf16 keeps 8 bits; the random model exaggerates them


def test_dtype_flag_decides_in_one_place(checkpoint, data, tmp_path):
    assert device_and_dtype("cpu") == (torch.device("cpu"), torch.float32)
    assert device_and_dtype("cpu", "bfloat16") == (torch.device("cpu"), torch.bfloat16)
    inside(*command(checkpoint, data, tmp_path / "run", "--max-steps", 2, "--micro-batch-size", 4, "--dtype", "bfloat16"))
    assert all(t.dtype == torch.float32 for t in load_file(tmp_path / "run/adapter/adapter.safetensors").values())
    engine = load_engine(None, tmp_path / "run/adapter", dtype="bfloat16", device="cpu")
    assert {p.dtype for p in engine.model.parameters()} == {torch.bfloat16} == {engine.dtype}
    translate_batch(engine, read_rows(data / "stage1.dev.jsonl"), 4)


def test_rdrop_passes_differ_and_none_is_run_without_it(checkpoint, sentences):
    lm, adapter, examples = setup(checkpoint, sentences, dropout=0.3)
    assert forward_sums(lm, adapter, examples[:4], torch.float32, 0.1, dropout=True)[2] > 1e-3
    assert abs(forward_sums(lm, adapter, examples[:4], torch.float32, 0.1, dropout=False)[2]) < 1e-4
    widths = []
    lm.model.embed_tokens.register_forward_hook(lambda m, i, o: widths.append(o.shape[1]))
    assert forward_sums(lm, adapter, examples[:4], torch.float32, 0, dropout=True)[2] == 0
    assert widths == [sum(len(e.ids) - 1 for e in examples[:4])]


def test_dev_loss_by_group(checkpoint, sentences):
    lm, adapter, examples = setup(checkpoint, sentences, dropout=0.2)
    report = evaluate_dev(lm, adapter, examples, settings(), Ranks(0, 1), torch.float32)
    nll = sum(forward_sums(lm, adapter, [e], torch.float32, 0, False)[1].item() for e in examples)
    assert math.isclose(report["nll"], nll / denominator(examples, "tokens"), rel_tol=1e-4)
    assert math.isclose(report["loss"], report["nll"] + 0.1 * report["kl"], abs_tol=2e-6) and report["kl"] > 0
    english = [e for e in examples if "en" in (e.src_lang, e.tgt_lang)]
    nll = sum(forward_sums(lm, adapter, [e], torch.float32, 0, False)[1].item() for e in english)
    assert math.isclose(report["english"]["nll"], nll / denominator(english, "tokens"), rel_tol=1e-4)
    assert report == evaluate_dev(lm, adapter, examples, settings(), Ranks(0, 1), torch.float32)


def test_schedule():
    linear = [lr_factor(s, 100, 0.1, "linear") for s in range(100)]
    assert linear[:10] == [(s + 1) / 10 for s in range(10)] and linear[10] == 1 and math.isclose(linear[55], 0.5)
    assert math.isclose(lr_factor(55, 100, 0.1, "cosine"), 0.5) and lr_factor(99, 100, 0.1, "constant") == 1
    assert lr_factor(0, 19_686, 5e-4, "linear") == 1 / 10  # the paper's warm-up ratio: 10 of Stage 1's steps


def command(checkpoint, data, out, *more, stage=1):
    return (ROOT / "train.py", "--stage", stage, "--model", checkpoint, "--data", data, "--out", out, "--epochs", 2, "--batch-size", 4,
            "--lr", "1e-2", "--rank", 4, "--save-every", 2, "--log-every", 1, *more)


def contents(out):
    """Every file of a run folder; the checkpoint by its values, since zip archives may differ in layout."""
    files = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != "checkpoint.pt"}
    return files, torch.load(out / "checkpoint.pt", weights_only=True)


def same_run(a, b):
    (files_a, state_a), (files_b, state_b) = contents(a), contents(b)
    assert files_a == files_b
    for key in ("step", "best", "log_bytes", "backbone_fingerprint"):
        assert state_a[key] == state_b[key], key
    for name in state_a["adapter"]:
        assert torch.equal(state_a["adapter"][name], state_b["adapter"][name]), name
    for key, moments in state_a["optimizer"]["state"].items():
        assert all(torch.equal(v, state_b["optimizer"]["state"][key][k]) for k, v in moments.items())


def test_kill_and_resume_is_as_if_never_stopped(checkpoint, data, tmp_path):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert "done; the adapter is in" in run(*command(checkpoint, data, straight)).stdout
    for kill_at in (3, 7):
        process = subprocess.Popen([sys.executable, *map(str, command(checkpoint, data, stopped))], cwd=ROOT, stdout=subprocess.DEVNULL,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
        metrics = stopped / "metrics.jsonl"
        deadline = time.time() + 120
        while process.poll() is None and time.time() < deadline:
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= kill_at:
                break
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL  # it was killed midway, not finished
    state = torch.load(stopped / "checkpoint.pt", weights_only=True)
    for moments in state["optimizer"]["state"].values():
        moments.update({name: x.contiguous() for name, x in moments.items()})  # as written before B's lay transposed, and by whoever else
    torch.save(state, stopped / "checkpoint.pt")
    assert "resuming at step" in run(*command(checkpoint, data, stopped)).stdout
    same_run(straight, stopped)
    assert "finished already" in inside(*command(checkpoint, data, stopped))
    same_run(straight, stopped)
    refuses(*command(checkpoint, data, stopped, "--seed", 9), says=["other settings", "seed was 0, now 9"])
    same_run(straight, stopped)


def test_stage_2_under_torchrun_sees_all_data(checkpoint, data, tmp_path):
    out = tmp_path / "two"
    done = run(*TORCHRUN, *command(checkpoint, data, out, "--pseudo", data / "pseudo", "--micro-batch-size", 2, stage=2))
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"  # not "auto": resumed elsewhere it would be another
    config = json.loads((out / "summary.json").read_text())
    files = ("stage1.train.jsonl", "stage2.flores.jsonl", "pseudo/pseudo.train.jsonl")
    assert config["train_pairs"] == sum(len(read_rows(data / file)) for file in files)
    assert "batch 4 = 2 processes x 2 x accumulation 1" in done.stdout
    rows = read_rows(out / "metrics.jsonl")
    assert {"english", "non_english", "nll", "kl", "loss"} == set([r["dev"] for r in rows if "dev" in r][-1])
    losses = [r["loss"] for r in rows if "loss" in r]
    assert losses[-1] < losses[0]
    assert all(r["kl"] > 0 and math.isclose(r["loss"], r["nll"] + 0.1 * r["kl"], rel_tol=1e-6) for r in rows if "lr" in r and r["step"] > 1)


def test_one_and_two_processes_train_the_same_adapter(checkpoint, data, tmp_path):
    """Same examples in the same order, same gradients, same dev loss: only rounding differs (dropout off)."""
    more = ("--dropout", 0, "--micro-batch-size", 2, "--max-steps", 6, "--lr", "1e-3")
    run(*command(checkpoint, data, tmp_path / "one", *more))
    run(*TORCHRUN, *command(checkpoint, data, tmp_path / "two", *more))
    one, two = (load_file(tmp_path / name / "adapter/adapter.safetensors") for name in ("one", "two"))
    for name in one:
        assert torch.allclose(one[name], two[name], atol=2e-4), name  # AdamW turns rounding of tiny gradients into steps
    for a, b in zip(*(read_rows(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))):
        assert a.keys() == b.keys() and a["step"] == b["step"]
        if "dev" in a:
            assert math.isclose(a["dev"]["loss"], b["dev"]["loss"], rel_tol=1e-4)
        else:
            assert math.isclose(a["loss"], b["loss"], rel_tol=1e-4)


def test_two_machines_train_what_two_processes_train(checkpoint, data, tmp_path):
    """Two torchrun agents of one process each, as on two machines that share the run folder; resumed on one."""
    port = socket.create_server(("127.0.0.1", 0)).getsockname()[1]

    def both_machines(out, *more):
        agents = [subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
                                    f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}",
                                    *map(str, command(checkpoint, data, out, *more))],
                                   env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True) for node in (0, 1)]
        outputs = [agent.communicate(timeout=300)[0] for agent in agents]
        assert [agent.returncode for agent in agents] == [0, 0]
        return outputs

    more = ("--micro-batch-size", 2, "--max-steps", 4)
    outputs = both_machines(tmp_path / "machines", *more)
    assert "4 = 2 processes x 2 x accumulation 1" in outputs[0] and not outputs[1]  # the first machine alone reports
    run(*TORCHRUN, *command(checkpoint, data, tmp_path / "processes", *more))
    same_run(tmp_path / "machines", tmp_path / "processes")


def test_training_leaves_an_absent_language_alone(checkpoint, data, tmp_path):
    """train.py itself, on data without Icelandic: its experts end as they were drawn, and AdamW has no state of them."""
    some = tmp_path / "data"
    shutil.copytree(data, some)
    without = [r for r in read_rows(data / "stage1.train.jsonl") if "is" not in (r["src_lang"], r["tgt_lang"])]
    write_jsonl(some / "stage1.train.jsonl", without)
    run(*TORCHRUN, *command(checkpoint, some, tmp_path / "run", "--micro-batch-size", 2, "--max-steps", 5, "--seed", 3))
    torch.manual_seed(3)
    start = CrossLoRA(backbone.load(checkpoint).cfg, list(LANGUAGES), rank=4)
    state = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    for index, (name, p) in enumerate(start.named_parameters()):
        icelandic = name.endswith(".is")
        assert torch.equal(p, state["adapter"][name]) == icelandic, name
        assert (index not in state["optimizer"]["state"]) == icelandic, name


def test_bad_input_under_torchrun_shows_the_line(checkpoint, data, tmp_path):
    done = run(*TORCHRUN, *command(checkpoint, data, tmp_path / "out", "--micro-batch-size", 4), check=False)
    assert done.returncode and "--batch-size 4 cannot be divided into 2 processes x --micro-batch-size 4" in done.stderr
    assert done.stderr.count("error: --batch-size") == 1 and not (tmp_path / "out").exists()


def test_a_run_that_diverges_stops_and_keeps_no_adapter(checkpoint, data, tmp_path):
    refuses(*command(checkpoint, data, tmp_path / "out", "--lr", "1e30", "--max-grad-norm", 0), says=["by step", "lower --lr"])
    assert not (tmp_path / "out/adapter").exists()


def test_every_step_and_rank_draws_its_own_dropout(checkpoint, data, tmp_path, monkeypatch):
    """What sets the masks, in a run of one process and in what the second of two would do (it writes nothing)."""
    seeds, alone = {0: [], 1: []}, shutil.copytree(data, tmp_path / "no dev")
    (alone / "stage1.dev.jsonl").write_text("")
    for rank, found in seeds.items():
        monkeypatch.setattr("devices.init_distributed", lambda device: Ranks(rank, 1))
        monkeypatch.setattr("torch.manual_seed", lambda seed, real=torch.manual_seed: found.append(seed) or real(seed))
        inside(*command(checkpoint, alone, tmp_path / str(rank), "--seed", 7))
        monkeypatch.undo()
    steps = json.loads((tmp_path / "0/summary.json").read_text())["steps"]
    of_steps = {rank: [seed for seed in found if seed > 4096] for rank, found in seeds.items()}  # the other: A's beginning
    assert len(of_steps[0]) == len(of_steps[1]) == steps > 4
    assert len({*of_steps[0], *of_steps[1]}) == 2 * steps


def test_what_is_logged_is_a_target_token_s_whatever_the_loss_is_divided_by(checkpoint, data, tmp_path):
    first = {}
    for by in ("tokens", "sequences"):
        inside(*command(checkpoint, data, tmp_path / by, "--normalize", by, "--max-steps", 1))
        first[by] = {k: v for k, v in read_rows(tmp_path / by / "metrics.jsonl")[0].items() if k != "grad_norm"}
    assert first["tokens"] == first["sequences"]


@pytest.mark.parametrize("log_every", [1, 5, 1000])
def test_an_adapter_that_is_no_number_is_never_kept(log_every, checkpoint, data, tmp_path):
    """Whatever is logged: before each checkpoint and each adapter the run looks back at all its steps."""
    wild = ("--lr", "1e30", "--max-grad-norm", 0, "--epochs", 2, "--save-every", 4, "--log-every", log_every, "--keep", "best")
    refuses(*command(checkpoint, data, tmp_path / "out", *wild), says=["nan by step", "lower --lr"])
    assert {p.name for p in (tmp_path / "out").iterdir()} <= {"config.json", "metrics.jsonl", ".lock"}


def test_init_adapter_starts_where_the_other_ended(checkpoint, data, adapter_folder, tmp_path):
    inside(*command(checkpoint, data, tmp_path / "a", "--max-steps", 1, "--lr", 0, "--init-adapter", adapter_folder, "--alpha", 8))
    a, b = load_file(tmp_path / "a/adapter/adapter.safetensors"), load_file(adapter_folder / "adapter.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_keep_best_keeps_the_lowest_dev_loss(checkpoint, data, tmp_path, monkeypatch):
    """The second of three epochs is the best, by losses that the test makes up for the dev set: one NLL and one KL an evaluation."""
    made_up, calls, real = [3.0, 1.0, 2.0], [], head_loss

    def scripted(hidden, weight, labels, alpha):
        loss, nll, kl = real(hidden, weight, labels, alpha)
        if not torch.is_grad_enabled():
            nll = torch.full_like(nll, made_up[len(calls) // 2] * len(labels))
            calls.append(alpha)
        return loss, nll, kl

    monkeypatch.setattr("kernels.head_loss", scripted)
    inside(*command(checkpoint, data, tmp_path / "best", "--keep", "best", "--epochs", 3))
    dev = [(round(r["dev"]["nll"], 3), r["step"]) for r in read_rows(tmp_path / "best/metrics.jsonl") if "dev" in r]
    assert [nll for nll, _ in dev] == made_up and calls == [0, 0.1] * 3
    assert json.loads((tmp_path / "best/adapter/adapter.json").read_text())["steps"] == dev[1][1] < dev[-1][1]


def test_bad_input_is_one_line_before_any_work(checkpoint, data, adapter_folder, tmp_path):
    out = tmp_path / "out"
    refuses(*command(checkpoint, data, out, "--micro-batch-size", 3),
            says="--batch-size 4 cannot be divided into 1 processes x --micro-batch-size 3")
    refuses(*command(checkpoint, data, out, stage=2), says="--pseudo")
    refuses(*command(checkpoint, data, out, "--pseudo", tmp_path, stage=2), says="finished pivot.py run")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "pseudo.train.jsonl").write_text("")
    refuses(*command(checkpoint, data, out, "--pseudo", empty, stage=2), says="no pseudo pairs")
    refuses(*command(checkpoint, tmp_path, out), says="no manifest.json")
    refuses(*command("./nowhere", data, out), says="no such folder")
    refuses(*command(checkpoint, data, out, "--dropout", 1.5), says="--dropout 1.5")
    refuses(*command(checkpoint, data, out, "--max-length", 5), says="no training pair fits")
    refuses(*command(checkpoint, data, out, "--init-adapter", adapter_folder, "--rank", 8, "--alpha", 8), says="rank was 4, now 8")
    refuses(*command(checkpoint, data, out, "--init-adapter", adapter_folder), says="alpha was 8, now 64")
    refuses(*command(checkpoint, data, out, "--pseudo", tmp_path), says="--pseudo and --stage-2-data are Stage 2's")
    refuses(*command(checkpoint, data, out, "--stage-2-data", "pseudo"), says="--pseudo and --stage-2-data are Stage 2's")
    for flag, value in (("--seed", -1), ("--max-steps", -1), ("--epochs", 0), ("--lr", -1), ("--rdrop-alpha", -1), ("--warmup-ratio", 5),
                        ("--lr", "nan")):
        refuses(*command(checkpoint, data, out, flag, value), says=f"{flag} {value}")
    assert not out.exists()
    broken = tmp_path / "broken"
    shutil.copytree(data, broken)
    with open(broken / "stage1.train.jsonl", "ab") as file:
        file.write(b'{"src_lang": "de", "tg')
    lines = len(read_rows(data / "stage1.train.jsonl"))
    refuses(*command(checkpoint, broken, out), says=f"stage1.train.jsonl:{lines + 1}: not a JSON object")
    assert not out.exists()


def test_expected_memory_is_what_autograd_keeps(checkpoint, sentences):
    """The dry run's estimate against the bytes that a micro-batch really keeps for its backward pass."""
    lm, adapter, examples = setup(checkpoint, sentences, dropout=0.1)
    examples = examples[:8]
    own = {p.untyped_storage().data_ptr() for p in [*lm.parameters(), *adapter.parameters()]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _, _ = forward_sums(lm, adapter, examples, torch.float32, 0.1, dropout=True)
    real = sum(size for size, _ in kept.values())
    tokens, targets = 2 * sum(len(e.ids) - 1 for e in examples), 2 * sum(len(e.ids) - e.prompt_length for e in examples)
    assert 0.7 < saved_bytes(lm.cfg, 1, tokens, targets, 4) / real < 1.4, saved_bytes(lm.cfg, 1, tokens, targets, 4) / real


@pytest.mark.parametrize("name, frozen, trained", [("llama3", 8_030_261_248, 169_869_312), ("qwen2.5", 7_615_616_512, 181_665_792)])
def test_dry_run_of_the_papers_backbones(name, frozen, trained, shared, tmp_path):
    """From config.json alone: published parameter counts, the adapter's by hand, Table 5's pairs in batches of 32."""
    shutil.copy(shared / "tokenizers" / name / "config.json", tmp_path)
    out = inside(ROOT / "train.py", "--stage", 2, "--dry-run", "--model", tmp_path, "--data", tmp_path / "none")
    assert f"{frozen:,} parameters, frozen" in out and f"{trained:,} parameters, trained" in out
    assert f"{math.ceil((10 * 20997 + 20 * 18997) / 32):,} an epoch" in out
    memory = re.search(r"at most [\d.]+ GiB a process(?=, bf16)", out)[0]
    assert name != "llama3" or memory in " ".join((ROOT / "README.md").read_text().split())
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_dry_run_counts_what_training_sees(checkpoint, data, tmp_path):
    out = inside(*command(checkpoint, data, tmp_path / "out", "--dry-run"))
    tokenizer = Tokenizer(checkpoint, backbone.Config.load(checkpoint))
    lengths = [len(e.ids) for e in encode(tokenizer, read_rows(data / "stage1.train.jsonl"))[0]]
    refuses(*command(checkpoint, data, tmp_path / "out", "--dry-run", "--max-length", 5), says="no training pair fits")
    stage_2 = inside(*command(checkpoint, data, tmp_path / "out", "--dry-run", stage=2))
    assert f"{math.ceil((10 * 20997 + 20 * 18997) / 4):,} an epoch" in stage_2
    assert f"{sum(lengths):,} an epoch" in out and f"longest {max(lengths)}" in out and not (tmp_path / "out").exists()
