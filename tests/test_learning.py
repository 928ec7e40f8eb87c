"""What it is all for: the loop is the plain one of the paper, and an adapter translates what it was
taught."""

import math
import random

import torch
from conftest import ROOT, inside, read_rows
from safetensors.torch import load_file
from test_train import command
from world import meanings, sentence

import model as backbone
from crosslora import CrossLoRA
from data import LANGUAGES, Tokenizer, encode
from support.runs import write_jsonl


def test_the_loop_is_the_plain_one(checkpoint, data, tmp_path):
    """Order, warm-up and decay of the learning rate, clipping, weight decay: eight steps written
    out, a sentence at a time. Without dropout, so that the KL is 0 and two processes of arithmetic
    can be compared at all."""
    steps, peak = 8, 1e-3
    more = f"--max-steps {steps} --dropout 0 --lr {peak} --warmup-ratio 0.5 --weight-decay 0.5"
    inside(*command(checkpoint, data, tmp_path / "run", f"{more} --max-grad-norm 0.3"))
    lm = backbone.load(checkpoint)
    examples, _ = encode(Tokenizer(checkpoint, lm.cfg), read_rows(data / "stage1.train.jsonl"))
    torch.manual_seed(0)
    adapter = CrossLoRA(lm.cfg, list(LANGUAGES), rank=4)
    optimizer = torch.optim.AdamW(adapter.parameters(), weight_decay=0.5)
    per_epoch, order = math.ceil(len(examples) / 4), []
    while len(order) < 2 * len(examples):
        order += torch.randperm(
            len(examples), generator=torch.Generator().manual_seed(len(order) // len(examples))
        ).tolist()
    log = [row for row in read_rows(tmp_path / "run/metrics.jsonl") if "lr" in row]
    assert len(log) == steps > per_epoch  # a second epoch has begun, in another order
    for step, line in enumerate(log):
        epoch, first = step // per_epoch, 4 * (step % per_epoch)
        nll = []
        for i in order[epoch * len(examples) :][: len(examples)][first : first + 4]:
            ids, start = torch.tensor(examples[i].ids).long(), examples[i].prompt_length
            logits = lm.lm_head(
                lm(ids[None], adapter([examples[i].src_lang], [examples[i].tgt_lang]))
            )[0]
            nll += [-logits[t - 1].log_softmax(-1)[ids[t]] for t in range(start, len(ids))]
        optimizer.zero_grad()
        (sum(nll) / len(nll)).backward()
        norm = sum(p.grad.square().sum() for p in adapter.parameters() if p.grad is not None).sqrt()
        for p in adapter.parameters():
            if p.grad is not None:
                p.grad *= min(1.0, 0.3 / norm.item())
        optimizer.param_groups[0]["lr"] = peak * (
            (step + 1) / 4 if step < 4 else 1 - (step - 4) / 4
        )
        optimizer.step()
        assert (
            math.isclose(line["lr"], optimizer.param_groups[0]["lr"], rel_tol=1e-9)
            and line["step"] == step + 1
        )
        assert (
            math.isclose(line["nll"], (sum(nll) / len(nll)).item(), rel_tol=1e-4)
            and abs(line["kl"]) < 1e-5
        )
        assert math.isclose(line["grad_norm"], norm.item(), rel_tol=1e-3)
    assert min(line["grad_norm"] for line in log) > 0.3  # it was clipped
    trained = load_file(tmp_path / "run/adapter/adapter.safetensors")
    apart = torch.cat(
        [(trained[name] - p).abs().flatten() for name, p in adapter.named_parameters()]
    )
    # AdamW turns rounding of tiny gradients into steps
    assert (apart > 2e-4).float().mean() < 1e-3 and apart.max() < 4e-3


def test_it_translates_what_it_was_taught(checkpoint, data, tmp_path):
    """train.py, then generate.py: sentences of many directions come out as their references, word
    for word, the same German one in three languages."""
    stream, rng = meanings(random.Random(7)), random.Random(8)
    drawn = [next(stream) for _ in range(4)]
    ways = [(m, "de", t) for m in drawn[:2] for t in ("zh", "is", "en")]
    ways += [(m, *rng.sample(list(LANGUAGES), 2)) for m in drawn[2:] * 3]
    rows = []
    for m, s, t in dict.fromkeys(ways):
        rows.append({"src_lang": s, "tgt_lang": t, "src": sentence(m, s), "tgt": sentence(m, t)})
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("config.json", "manifest.json", "stage1.dev.jsonl"):
        (folder / name).write_bytes((data / name).read_bytes())
    write_jsonl(folder / "stage1.train.jsonl", rows)
    write_jsonl(tmp_path / "rows.jsonl", rows)
    base = (ROOT / "generate.py", "--input", tmp_path / "rows.jsonl", "--max-new-tokens", 60)
    where = "--model", checkpoint, "--data", folder, "--out", tmp_path / "run"
    small = "--epochs 150 --batch-size 4 --lr 1e-2 --warmup-ratio 0.05 --dropout 0 --rdrop-alpha 0"
    inside(ROOT / "train.py", "--stage", 1, *where, *small.split(), "--save-every", 1000)
    inside(*base, "--adapter", tmp_path / "run/adapter", "--output", tmp_path / "out.jsonl")
    for row in read_rows(tmp_path / "out.jsonl"):
        assert (row["hyp"], row["finish"]) == (row["tgt"], "stop"), row
    inside(*base, "--model", checkpoint, "--output", tmp_path / "bare.jsonl")
    assert not any(row["hyp"] == row["tgt"] for row in read_rows(tmp_path / "bare.jsonl"))
