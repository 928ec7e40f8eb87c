"""Fine-tune CrossLoRA: Stage 1 on English-centric pairs, Stage 2 on everything (sections 3.3 and 3.4).

    torchrun --nproc_per_node=2 train.py --stage 1 --data data --out runs/stage1
    torchrun --nproc_per_node=2 train.py --stage 2 --data data --pseudo runs/pseudo --out runs/stage2

Plain `python train.py` is the same run in one process. The same command again resumes from the last checkpoint.
P passes, T tokens, N target tokens, D hidden; B rows, n experts of a learned router.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import model as backbone
from attention import Rows
from crosslora import GROUPS, ROUTES, CrossLoRA, load_adapter, read_description, router_load, save_adapter
from data import FORMATS, Tokenizer, concatenate, encode, epoch_order, group_of, read_stage_data, target_count
from devices import add_device_arguments, claim_run, device_and_dtype, dtype_name, init_distributed, sum_over_ranks
from files import UserError, at_least, claim, file_sha256, resolve, run_main, write_atomic
from kernels import head_loss
from plan import dry_run, micro_batches, pass_tokens


def forward_sums(model, adapter, examples, dtype, rdrop_alpha, dropout):
    """(loss, nll, kl) of kernels.head_loss, summed over the target tokens of a micro-batch. Where rdrop_alpha > 0, every
    row stands there twice, each copy with its own dropout, the two side by side so that they share their experts."""
    device, passes = model.device, 2 if rdrop_alpha > 0 else 1
    tokens, labels, at, lengths = concatenate(examples, passes)  # (1, T), (N,), (N, P): no pads
    lora = adapter([e.src_lang for e in examples], [e.tgt_lang for e in examples], dtype, dropout,
                   counts=[passes * (len(e.ids) - 1) for e in examples], last=[passes * target_count(e) for e in examples])
    wanted = at.view(1, -1).to(device)  # (N, P) -> (1, N*P): only these need the last layer and the head
    hidden = model(tokens.to(device), lora, rows=Rows.of(lengths, device), wanted=wanted).view(*at.shape, -1)  # (1, N*P, D) -> (N, P, D)
    return head_loss(hidden, model.head_weight(), labels.to(device), rdrop_alpha)


def direction(example):
    return example.src_lang, example.tgt_lang


def denominator(examples, normalize):
    """M of eqs. 6-8 for a whole effective batch: its target tokens, or its sequences."""
    return sum(target_count(e) for e in examples) if normalize == "tokens" else len(examples)


def backward(model, adapter, batch, args, ranks, dtype):
    """Gradients of eq. 9 for one effective batch, complete on every rank. Returns its summed [nll, kl].

    Every rank knows the whole batch and takes each world-th row, so the split cannot change the result: losses are
    sums divided once by the batch's own M, and gradients are summed over micro-batches and ranks.
    """
    M = denominator(batch, args.normalize)
    mine = sorted(batch, key=lambda e: len(e.ids))[ranks.rank :: ranks.world]  # about as many tokens for every rank
    sums = torch.zeros(2, device=model.device)
    for part in micro_batches(sorted(mine, key=direction), args):  # rows of one expert side by side
        loss, nll, kl = forward_sums(model, adapter, part, dtype, args.rdrop_alpha, dropout=True)
        (loss / M).backward()
        sums += torch.stack((nll, kl))
    if ranks.world > 1:
        sync_gradients(adapter, sums)
    return sums


def sync_gradients(adapter, sums):
    """Sum gradients and `sums` over the ranks. DistributedDataParallel would average, and would give experts that
    no rank used a zero gradient; here they keep none, so that AdamW leaves them as they are."""
    parameters = list(adapter.parameters())
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8, device=sums.device)
    dist.all_reduce(used, op=dist.ReduceOp.MAX)
    live = [p for p, u in zip(parameters, used.tolist()) if u]
    for p in live:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    parts = [sums, *(p.grad.as_strided([p.numel()], [1]) for p in live)]  # as they lie in memory: no copies but into `flat`
    flat = torch.cat(parts)  # one message a step
    dist.all_reduce(flat)
    for part, summed in zip(parts, flat.split([*map(len, parts)])):
        part.copy_(summed)


def lr_factor(step, total, warmup_ratio, schedule):
    """Share of the peak learning rate at `step` (from 0): linear warm-up over warmup_ratio * total, then `schedule`."""
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}[schedule]


@torch.no_grad()
def evaluate_dev(model, adapter, examples, args, ranks, dtype):
    """Dev loss a target token, overall and by direction group: NLL of one pass without dropout, KL of two passes
    with it (there is none without), and eq. 9's total."""
    groups = sorted({group_of(e.src_lang, e.tgt_lang) for e in examples})
    sums = torch.zeros(len(groups), 3, dtype=torch.float64)  # nll, kl, tokens
    ordered = sorted(examples, key=lambda e: len(e.ids))
    for g, group in enumerate(groups):
        rows = [e for e in ordered if group_of(e.src_lang, e.tgt_lang) == group]
        size = 2 * args.micro_batch_size
        for index in range(ranks.rank * size, len(rows), ranks.world * size):
            part = sorted(rows[index : index + size], key=direction)
            torch.manual_seed(index)  # the same masks at every evaluation
            nll = forward_sums(model, adapter, part, dtype, 0, dropout=False)[1]
            kl = forward_sums(model, adapter, part, dtype, args.rdrop_alpha, dropout=True)[2] if args.rdrop_alpha > 0 else 0.0
            sums[g] += torch.tensor([float(nll), float(kl), sum(target_count(e) for e in part)], dtype=torch.float64)
    sums = sum_over_ranks(sums, ranks, model.device)

    def report(row):
        nll, kl = (row[:2] / row[2]).tolist()
        return {"nll": round(nll, 6), "kl": round(kl, 6), "loss": round(nll + args.rdrop_alpha * kl, 6)}

    return {**report(sums.sum(0)), **{group: report(row) for group, row in zip(groups, sums)}}


@torch.no_grad()
def dev_router_load(model, adapter, examples, args, ranks, dtype):
    """Shares of the dev tokens that a learned router gives each expert, by source and by target language."""
    languages, sides = adapter.languages, ("src_lang", "tgt_lang")
    totals = torch.zeros(2, len(languages), len(languages), dtype=torch.float64)  # side, language, expert
    mine = sorted(examples, key=lambda e: len(e.ids))[ranks.rank :: ranks.world]
    for start in range(0, len(mine), args.micro_batch_size):
        part = mine[start : start + args.micro_batch_size]
        tokens, _, _, lengths = concatenate(part, 1)  # (1, T)
        lora = adapter([e.src_lang for e in part], [e.tgt_lang for e in part], dtype)
        model(tokens.to(model.device), lora, rows=Rows.of(lengths, model.device))
        for row, example in zip(router_load(lora, lengths).cpu(), part):  # (n,)
            for totals_of, side in zip(totals, sides):
                totals_of[languages.index(getattr(example, side))] += row
    totals = sum_over_ranks(totals, ranks, model.device)
    shares = totals / totals.sum(-1, keepdim=True).clamp(min=1e-9)
    rounded = [[[round(x, 4) for x in row] for row in share] for share in shares.tolist()]
    return {side: dict(zip(languages, share)) for side, share in zip(sides, rounded)}


def save_checkpoint(path, adapter, optimizer, step, best, log, fingerprint):
    """All that a resumed run needs, replaced atomically. Order and dropout are functions of (seed, epoch, step)."""
    state = {"step": step, "best": best, "log_bytes": log.tell(), "backbone_fingerprint": fingerprint,
             "adapter": adapter.state_dict(), "optimizer": optimizer.state_dict()}
    temporary = Path(f"{path}.tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, choices=[1, 2], required=True, help="section 3.3")
    parser.add_argument("--model", default="meta-llama/Meta-Llama-3-8B-Instruct",
                        help="backbone: checkpoint folder or hub name (section 4.2)")
    parser.add_argument("--data", default="data", help="folder that data.py wrote")
    parser.add_argument("--pseudo", help="Stage 2: folder that pivot.py wrote")
    parser.add_argument("--out", help="run folder; default runs/stageN")
    parser.add_argument("--stage-2-data", default="all", choices=["all", "pseudo"],
                        help="Stage 2 on everything or on the pseudo pairs alone (Table 2)")
    parser.add_argument("--init-adapter", help="start from this adapter folder, Stage 1's, instead of a fresh one (Table 2)")
    parser.add_argument("--adapter-type", default="crosslora", choices=list(ROUTES), help="router and banks (sections 3.2, 4.3, 5.2)")
    parser.add_argument("--groups", default=GROUPS, help="languages that share an expert, for --adapter-type groups (Table 4)")
    parser.add_argument("--top-k", type=int, default=1, help="experts a token, for --adapter-type molora-topk (section 4.3)")
    parser.add_argument("--rank", type=int, default=16, help="r (section 4.2)")
    parser.add_argument("--alpha", type=float, default=64, help="alpha_l; the update is scaled by alpha / r (section 4.2)")
    parser.add_argument("--dropout", type=float, default=0.1, help="LoRA dropout p (section 4.2)")
    parser.add_argument("--rdrop-alpha", type=float, default=0.1, help="weight of the KL term, eq. 9 (section 4.2); 0: one pass, eq. 6")
    parser.add_argument("--normalize", default="tokens", choices=["tokens", "sequences"], help="M of eqs. 6-8")
    parser.add_argument("--lr", type=float, default=5e-4, help="peak learning rate (section 4.2)")
    parser.add_argument("--weight-decay", type=float, default=0.02, help="of AdamW, which is our choice (section A.1)")
    parser.add_argument("--warmup-ratio", type=float, default=5e-4, help="share of all steps (section A.1)")
    parser.add_argument("--schedule", default="linear", choices=["linear", "cosine", "constant"], help="after warm-up; the paper is silent")
    parser.add_argument("--max-grad-norm", type=float, default=1.0, help="gradient clipping, 0: none; the paper is silent")
    parser.add_argument("--epochs", type=int, help="default: Stage 1 3, Stage 2 2 (section A.1)")
    parser.add_argument("--max-steps", type=int, help="stop after this many steps at the latest; for trials")
    parser.add_argument("--batch-size", type=int, default=32,
                        help="effective batch: ranks x micro-batch x accumulation, whatever the passes (section A.1)")
    parser.add_argument("--micro-batch-size", type=int, default=4,
                        help="rows of --max-length a rank and pass, where --micro-batch-tokens says nothing else (section A.1)")
    parser.add_argument("--micro-batch-tokens", type=int,
                        help="tokens a rank and pass, so that more rows share one when they are short; 0: always --micro-batch-size rows; "
                             "default: on a GPU what --micro-batch-size rows of --max-length hold, on a CPU 2^20 / intermediate_size, "
                             "since more outgrow its caches, but 384 at least")
    parser.add_argument("--max-length", type=int, default=512, help="tokens a pair, longer ones are dropped (section A.1)")
    parser.add_argument("--keep", default="last", choices=["last", "best"], help="which epoch's adapter: the last, or the lowest dev loss")
    parser.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--log-every", type=int, default=10, help="steps between lines of metrics.jsonl")
    parser.add_argument("--prompt-format", default="auto", choices=["auto", *FORMATS], help="auto: the tokenizer's own chat format")
    parser.add_argument("--dry-run", action="store_true", help="print sizes, steps and expected memory from config.json alone, and stop")
    parser.add_argument("--seed", type=int, default=0)
    add_device_arguments(parser)
    args = parser.parse_args()
    args.out = args.out or f"runs/stage{args.stage}"
    args.epochs = {1: 3, 2: 2}[args.stage] if args.epochs is None else args.epochs
    at_least(0, args, "micro_batch_tokens")
    at_least(1, args, "rank", "top_k", "epochs", "max_steps", "batch_size", "micro_batch_size", "max_length", "save_every", "log_every")
    numbers = dict.fromkeys(("alpha", "rdrop_alpha", "lr", "weight_decay", "max_grad_norm"), math.inf)
    for flag, end in {**numbers, "dropout": 1, "warmup_ratio": 1, "seed": 2**31}.items():
        if not 0 <= getattr(args, flag) < end:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must lie in [0, {end})")
    return args


def main():
    args = parse_args()
    ranks = init_distributed(args.device)
    chief = ranks.rank == 0
    if args.batch_size % (ranks.world * args.micro_batch_size):
        raise UserError(f"--batch-size {args.batch_size} cannot be divided into {ranks.world} processes x --micro-batch-size "
                        f"{args.micro_batch_size} x a whole number of accumulation steps")
    device, dtype = device_and_dtype(args.device, args.dtype)
    if args.dry_run:
        if chief:
            dry_run(args)
        return

    languages, train_rows, dev_rows, files = read_stage_data(args)
    folder, pinned = resolve(args.model)
    cfg = backbone.Config.load(folder)
    tokenizer = Tokenizer(folder, cfg, args.prompt_format)
    may_change = ("out", "micro_batch_size", "micro_batch_tokens", "device", "dry_run")  # between a stop and its resumption
    config = {k: v for k, v in vars(args).items() if k not in may_change}
    config.update(languages=languages, prompt_format=tokenizer.format, tokenizer_sha256=tokenizer.sha256, dtype=dtype_name(dtype),
                  files={f.name: file_sha256(f) for f in files})
    fresh = lambda: CrossLoRA(cfg, languages, args.rank, args.alpha, args.dropout, args.adapter_type, args.groups, args.top_k)
    with torch.device("meta"):
        adapter = fresh()  # refuses --groups and --top-k that don't fit
    if args.init_adapter:
        was = read_description(args.init_adapter)
        now = {"variant": args.adapter_type, "languages": languages, "rank": args.rank, "alpha": args.alpha, "groups": adapter.groups,
               "top_k": adapter.top_k, "prompt_format": tokenizer.format}
        differ = [f"{k} was {was[k]!r}, now {v!r}" for k, v in now.items() if was[k] != v]
        if differ:
            raise UserError(f"--init-adapter {args.init_adapter}: made with other settings ({'; '.join(differ)})")
        config["init_adapter_sha256"] = file_sha256(Path(args.init_adapter) / "adapter.safetensors")
    out = Path(args.out)
    claim(out, config, write=False)  # refuse before the long work of encoding and loading
    if ranks.of_first((out / "summary.json").exists):
        if chief:
            print(f"{out}: finished already; the adapter is in {out / 'adapter'}")
        return
    (train, dropped), (dev, dev_dropped) = (encode(tokenizer, rows, args.max_length) for rows in (train_rows, dev_rows))
    if not train:
        raise UserError(f"{files[0]}: no training pair fits --max-length {args.max_length}")

    model = backbone.load(folder, device, dtype)
    args.micro_batch_tokens = pass_tokens(args, cfg, device.type)
    fingerprint = model.fingerprint()
    torch.manual_seed(args.seed)
    adapter = fresh()
    if args.init_adapter:
        adapter.load_state_dict(load_adapter(args.init_adapter, cfg, fingerprint, tokenizer.sha256)[0].state_dict())
    adapter.to(device)

    steps_per_epoch = math.ceil(len(train) / args.batch_size)
    total = min(args.epochs * steps_per_epoch, args.max_steps or math.inf)
    parameters = sum(p.numel() for p in adapter.parameters())
    summary = {"steps": total, "trainable_parameters": parameters, "train_pairs": len(train), "train_dropped": dropped,
               "dev_pairs": len(dev), "dev_dropped": dev_dropped, "backbone_fingerprint": fingerprint, "processes": ranks.world,
               "micro_batch_size": args.micro_batch_size, "micro_batch_tokens": args.micro_batch_tokens}
    lock = claim_run(out, config, ranks)

    optimizer = torch.optim.AdamW(adapter.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    step, best, log_bytes, order = 0, math.inf, 0, None
    if ranks.of_first((out / "checkpoint.pt").exists):
        state = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)
        if state["backbone_fingerprint"] != fingerprint:
            raise UserError(f"{out}: was started on another backbone than the {args.model} of now; choose another --out")
        adapter.load_state_dict(state["adapter"])
        optimizer.load_state_dict(state["optimizer"])
        for p, moments in optimizer.state.items():  # the fused step asks no strides: they must lie in memory as p does, whoever wrote them
            moments.update({name: torch.empty_like(p).copy_(x) for name, x in moments.items() if x.shape == p.shape})
        step, best, log_bytes = state["step"], state["best"], state["log_bytes"]
        del state
    if chief:
        print(json.dumps({**config, **summary}, ensure_ascii=False))
        accumulation = args.batch_size // (ranks.world * args.micro_batch_size)
        passes = f", or as many passes as {args.micro_batch_tokens} tokens in each take" if args.micro_batch_tokens else ""
        resuming = f"; resuming at step {step}" if step else ""
        print(f"{parameters:,} trainable parameters, {parameters / sum(p.numel() for p in model.parameters()):.2%} of the backbone; "
              f"{len(train)} pairs ({dropped} over {args.max_length} tokens dropped); batch {args.batch_size} = {ranks.world} processes x "
              f"{args.micro_batch_size} x accumulation {accumulation}{passes}; {total} steps{resuming}", flush=True)

    model.pack(training=True)
    log = open(out / "metrics.jsonl" if chief else os.devnull, "ab")
    if chief:
        log.seek(log.truncate(log_bytes))  # lines that the checkpoint does not know are written again

    def write_log(line):
        log.write((json.dumps(line) + "\n").encode())
        log.flush()

    def must_be_finite(number, what):
        if not math.isfinite(number):
            raise UserError(f"{out}: {what} is {number} by step {step}; lower --lr and choose another --out")

    bar = tqdm(total=total, initial=step, desc=f"stage {args.stage}", unit="step", disable=None if chief else True)
    worst = torch.zeros((), device=device)  # the greatest gradient norm so far, looked at now and then, since that waits for a GPU
    while step < total:
        epoch, position = divmod(step, steps_per_epoch)
        if order is None or position == 0:
            order = epoch_order(len(train), args.seed, epoch)
        batch = [train[i] for i in order[position * args.batch_size : (position + 1) * args.batch_size]]
        lr = args.lr * lr_factor(step, total, args.warmup_ratio, args.schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed((args.seed * 1_000_003 + step) * 4096 + ranks.rank)  # dropout masks resume without saved state
        optimizer.zero_grad(set_to_none=True)  # None, not 0: an unused expert must not be touched
        sums = backward(model, adapter, batch, args, ranks, dtype)
        used = [p for p in adapter.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(used, args.max_grad_norm or math.inf)
        optimizer.step()
        step += 1
        worst = torch.maximum(worst, norm)  # nan, once there, stays
        at_end = step % steps_per_epoch == 0 or step == total
        logs, saves = step % args.log_every == 0 or step == total, step % args.save_every == 0 or at_end
        if logs or saves:
            must_be_finite(worst.item(), "the gradient norm")
        if logs:
            nll, kl = (sums / denominator(batch, "tokens")).tolist()  # a target token, as dev's
            loss = nll + args.rdrop_alpha * kl
            line = {"step": step, "epoch": round(step / steps_per_epoch, 4), "lr": lr, "nll": nll, "kl": kl, "loss": loss}
            write_log({**line, "grad_norm": norm.item()})
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        bar.update()
        if at_end:
            if dev:
                report = evaluate_dev(model, adapter, dev, args, ranks, dtype)
                must_be_finite(report["loss"], "the dev loss")
                write_log({"step": step, "dev": report})
                if adapter.learned:
                    write_log({"step": step, "router_load": dev_router_load(model, adapter, dev, args, ranks, dtype)})
                if chief:
                    bar.write(f"step {step}: dev " + json.dumps(report), file=sys.stdout)
            better = not dev or report["loss"] < best
            best = min(best, report["loss"]) if dev else best
            if chief and (args.keep == "last" or better):
                description = adapter.describe(pinned, fingerprint, tokenizer.format, tokenizer.sha256, args.seed, step)
                save_adapter(adapter, description, out / "adapter")
        if chief and saves:
            save_checkpoint(out / "checkpoint.pt", adapter, optimizer, step, best, log, fingerprint)
    bar.close()
    ranks.barrier()
    if chief:
        write_atomic(out / "summary.json", json.dumps(summary, indent=2) + "\n")
        lock.close()
        print(f"{out}: done; the adapter is in {out / 'adapter'}")


if __name__ == "__main__":
    run_main(main)
