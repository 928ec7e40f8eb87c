"""Training speed and memory against transformers + peft: the same weights, sentences and semantics,
run in turn.

    python bench/train_speed.py --size S [--repeats 7] [--threads 2] [--out bench/results/x.json]
    python bench/train_speed.py --size S --peers '' --against ../before      # before and after

Ours: train.py's own `backward` on an effective batch of 32 pairs in mixed directions, R-Drop on, by
fast/. `plain`: the same by the plain scripts alone. The usual peer: peft's LoRA of rank 16 on the
same projections (one direction for all, which favours it), the R-Drop repository's form (batch
doubled, logits for every position, its compute_kl_loss), micro-batches of 4 in random order, padded
to the longest. The tuned peer: logits on target positions only, rows sorted by length. Both peers
run in transformers' own way, with an attention mask. On a CPU, fp32, each side has a process of its
own; on a GPU, bf16, all share the frozen weights, and the peers' LoRA runs under autocast. Prints
one JSON line.
"""

import statistics

import torch
import torch.nn.functional as F
from common import (
    OURS,
    add_side_arguments,
    alternate,
    bench_parser,
    checkpoint_folder,
    commit_of,
    load_both,
    lower,
    machine,
    matmul_rate,
    peak_bytes,
    ratios,
    report,
    resident_bytes,
    sentence_rows,
    serve,
    start_sides,
    tokenizer_of,
    training_settings,
    trim,
)

import fast
import model as backbone
import train
from crosslora import TARGET_MODULES
from data import IGNORE, collate, encode
from support.runs import Ranks, device_and_dtype


def usual_loss(logits, labels, alpha):
    """[nll, kl] of the doubled batch's logits (2B, T, V), as the R-Drop repository's README has
    them."""
    first, second = (half.flatten(0, 1) for half in logits.chunk(2))  # (B*T, V) each
    targets = labels.flatten()
    nll = F.cross_entropy(first.float(), targets, ignore_index=IGNORE, reduction="sum")
    nll = nll + F.cross_entropy(second.float(), targets, ignore_index=IGNORE, reduction="sum")
    p_kl = F.kl_div(F.log_softmax(first, -1), F.softmax(second, -1), reduction="none")
    q_kl = F.kl_div(F.log_softmax(second, -1), F.softmax(first, -1), reduction="none")
    padding = (targets == IGNORE)[:, None]
    kl = p_kl.masked_fill_(padding, 0.0).sum() + q_kl.masked_fill_(padding, 0.0).sum()
    return nll / 2, kl / 2


def tuned_loss(model, hidden, labels):
    """The same from hidden states (2B, T, D), with logits at target positions alone."""
    is_target = labels != IGNORE
    targets, log_p = labels[is_target], []
    for half in hidden.chunk(2):
        logits = model.base_model.model.lm_head(half[is_target])
        log_p.append(F.log_softmax(logits.float(), -1))
    first, second = log_p
    nll = F.nll_loss(first, targets, reduction="sum") + F.nll_loss(second, targets, reduction="sum")
    kl = F.kl_div(first, second, reduction="sum", log_target=True)
    kl = kl + F.kl_div(second, first, reduction="sum", log_target=True)
    return nll / 2, kl / 2


def peer_backward(model, examples, micro_batch_size, tuned, alpha, device, dtype):
    """Gradients of eq. 9 for an effective batch as the usual stack computes them, in bf16 as its
    Trainer does. Returns the summed [nll, kl]."""
    M = sum(example.target_count for example in examples)
    rows = sorted(examples, key=lambda e: len(e.ids)) if tuned else examples
    sums = torch.zeros(2, device=device)
    for start in range(0, len(rows), micro_batch_size):
        part = rows[start : start + micro_batch_size]
        tokens, labels = (t.to(device) for t in collate(part))
        lengths = torch.tensor([len(e.ids) - 1 for e in part], device=device)
        mask = torch.arange(tokens.shape[1], device=device) < lengths[:, None]
        twice = {"input_ids": tokens.repeat(2, 1), "attention_mask": mask.repeat(2, 1).long()}
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            if tuned:
                hidden = model.base_model.model.model(**twice, use_cache=False).last_hidden_state
                nll, kl = tuned_loss(model, hidden, labels)
            else:
                nll, kl = usual_loss(model(**twice, use_cache=False).logits, labels, alpha)
        ((nll + alpha * kl) / M).backward()
        sums += torch.stack((nll.detach(), kl.detach()))
    return sums


class Case:
    """Both sides' models and the batch."""

    def __init__(self, args, device, dtype):
        self.args, self.device, self.dtype = args, device, dtype
        folder = checkpoint_folder(args)
        self.lm, self.adapter, self.peer = load_both(
            args.size, folder, args.shared, device, args.side
        )
        self.cfg = backbone.Config.load(folder)
        self.settings = training_settings(args.micro_batch_size)
        if self.lm:
            self.layer_weights = sum(p.numel() for p in self.lm.model.layers.parameters())
            if args.side != "plain":
                fast.prepare(self.lm, self.adapter, training=True)
        rows, self.source = sentence_rows(args.shared, args.pairs)
        tokenizer = tokenizer_of(args.size, folder, self.cfg)
        self.examples, _ = encode(tokenizer, rows, args.max_length)

    def run(self, name, batch=None, dtype=None):
        """One effective batch's gradients by the side `name`; returns the summed [nll, kl]."""
        batch = self.examples if batch is None else batch
        if name in OURS:
            engine = fast if name == "ours" else train
            self.adapter.zero_grad(set_to_none=True)
            loss = train.Loss(self.lm, self.adapter, engine.forward_sums)
            cut = engine.micro_batches
            return train.backward(loss, batch, self.settings, Ranks(0, 1), cut)
        self.peer.zero_grad(set_to_none=True)
        sizes = self.args.micro_batch_size, name == "tuned", 0.1
        return peer_backward(self.peer, batch, *sizes, self.device, dtype or self.dtype)

    def disagreement(self, peers, batch, dtype):
        """Largest relative difference of loss and gradients between ours and each peer, without
        dropout."""
        self.adapter.dropout, worst = 0.0, {}
        self.peer.eval()
        ours = self.run("ours", batch)
        for name in peers:
            theirs = self.run(name, batch, dtype)
            worst[name] = abs(ours[0] / theirs[0] - 1).item()
            for i, layer in enumerate(self.peer.base_model.model.model.layers):
                for module in TARGET_MODULES:
                    bank, lora = self.adapter.layers[i][module], getattr(layer.mlp, module)
                    A, B = lora.lora_A["default"].weight.grad, lora.lora_B["default"].weight.grad
                    for mine, other in ((bank.lora_A["de"].grad, A), (bank.lora_B["zh"].grad, B)):
                        apart = ((mine - other).norm() / other.norm()).item()
                        worst[name] = max(worst[name], apart)
        self.adapter.dropout = 0.1
        self.peer.train()
        return worst

    def check(self, peers):
        """Hold ours against the peers before anything is timed. Rows in the one direction that the
        peer has; this process holds both sides, and at L more than 8 pairs are too much for 80 GB,
        at M for 24."""
        batch = [e._replace(src_lang="de", tgt_lang="zh") for e in self.examples[:8]]
        agree = self.disagreement(peers, batch, torch.float32)
        assert max(agree.values(), default=0) < 1e-4, f"the sides disagree: {agree}"
        if self.dtype != torch.float32:
            frozen = [p for p in self.peer.parameters() if not p.requires_grad]
            lower([*self.lm.parameters(), *frozen], self.dtype)  # LoRA stays in fp32 on both sides
            agree = {"fp32": agree, "bf16": self.disagreement(peers, batch, self.dtype)}
        return agree

    def flops(self):
        """Two passes, 4 per weight and token, needed or not."""
        tokens = sum(len(e.ids) - 1 for e in self.examples)
        targets = sum(e.target_count for e in self.examples)
        head = targets * self.cfg.vocab_size * self.cfg.hidden_size
        return 2 * 4 * (tokens * self.layer_weights + head)

    def peaks_on_gpu(self, names):
        for module in (self.adapter, self.peer):
            module.zero_grad(set_to_none=True)  # a step's gradients are part of its peak
        peaks = {}
        for name in names:
            modules = (self.lm, self.adapter) if name in OURS else (self.peer,)
            own = {p.data_ptr(): p.nbytes for module in modules for p in module.parameters()}
            since = resident_bytes(self.device) - sum(own.values())
            peaks[name] = peak_bytes(lambda name=name: self.run(name), self.device, since)
        return peaks


def parse_args():
    parser = bench_parser(__doc__)
    add = parser.add_argument
    add("--pairs", type=int, default=32, help="the effective batch")
    add("--micro-batch-size", type=int, default=4, help="of plain and both peers")
    short = "longer pairs are left out: with up to 141 tokens the usual peer takes 16 GiB at M"
    add("--max-length", type=int, default=512, help=short)
    which = "which to measure: plain, usual, tuned; one at a time where memory is short"
    add("--peers", default="plain,usual,tuned", help=which)
    add_side_arguments(parser, ["ours", "plain", "usual", "tuned"])
    return parser.parse_args()


def main():
    args = parse_args()
    torch.set_num_threads(args.threads)
    device, dtype = device_and_dtype("auto")
    empty = resident_bytes(device)
    case = Case(args, device, dtype)
    if args.side:
        if args.side not in OURS:
            case.adapter = None  # the peer has copied two of its experts
            case.peer.train()

        def run():
            case.run(args.side)

        serve(run, peak_bytes(run, device, empty))
        return
    others = [name for name in ("plain", "usual", "tuned") if name in args.peers.split(",")]
    names, peers = ["ours", *others], [name for name in others if name not in OURS]
    agree, flops = case.check(peers), case.flops()
    examples, source = case.examples, case.source
    if device.type == "cpu":
        del case  # the sides have their own
        trim()
        runs = start_sides(names, args)
        peaks = {name: side.told for name, side in runs.items()}
    else:
        runs = {name: lambda name=name: case.run(name) for name in names}
        peaks = case.peaks_on_gpu(names)
    rates = []  # of a large product, after every turn: these machines change their pace
    times = alternate(runs, args.repeats, device, lambda: rates.append(matmul_rate(device, dtype)))
    tokens = sum(len(e.ids) - 1 for e in examples)
    speed = {name: round(tokens / statistics.median(times[name]), 1) for name in runs}
    used = [flops / t / rate for t, rate in zip(times["ours"], rates)]
    result = {
        "bench": "train",
        "size": args.size,
        "sentences": source,
        "pairs": len(examples),
        "tokens": tokens,
        "targets": sum(e.target_count for e in examples),
        "micro_batch_size": args.micro_batch_size,
        "max_length": args.max_length,
        "tokens_per_s": speed,
        **{f"ratio_{name}": ratios(times, name) for name in runs if name != "ours"},
        "peak_mib": {name: round(peak / 2**20) for name, peak in peaks.items()},
        "utilisation": round(statistics.median(used), 3),
        "matmul_gflops": round(statistics.median(rates) / 1e9, 1),
        "agreement": agree,
        "machine": machine(device),
    }
    if args.against:
        result["against"] = commit_of(args.against)
    report(result, args.out)


if __name__ == "__main__":
    main()
