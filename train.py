"""Fine-tune CrossLoRA: Stage 1 on English-centric pairs, Stage 2 on everything (sections 3.3, 3.4).

    torchrun --nproc_per_node=2 train.py --stage 1      # data/ -> runs/stage1
    torchrun --nproc_per_node=2 train.py --stage 2      # data/ and runs/pseudo -> runs/stage2

Plain `python train.py` is the same run in one process. The same command again resumes from the last
checkpoint. Shapes: B batch rows, T tokens, N target tokens, P passes (R-Drop has two), D hidden,
V vocabulary.
"""

import support.interrupts  # noqa: F401 - before all else

import contextlib
import json
import math
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TextIO

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import crosslora
from crosslora import CrossLoRA
from data import IGNORE, Example, Tokenizer, collate, encode, epoch_order, group_of, read_stage_data
from model import CausalLM, Config, load
from support import runs
from support.export import dry_run
from support.routing import router_shares
from support.runs import Ranks, UserError
from support.watch import Watch, check_dev_loss, keep_last
from support.weights import read_checkpoint

Sums = tuple[Tensor, Tensor, Tensor]  # loss, nll, kl of forward_sums


# --- the loss, eqs. 6-9 ---------------------------------------------------------------------------


def forward_sums(
    model: CausalLM, adapter: CrossLoRA, examples: list[Example], rdrop_alpha: float, dropout: bool
) -> Sums:
    """(loss, nll, kl) of a micro-batch, fp32 sums over its target tokens (section 3.4). They are M
    times eqs. 9, 8 and 7; without R-Drop eq. 6, eq. 6 and 0. The caller divides by M, which counts
    the target tokens of the whole effective batch. Only `loss` has a gradient. fast/ has its own:
    a run with changes here takes --plain."""
    passes = 2 if rdrop_alpha > 0 else 1
    tokens, labels = collate(examples)  # (B, T) each
    tokens, labels = tokens.to(model.device), labels.to(model.device)
    is_target = labels != IGNORE  # (B, T)
    targets = labels[is_target]  # (N,)
    src_langs = [example.src_lang for example in examples]
    tgt_langs = [example.tgt_lang for example in examples]
    # R-Drop's two passes are one batch with every row twice, each copy with its own dropout.
    lora = adapter(src_langs * passes, tgt_langs * passes, model.dtype, dropout)
    hidden = model(tokens.repeat(passes, 1), lora)  # (B, T) -> (P*B, T) -> (P*B, T, D)
    log_p = []
    for one_pass in hidden.chunk(passes):  # (B, T, D)
        logits = model.lm_head(one_pass[is_target])  # (N, D) -> (N, V)
        log_p.append(F.log_softmax(logits, dim=-1, dtype=torch.float32))
    # Eq. 6 for one pass, eq. 8 for two.
    nll = sum(F.nll_loss(p, targets, reduction="sum") for p in log_p) / passes
    kl = torch.zeros_like(nll)
    if passes == 2:  # eq. 7: D_kl(P_1 || P_2) and D_kl(P_2 || P_1), halved
        first, second = log_p
        kl_12 = F.kl_div(second, first, reduction="sum", log_target=True)
        kl_21 = F.kl_div(first, second, reduction="sum", log_target=True)
        kl = (kl_12 + kl_21) / 2
    return total_loss(nll, kl, rdrop_alpha), nll.detach(), kl.detach()


def total_loss(nll: Tensor | float, kl: Tensor | float, rdrop_alpha: float) -> Tensor | float:
    """Eq. 9 (section 3.4)."""
    return nll + rdrop_alpha * kl


def micro_batches(model: CausalLM, examples: list[Example], args: Namespace) -> list[list[Example]]:
    """Cut one rank's share of an effective batch into micro-batches (section A.1: 4 pairs). The
    model is for fast/, which cuts by tokens."""
    size = args.micro_batch_size
    return [examples[start : start + size] for start in range(0, len(examples), size)]


class Loss(nn.Module):
    """forward_sums as a module, which is what DistributedDataParallel wraps. Its parameters are the
    adapter's alone: the backbone hides in a tuple, since it is frozen and needs no broadcast."""

    def __init__(self, model: CausalLM, adapter: CrossLoRA, forward_sums: Callable):
        super().__init__()
        self.adapter = adapter
        self.frozen = (model,)
        self.forward_sums = forward_sums

    @property
    def model(self) -> CausalLM:
        return self.frozen[0]

    def forward(self, examples: list[Example], rdrop_alpha: float, dropout: bool) -> Sums:
        return self.forward_sums(self.model, self.adapter, examples, rdrop_alpha, dropout)


def data_parallel(loss: Loss, ranks: Ranks) -> nn.Module:
    """`loss`, whose backward pass sums gradients over the ranks where there are several. An expert
    that no rank used keeps `grad is None`, so that the optimizer leaves it as it is."""
    if ranks.world == 1:
        return loss
    return DistributedDataParallel(loss, find_unused_parameters=True)


def backward(
    ddp: nn.Module,
    batch: list[Example],
    args: Namespace,
    ranks: Ranks,
    cut: Callable = micro_batches,
) -> Tensor:
    """Gradients of eq. 9 for one effective batch, complete on every rank. Returns this rank's part
    of the sums [nll, kl].

    Every rank knows the whole batch and takes each world-th example. Sums over target tokens are
    divided once, by the whole batch's M, so that no split into ranks and micro-batches changes the
    gradient.
    """
    loss_module = ddp.module if ranks.world > 1 else ddp
    M = sum(example.target_count for example in batch)
    by_length = sorted(batch, key=lambda example: len(example.ids))
    # Every world-th of these, so that the ranks get about as many tokens.
    own = by_length[ranks.rank :: ranks.world]
    weight = 1.0
    if not own:  # fewer examples than ranks: DDP waits for all, so one counts for nothing here
        own, weight = by_length[:1], 0.0
    parts = cut(loss_module.model, own, args)
    sums = torch.zeros(2, device=loss_module.model.device)
    for i, part in enumerate(parts):
        accumulate = i + 1 < len(parts) and ranks.world > 1  # ranks add up after the last alone
        with ddp.no_sync() if accumulate else contextlib.nullcontext():
            loss, nll, kl = ddp(part, args.rdrop_alpha, True)
            (loss * weight * ranks.world / M).backward()  # times world, since DDP averages
        sums += weight * torch.stack((nll, kl))
    return sums


def lr_factor(step: int, total: int, warmup_ratio: float) -> float:
    """Share of the peak learning rate at `step` (from 0): linear warm-up over warmup_ratio * total
    steps (section A.1), then linear to zero, where the paper is silent."""
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return (step + 1) / warmup
    return 1 - (step - warmup) / max(1, total - warmup)


# --- the dev set ----------------------------------------------------------------------------------


@torch.no_grad()
def evaluate_dev(loss: Loss, examples: list[Example], args: Namespace, ranks: Ranks) -> dict:
    """Dev loss per target token, overall and by direction group: NLL of one pass without dropout,
    KL of two passes with it (without there is none), and eq. 9's total."""
    by_length = sorted(examples, key=lambda example: len(example.ids))
    by_group = {}
    for example in by_length:
        by_group.setdefault(group_of(example.src_lang, example.tgt_lang), []).append(example)
    groups = sorted(by_group)
    sums = torch.zeros(len(groups), 3, dtype=torch.float64)  # nll, kl, tokens
    size = 2 * args.micro_batch_size
    for g, group in enumerate(groups):
        rows = by_group[group]
        for index in range(ranks.rank * size, len(rows), ranks.world * size):
            part = rows[index : index + size]
            torch.manual_seed(index)  # the same masks at every evaluation
            _, nll, kl = loss(part, 0, False)  # one pass
            if args.rdrop_alpha > 0:
                _, _, kl = loss(part, args.rdrop_alpha, True)
            tokens = sum(example.target_count for example in part)
            sums[g] += torch.tensor([nll.item(), kl.item(), tokens], dtype=torch.float64)
    sums = ranks.sum(sums, loss.model.device)
    report = means(sums.sum(0), args.rdrop_alpha)
    for group, row in zip(groups, sums):
        report[group] = means(row, args.rdrop_alpha)
    return report


def means(sums: Tensor, rdrop_alpha: float) -> dict:
    """[nll, kl, tokens] -> the first two and eq. 9's total per token."""
    nll, kl = (sums[:2] / sums[2]).tolist()
    loss = total_loss(nll, kl, rdrop_alpha)
    return {"nll": round(nll, 6), "kl": round(kl, 6), "loss": round(loss, 6)}


# --- the command ----------------------------------------------------------------------------------


def parse_args() -> Namespace:
    parser = runs.ArgumentParser(__doc__)
    add = parser.add_argument
    add("--stage", type=int, choices=[1, 2], required=True, help="section 3.3")
    llama = "meta-llama/Meta-Llama-3-8B-Instruct"
    add("--model", default=llama, help="backbone: checkpoint folder or hub name (section 4.2)")
    add("--data", default="data", help="folder that data.py wrote")
    add("--pseudo", help="Stage 2: folder that pivot.py wrote; default runs/pseudo")
    add("--out", help="run folder; default runs/stage1 or runs/stage2")
    of_stage_2 = "Stage 2 on everything or on the pseudo pairs alone (Table 2)"
    add("--stage-2-data", default="all", choices=["all", "pseudo"], help=of_stage_2)
    add("--init-adapter", help="start from this adapter folder, such as Stage 1's (Table 2)")
    kinds = "router and banks (sections 3.2, 4.3, 5.2)"
    add("--adapter-type", default="crosslora", choices=list(crosslora.ROUTES), help=kinds)
    add("--groups", default=crosslora.GROUPS, help="of languages, for the type groups (Table 4)")
    add("--top-k", type=int, default=1, help="experts per token, for molora-topk (section 4.3)")
    add("--rank", type=int, default=16, help="r (section 4.2)")
    add("--alpha", type=float, default=64, help="alpha_l; the update is times alpha / r (4.2)")
    add("--dropout", type=float, default=0.1, help="LoRA dropout p (section 4.2)")
    add("--rdrop-alpha", type=float, default=0.1, help="of eq. 9 (section 4.2); 0: one pass, eq. 6")
    add("--lr", type=float, default=5e-4, help="peak learning rate (section 4.2)")
    add("--weight-decay", type=float, default=0.02, help="of AdamW (section A.1)")
    add("--warmup-ratio", type=float, default=5e-4, help="share of all steps (section A.1)")
    add("--max-grad-norm", type=float, default=1.0, help="clipping, 0: none; the paper is silent")
    add("--epochs", type=int, help="default: Stage 1 3, Stage 2 2 (section A.1)")
    add("--max-steps", type=int, help="stop after this many steps at the latest; for trials")
    effective = "effective batch: processes x micro-batch x accumulation (section A.1)"
    add("--batch-size", type=int, default=32, help=effective)
    add("--micro-batch-size", type=int, default=4, help="pairs per process and pass (section A.1)")
    add("--max-length", type=int, default=512, help="tokens; longer pairs are dropped (A.1)")
    add("--save-every", type=int, default=200, help="steps between checkpoints")
    add("--log-every", type=int, default=10, help="steps between lines of metrics.jsonl")
    chat = "auto: the backbone's own chat template; plain: none"
    add("--prompt-format", default="auto", choices=["auto", "plain"], help=chat)
    add("--dry-run", action="store_true", help="print parameters, steps and tokens, and stop")
    add("--seed", type=int, default=0, help="of adapter, order and dropout")
    runs.add_plain_argument(parser)
    runs.add_device_arguments(parser)
    args = parser.parse_args()
    if args.stage == 1 and (args.pseudo or args.stage_2_data != "all"):
        raise UserError("--pseudo and --stage-2-data are Stage 2's")
    if args.stage == 2:
        args.pseudo = args.pseudo or "runs/pseudo"
    args.out = args.out or f"runs/stage{args.stage}"
    if args.epochs is None:
        args.epochs = {1: 3, 2: 2}[args.stage]
    runs.at_least(1, args, "rank", "top_k", "epochs", "max_steps", "batch_size", "micro_batch_size")
    runs.at_least(1, args, "max_length", "save_every", "log_every")
    runs.within(1e32, args, "alpha", "rdrop_alpha", "lr", "weight_decay", "max_grad_norm")
    runs.within(1, args, "dropout", "warmup_ratio")
    runs.within(2**31, args, "seed", "batch_size", "rank", "epochs", "max_length")
    return args


def new_adapter(args: Namespace, cfg: Config, languages: list[str]) -> CrossLoRA:
    settings = {key: getattr(args, key) for key in ("rank", "alpha", "dropout", "groups", "top_k")}
    return CrossLoRA(cfg, languages, variant=args.adapter_type, **settings)


def run_config(
    args: Namespace, cfg: Config, languages: list[str], tokenizer: Tokenizer, files: list[Path]
) -> dict:
    """A run's settings: with others it is not resumed. Raises UserError for an --init-adapter that
    was made with others, and for --groups and --top-k that don't fit."""
    may_change = ("out", "micro_batch_size", "device", "dry_run", "plain", "timeout")
    # Of files it is the content that counts, wherever they lie.
    may_change += ("model", "data", "pseudo", "init_adapter")
    config = {name: value for name, value in vars(args).items() if name not in may_change}
    config.update(tokenizer.describe(), languages=languages)
    config["files"] = {file.name: runs.file_sha256(file) for file in files}
    with torch.device("meta"):
        now = crosslora.settings_of(new_adapter(args, cfg, languages))
    config["target_modules"] = now["target_modules"]
    if args.init_adapter:
        was = crosslora.read_description(args.init_adapter)
        now.update(dropout=was["dropout"], prompt_sha256=config["prompt_sha256"])
        for key, value in now.items():
            if was[key] != value:
                why = f"made with other settings: {key} was {was[key]!r}, now {value!r}"
                raise UserError(f"--init-adapter {args.init_adapter}: {why}")
        weights = Path(args.init_adapter) / "adapter.safetensors"
        config["init_adapter_sha256"] = runs.file_sha256(weights)
    return config


def start_adapter(args: Namespace, cfg: Config, languages: list[str], made_for: dict) -> CrossLoRA:
    """A fresh adapter (section 3.3: "reinitialized"), or --init-adapter's weights (Table 2)."""
    torch.manual_seed(args.seed)
    adapter = new_adapter(args, cfg, languages)
    if args.init_adapter:
        start, _ = crosslora.load_adapter(args.init_adapter, cfg, made_for)
        adapter.load_state_dict(start.state_dict())
    return adapter


class Run(NamedTuple):
    """What the loop needs."""

    args: Namespace
    ranks: Ranks
    loss: Loss
    ddp: nn.Module  # loss, or the DistributedDataParallel around it
    cut: Callable  # micro_batches, or that of fast/
    optimizer: torch.optim.Optimizer
    train: list[Example]
    dev: list[Example]
    made_for: dict  # backbone and prompt, for adapter.json

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.train) / self.args.batch_size)

    @property
    def total(self) -> int:
        """Steps of the run."""
        return min(self.args.epochs * self.steps_per_epoch, self.args.max_steps or math.inf)

    def ends_epoch(self, step: int) -> bool:
        """Whether dev loss and adapter are due after `step`."""
        return step % self.steps_per_epoch == 0 or step == self.total


def save_checkpoint(run: Run, step: int, log: TextIO) -> None:
    """All that a resumed run needs, replaced atomically. The order of examples and the dropout
    masks are functions of seed, epoch and step."""
    state = {
        "step": step,
        "log_bytes": log.tell(),
        "backbone_fingerprint": run.made_for["backbone_fingerprint"],
        "adapter": run.loss.adapter.state_dict(),
        "optimizer": run.optimizer.state_dict(),
    }
    path = Path(run.args.out) / "checkpoint.pt"
    keep_last(path, bool(run.dev) and run.ends_epoch(step))
    with runs.replacing(path) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)


def load_checkpoint(run: Run) -> tuple[int, int]:
    """(steps done, bytes of metrics.jsonl then), (0, 0) for a run without a checkpoint."""
    args, path = run.args, Path(run.args.out) / "checkpoint.pt"
    if not run.ranks.broadcast_from_rank0(path.exists):
        return 0, 0
    state = read_checkpoint(path)
    if state["backbone_fingerprint"] != run.made_for["backbone_fingerprint"]:
        why = f"was started on another backbone than the {args.model} of now"
        raise UserError(f"{args.out}: {why}; choose another --out")
    run.loss.adapter.load_state_dict(state["adapter"])
    run.optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["log_bytes"]


def fit(run: Run, step: int, log: TextIO, end: runs.Termination) -> None:
    """The loop, from `step` (0, or a checkpoint's) to the last, or to where `end` is agreed."""
    args, ranks, train = run.args, run.ranks, run.train
    bar = runs.progress(None, ranks.rank, total=run.total, initial=step, desc=f"stage {args.stage}")
    watch = Watch(args.out, ranks)
    order, since, tokens = None, time.monotonic(), 0
    while True:
        if step and run.ends_epoch(step):
            with end.at_once():  # all is saved, and a resumed run comes here anew
                end_epoch(run, step, log, bar)
        if step == run.total:
            break
        epoch, position = divmod(step, run.steps_per_epoch)
        if order is None or position == 0:
            order = epoch_order(len(train), args.seed, epoch)
        start = position * args.batch_size
        batch = [train[i] for i in order[start : start + args.batch_size]]
        lr = args.lr * lr_factor(step, run.total, args.warmup_ratio)
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        # Every step and rank has dropout masks of its own, which resume without saved state.
        torch.manual_seed((args.seed * 1_000_003 + step) * 4096 + ranks.rank)
        run.optimizer.zero_grad(set_to_none=True)  # None, not 0: an unused expert is not touched
        tokens += sum(len(example.ids) - 1 for example in batch)
        sums = backward(run.ddp, batch, args, ranks, run.cut)
        used = [p for p in run.loss.adapter.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(used, args.max_grad_norm or math.inf)
        run.optimizer.step()
        step += 1
        watch.note(step, norm, sums, [example.pair for example in batch])

        logs = step % args.log_every == 0 or step == run.total
        ends = end.agreed()
        saves = step % args.save_every == 0 or run.ends_epoch(step) or ends
        if logs or saves:  # not at every step, since it makes the GPU wait
            watch.check()
        if logs:
            M = sum(example.target_count for example in batch)
            nll, kl = (ranks.sum(sums.cpu(), run.loss.model.device) / M).tolist()
            loss = total_loss(nll, kl, args.rdrop_alpha)
            line = {"step": step, "epoch": round(step / run.steps_per_epoch, 4), "lr": lr}
            line.update(nll=nll, kl=kl, loss=loss, grad_norm=norm.item())
            seconds = time.monotonic() - since  # and tokens, of the steps since the last line
            line.update(seconds=round(seconds, 2), tokens_per_s=round(tokens / seconds))
            since, tokens = time.monotonic(), 0
            print(json.dumps(line), file=log, flush=True)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        bar.update()
        if saves and ranks.rank == 0:
            save_checkpoint(run, step, log)
        if ends:
            raise SystemExit(runs.TERMINATED)
    bar.close()


def end_epoch(run: Run, step: int, log: TextIO, bar: tqdm) -> None:
    """Dev loss, and the adapter as it is now; the paper does not say what dev decides."""
    args, ranks, dev = run.args, run.ranks, run.dev
    if dev:
        report = evaluate_dev(run.loss, dev, args, ranks)
        check_dev_loss(report["loss"], step, args.out, ranks)
        line = {"step": step, "dev": report}
        if run.loss.adapter.learned:
            line["router_load"] = router_shares(run.loss, dev, ranks, args.micro_batch_size)
        print(json.dumps(line), file=log, flush=True)
        if ranks.rank == 0:
            bar.write(f"step {step}: dev " + json.dumps(report), file=sys.stdout)
    if ranks.rank == 0:
        crosslora.save_adapter(run.loss.adapter, Path(args.out) / "adapter", run.made_for, step)
    ranks.barrier()  # a rank that SIGTERM ends here leaves none behind in the next step


def execute(run: Run, config: dict, dropped: int, dev_dropped: int) -> None:
    """A run from its start or its last checkpoint to its end, in a folder that nobody shares."""
    out, chief = Path(run.args.out), run.ranks.rank == 0
    size, world, micro = run.args.batch_size, run.ranks.world, run.args.micro_batch_size
    batch = f"{size} = {world} processes x {micro} x accumulation {size // (world * micro)}"
    summary = {
        "steps": run.total,
        "trainable_parameters": sum(p.numel() for p in run.loss.parameters()),
        "train_pairs": len(run.train),
        "train_dropped": dropped,
        "dev_pairs": len(run.dev),
        "dev_dropped": dev_dropped,
        "backbone_fingerprint": run.made_for["backbone_fingerprint"],
        "batch": batch,
    }
    lock = runs.claim_run(out, config, run.ranks)
    step, log_bytes = load_checkpoint(run)
    if chief:
        print(json.dumps({**config, **summary}, ensure_ascii=False))
        resuming = f"; resuming at step {step}" if step else ""
        where = f"{run.loss.model.device} in {config['dtype']}"
        print(f"batch {batch}; {run.total} steps on {where}{resuming}", flush=True)
    with open(out / "metrics.jsonl" if chief else os.devnull, "a") as log:
        if chief:  # lines that the checkpoint does not know are written again
            log.seek(log.truncate(min(log_bytes, os.path.getsize(log.name))))
        with runs.Termination(run.ranks, run.args.timeout) as end:
            fit(run, step, log, end)
    run.ranks.barrier()
    if chief:
        runs.write_json(out / "summary.json", summary)
        lock.close()
        print(f"{out}: done; the adapter is in {out / 'adapter'}")


def main() -> None:
    args = parse_args()
    ranks = runs.init_distributed(args.device, args.timeout)
    out = Path(args.out)
    if args.batch_size % (ranks.world * args.micro_batch_size):
        raise UserError(
            f"--batch-size {args.batch_size} cannot be divided into {ranks.world} processes x "
            f"--micro-batch-size {args.micro_batch_size} x a whole number of accumulation steps"
        )
    if args.dry_run:
        if ranks.rank == 0:
            dry_run(args)
        return
    device, dtype = runs.device_and_dtype(args.device, args.dtype)
    fast = runs.load_fast(args.plain, ranks)

    # Settings and data: what can be refused is refused before the long work begins.
    sources = args.data, args.pseudo, args.stage_2_data == "pseudo"
    languages, train_rows, dev_rows, files = read_stage_data(*sources)
    folder, backbone = runs.resolve(args.model)
    cfg = Config.load(folder)
    tokenizer = Tokenizer(folder, cfg, args.prompt_format)
    config = run_config(args, cfg, languages, tokenizer, files)
    config.update(backbone=backbone, dtype=runs.dtype_name(dtype), engine=runs.engine_name(fast))
    runs.check_claim(out, config)
    results = ("summary.json", "adapter/adapter.json", "adapter/adapter.safetensors")
    if ranks.broadcast_from_rank0(lambda: runs.all_there(out, results)):
        if ranks.rank == 0:
            print(f"{out}: finished already; the adapter is in {out / 'adapter'}")
        return
    train, dropped = encode(tokenizer, train_rows, args.max_length)
    dev, dev_dropped = encode(tokenizer, dev_rows, args.max_length)
    if not train:
        raise UserError(f"{files[0]}: no training pair fits --max-length {args.max_length}")

    # The frozen backbone, the adapter, the loss, the optimizer.
    model = load(folder, device, dtype)
    made_for = {"backbone": backbone, "backbone_fingerprint": model.fingerprint()}
    made_for.update(tokenizer.describe(), seed=args.seed)
    adapter = start_adapter(args, cfg, languages, made_for).to(device)
    if fast:
        fast.prepare(model, adapter, training=True)
    loss = Loss(model, adapter, fast.forward_sums if fast else forward_sums)
    cut = fast.micro_batches if fast else micro_batches
    optimizer = torch.optim.AdamW(
        adapter.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True
    )
    ddp = data_parallel(loss, ranks)
    run = Run(args, ranks, loss, ddp, cut, optimizer, train, dev, made_for)
    execute(run, config, dropped, dev_dropped)


if __name__ == "__main__":
    runs.run_main(main)
