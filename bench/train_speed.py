"""Training speed and memory against transformers + peft: the same weights, sentences and semantics, run in turn.

    python bench/train_speed.py --size S [--repeats 7] [--threads 2] [--out bench/results/train_S.json]

Ours: train.py's own `backward` on an effective batch of 32 pairs in mixed directions, R-Drop on. The usual peer: peft's LoRA
of rank 16 on the same projections (one direction for all, which favours it), the R-Drop repository's form (batch doubled,
logits for every position, its compute_kl_loss), micro-batches of 4 in random order, padded to the longest. The tuned peer:
logits on target positions only, rows sorted by length, micro-batches of 4. Ours cuts its passes by tokens, as train.py does. Both
peers run in transformers' own way, with an attention mask. On a CPU, fp32, each side has a process of its own; on a GPU, bf16, both
share the frozen weights, and the peers' LoRA runs under autocast. Prints one JSON line.
"""

import statistics

import torch
import torch.nn.functional as F

from common import (Side, alternate, bench_parser, checkpoint_folder, load_both, lower, machine, matmul_rate, peak_bytes, ratios, report,
                    resident_bytes, sentence_rows, serve, tokenizer_of, training_settings, trim)

import model as backbone
from crosslora import TARGET_MODULES
from data import encode, target_count
from devices import Ranks, device_and_dtype
from train import backward


IGNORE = -100  # label of a position that is not trained on (F.cross_entropy's convention)


def collate(examples):
    """Examples -> tokens (B, T) and labels (B, T), padded on the right. labels[b, t] is the token after tokens[b, t]
    where that is a target token or the end of turn, else IGNORE: prompts and pads are never trained on."""
    T = max(len(e.ids) for e in examples) - 1
    tokens = torch.zeros(len(examples), T, dtype=torch.long)
    labels = torch.full((len(examples), T), IGNORE)
    for row, example in enumerate(examples):
        ids = torch.from_numpy(example.ids).long()
        tokens[row, : len(ids) - 1] = ids[:-1]
        labels[row, example.prompt_length - 1 : len(ids) - 1] = ids[example.prompt_length :]
    return tokens, labels


def peer_backward(model, examples, micro_batch_size, tuned, alpha, device, dtype):
    """Gradients of eq. 9 for an effective batch as the usual stack computes them, in bf16 as its Trainer does. Returns the
    summed [nll, kl]."""
    M = sum(target_count(e) for e in examples)
    rows = sorted(examples, key=lambda e: len(e.ids)) if tuned else examples
    sums = torch.zeros(2, device=device)
    for start in range(0, len(rows), micro_batch_size):
        part = rows[start : start + micro_batch_size]
        tokens, labels = (t.to(device) for t in collate(part))
        at = labels != IGNORE
        lengths = torch.tensor([len(e.ids) - 1 for e in part], device=device)
        mask = torch.arange(tokens.shape[1], device=device) < lengths[:, None]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            twice = dict(input_ids=tokens.repeat(2, 1), attention_mask=mask.repeat(2, 1).long(), use_cache=False)
            if tuned:
                hidden = model.base_model.model.model(**twice).last_hidden_state
                first, second = (model.base_model.model.lm_head(h[at]) for h in hidden.chunk(2))
                targets = labels[at]
            else:
                first, second = model(**twice).logits.chunk(2)
                first, second, targets = first.flatten(0, 1), second.flatten(0, 1), labels.flatten()
        if tuned:
            p, q = F.log_softmax(first.float(), -1), F.log_softmax(second.float(), -1)
            nll = (F.nll_loss(p, targets, reduction="sum") + F.nll_loss(q, targets, reduction="sum")) / 2
            kl = (F.kl_div(p, q, reduction="sum", log_target=True) + F.kl_div(q, p, reduction="sum", log_target=True)) / 2
        else:  # as the R-Drop repository's README has it
            nll = (F.cross_entropy(first.float(), targets, ignore_index=IGNORE, reduction="sum")
                   + F.cross_entropy(second.float(), targets, ignore_index=IGNORE, reduction="sum")) / 2
            p_kl = F.kl_div(F.log_softmax(first, -1), F.softmax(second, -1), reduction="none")
            q_kl = F.kl_div(F.log_softmax(second, -1), F.softmax(first, -1), reduction="none")
            padding = (targets == IGNORE)[:, None]
            kl = (p_kl.masked_fill_(padding, 0.0).sum() + q_kl.masked_fill_(padding, 0.0).sum()) / 2
        ((nll + alpha * kl) / M).backward()
        sums += torch.stack((nll.detach(), kl.detach()))
    return sums


def main():
    parser = bench_parser(__doc__)
    parser.add_argument("--pairs", type=int, default=32, help="the effective batch")
    parser.add_argument("--micro-batch-size", type=int, default=4,
                        help="of both peers; ours cuts its passes by tokens, see train.py --micro-batch-tokens")
    parser.add_argument("--max-length", type=int, default=512,
                        help="longer pairs are left out: with pairs of up to 141 tokens the usual peer takes 16 GiB at M")
    parser.add_argument("--peers", default="usual,tuned", help="which to measure; one at a time where memory is short")
    parser.add_argument("--side", choices=["ours", "usual", "tuned"], help="be one side's process")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, dtype = device_and_dtype("auto")
    folder = checkpoint_folder(args)
    empty = resident_bytes(device)
    lm, adapter, peer = load_both(args.size, folder, args.shared, device, args.side)
    if lm:
        layer_weights = sum(p.numel() for p in lm.model.layers.parameters())
        lm.pack(training=True)
    cfg = backbone.Config.load(folder)
    tokenizer = tokenizer_of(args.size, folder, cfg)
    rows, source = sentence_rows(args.shared, args.pairs)
    examples, _ = encode(tokenizer, rows, args.max_length)

    settings = training_settings(cfg, device, args.micro_batch_size)

    def ours(batch=examples, dtype=dtype):
        adapter.zero_grad(set_to_none=True)
        return backward(lm, adapter, batch, settings, Ranks(0, 1), dtype)

    def theirs(tuned, batch=examples, dtype=dtype):
        def step():
            peer.zero_grad(set_to_none=True)
            return peer_backward(peer, batch, args.micro_batch_size, tuned, 0.1, device, dtype)
        return step

    peers = [name for name in ("usual", "tuned") if name in args.peers.split(",")]
    runs = {"ours": ours, **{name: theirs(name == "tuned") for name in peers}}
    if args.side:
        if args.side != "ours":
            adapter = None  # the peer has copied two of its experts
            peer.train()
        return serve(runs[args.side], peak_bytes(runs[args.side], device, empty))

    def disagreement(batch, dtype):
        """Largest relative difference of loss and gradients between ours and each peer, without dropout."""
        adapter.dropout, worst = 0.0, {}
        peer.eval()
        mine = ours(batch, dtype)
        for name in peers:
            other = theirs(name == "tuned", batch, dtype)()
            worst[name] = abs(mine[0] / other[0] - 1).item()
            for i, layer in enumerate(peer.base_model.model.model.layers):
                for module in TARGET_MODULES:
                    bank, lora = adapter.layers[i][module], getattr(layer.mlp, module)
                    for a, b in ((bank.lora_A["de"].grad, lora.lora_A["default"].weight.grad),
                                 (bank.lora_B["zh"].grad, lora.lora_B["default"].weight.grad)):
                        worst[name] = max(worst[name], ((a - b).norm() / b.norm()).item())
        adapter.dropout = 0.1
        peer.train()
        return worst

    # Rows in the one direction that the peer has; this process holds both sides, at L more than 8 pairs are too much for 80 GB,
    # at M for 24.
    one_way = [e._replace(src_lang="de", tgt_lang="zh") for e in examples[:8]]
    agree = disagreement(one_way, torch.float32)
    assert max(agree.values()) < 1e-4, f"the sides disagree: {agree}"
    if dtype != torch.float32:
        lower([*lm.parameters(), *(p for p in peer.parameters() if not p.requires_grad)], dtype)  # LoRA stays in fp32 on both sides
        lm.pack(training=True)  # anew, in that dtype
        agree = {"fp32": agree, "bf16": disagreement(one_way, dtype)}

    tokens, targets = sum(len(e.ids) - 1 for e in examples), sum(target_count(e) for e in examples)
    flops = 2 * 4 * (tokens * layer_weights + targets * cfg.vocab_size * cfg.hidden_size)  # two passes, 4 a weight and token, needed or not
    if device.type == "cpu":
        lm = adapter = peer = None  # the sides have their own
        trim()
        runs = {name: Side(name) for name in runs}
        peaks = {name: side.told for name, side in runs.items()}
    else:
        for module in (adapter, peer):
            module.zero_grad(set_to_none=True)  # a step's gradients are part of its peak

        def own(name):
            modules = (lm, adapter) if name == "ours" else (peer,)
            return sum({p.data_ptr(): p.nbytes for module in modules for p in module.parameters()}.values())

        peaks = {name: peak_bytes(run, device, resident_bytes(device) - own(name)) for name, run in runs.items()}
    rates = []  # of a large product, after every turn: these machines change their pace
    times = alternate(runs, args.repeats, device, lambda: rates.append(matmul_rate(device, dtype)))
    median = lambda name: sorted(times[name])[len(times[name]) // 2]
    result = {"bench": "train", "size": args.size, "sentences": source, "pairs": len(examples), "tokens": tokens, "targets": targets,
              "micro_batch_size": args.micro_batch_size, "max_length": args.max_length,
              "tokens_per_s": {name: round(tokens / median(name), 1) for name in runs},
              **{f"ratio_{name}": ratios(times, name) for name in runs if name != "ours"},
              "peak_mib": {name: round(peak / 2**20) for name, peak in peaks.items()},
              "utilisation": round(statistics.median(flops / t / rate for t, rate in zip(times["ours"], rates)), 3),
              "matmul_gflops": round(statistics.median(rates) / 1e9, 1), "agreement": agree, "machine": machine(device)}
    report(result, args.out)


if __name__ == "__main__":
    main()
