"""Decoding speed against transformers' generate: the same weights, sentences and lengths, run in turn.

    python bench/generate_speed.py --size S [--repeats 7] [--threads 2] [--out bench/results/generate_S.json]

Ours: generate.py's own `decode`, all directions mixed, every row on its own experts, waiting rows taking the places of
ended ones. The peer: `generate` with its KV cache and one adapter of peft for all rows (one direction, which favours it),
padded on the left; the best of --peer-batches, adapter merged and unmerged, on the first --trial sentences: `usual` in the order of
the sentences, `sorted` by the prompt's length. Random weights don't end a sentence: on both sides a row ends after as many tokens as
its reference has. On a CPU, fp32, each side has a process of its own; on a GPU both share the frozen weights but for q, k and v,
compared in fp32 and timed in bf16. Prints one JSON line.
"""

import copy
import statistics
import sys

import torch
from transformers import StoppingCriteria

from common import (Side, alternate, bench_parser, checkpoint_folder, load_both, lower, machine, matmul_rate, now, prompts_and_limits,
                    ratios, report, sentence_rows, serve, spread, tokenizer_of)

import model as backbone
from devices import device_and_dtype
from generate import Row, decode, decoding_order


class Ends(StoppingCriteria):
    """Ends row b after limits[b] new tokens."""

    eos_token_id = None  # generate pads the rows that have ended if a criterion has this name

    def __init__(self, limits, prompt_length):
        self.limits, self.prompt_length = limits, prompt_length

    def __call__(self, ids, scores, **kwargs):
        return ids.shape[1] - self.prompt_length >= self.limits


@torch.inference_mode()
def peer_decode(model, prompts, limits, order, batch_size, device):
    """Greedy outputs {index: ids} of `prompts` in batches cut from `order`."""
    outputs = {}
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        T = max(len(prompts[i]) for i in part)
        ids = torch.tensor([[0] * (T - len(prompts[i])) + prompts[i] for i in part], device=device)  # (B, T)
        mask = torch.tensor([[0] * (T - len(prompts[i])) + [1] * len(prompts[i]) for i in part], device=device)
        most = torch.tensor([limits[i] for i in part], device=device)
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=int(most.max()), do_sample=False, pad_token_id=0,
                             eos_token_id=None, stopping_criteria=[Ends(most, T)])
        for i, row in zip(part, out[:, T:].tolist()):
            outputs[i] = row[: limits[i]]
    return outputs


def main():
    parser = bench_parser(__doc__)
    parser.add_argument("--sentences", type=int, default=96)
    parser.add_argument("--trial", type=int, default=64,
                        help="sentences on which the peer's settings are tried: as many as the largest batch, "
                             "or it gets smaller ones there")
    parser.add_argument("--peer-batches", default="8,16,32,64", help="of which the peer gets the fastest")
    parser.add_argument("--alone", type=int, default=0,
                        help="also time ours alone on so many sentences, whose end, when few are left, is a smaller part")
    parser.add_argument("--batch-size", type=int, default=128, help="places of ours, generate.py's default")
    parser.add_argument("--peers", default="usual,sorted", help="which to measure, '' for ours alone")
    parser.add_argument("--merged-only", action="store_true", help="don't try the unmerged adapter: at L it takes 2 to 4 times as long")
    parser.add_argument("--side", choices=["ours", "usual", "sorted"], help="be one side's process")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, dtype = device_and_dtype("auto")
    if args.alone and device.type == "cpu":
        parser.error("--alone is for a GPU")
    folder = checkpoint_folder(args)
    lm, adapter, peer = load_both(args.size, folder, args.shared, device, args.side)
    cfg = backbone.Config.load(folder)
    tokenizer = tokenizer_of(args.size, folder, cfg)
    every, source = sentence_rows(args.shared, max(args.sentences, args.alone))
    prompts, limits = prompts_and_limits(tokenizer, every)
    rows = every[: args.sentences]
    by_length = sorted(range(len(rows)), key=lambda i: -len(prompts[i]))
    orders = {name: {"usual": list(range(len(rows))), "sorted": by_length}[name] for name in args.peers.split(",") if name}
    if lm:
        layer_weights = sum(p.numel() for p in lm.model.layers.parameters())
        lm.pack()

    def whole(outputs, order):
        """These outputs, if each is there and as long as it was to be."""
        assert {i: len(out) for i, out in outputs.items()} == {i: limits[i] for i in order}
        return outputs

    def ours(one_way=False, dtype=dtype, which=range(len(rows))):
        order = [i for i in decoding_order(every) if i in which]
        langs = [("de", "zh") if one_way else (row["src_lang"], row["tgt_lang"]) for row in every]
        queue = (Row(i, prompts[i], *langs[i], limits[i]) for i in order)
        return whole({row.key: row.out for row in decode(lm, adapter, dtype, queue, (), args.batch_size)}, order)

    def both_ways():
        merged = {"merged": copy.deepcopy(peer).merge_and_unload().eval()}
        return merged if args.merged_only else {"unmerged": peer.eval(), **merged}

    def theirs(order, peers):
        """The peer in its best setting, each tried once on the first sentences: (run, seconds of each)."""
        settings, tried = [(int(size), kind) for size in args.peer_batches.split(",") for kind in peers], []
        for model in peers.values():  # the first to be tried should not pay for the start
            peer_decode(model, prompts, limits, order[:2], 2, device)
        for size, kind in settings:
            started = now(device)
            peer_decode(peers[kind], prompts, limits, order[: args.trial], size, device)
            tried.append(round(now(device) - started, 2))
        size, kind = settings[tried.index(min(tried))]
        chosen, seconds = peers[kind], {f"batch {size}, {kind}": t for (size, kind), t in zip(settings, tried)}
        return lambda: whole(peer_decode(chosen, prompts, limits, order, size, device), order), seconds

    if args.side:
        run, tried = (ours, None) if args.side == "ours" else theirs(orders[args.side], both_ways())
        return serve(run, tried)

    short = [i for i in by_length if limits[i] <= 48]
    some = short[:: max(1, len(short) // 16)]
    agreed, mine = peer_decode(peer.eval(), prompts, limits, some, 32, device), ours(True, torch.float32, some)
    apart = {i: (agreed[i], mine[i]) for i in some if agreed[i] != mine[i]}
    assert not apart, f"{len(apart)} of {len(some)} greedy outputs differ, {{sentence: (the peer's, ours)}}: {apart}"
    if dtype != torch.float32:
        lower([*lm.parameters(), *adapter.parameters(), *peer.parameters()], dtype)
        lm.pack()  # anew, in that dtype
    if device.type == "cpu":
        lm = adapter = peer = None
        runs = {name: Side(name) for name in ("ours", *orders)}
        tried = {name: runs[name].told for name in orders}
    else:
        runs, tried, peers = {"ours": ours}, {}, both_ways()
        for name, order in orders.items():
            runs[name], tried[name] = theirs(order, peers)
    print(tried, file=sys.stderr, flush=True)
    rates = []  # of a large product, after every turn: these machines change their pace
    times = alternate(runs, args.repeats, device, lambda: rates.append(matmul_rate(device, dtype)))
    tokens, read = sum(limits[: len(rows)]), sum(map(len, prompts[: len(rows)]))
    flops = 2 * ((read + tokens) * layer_weights + tokens * cfg.vocab_size * cfg.hidden_size)  # 2 a weight and token, needed or not
    median = lambda name: sorted(times[name])[len(times[name]) // 2]
    result = {"bench": "generate", "size": args.size, "sentences": source, "count": len(rows), "prompt_tokens": read,
              "output_tokens": tokens, "batch_size": args.batch_size,
              "sentences_per_s": {name: round(len(rows) / median(name), 2) for name in runs},
              "output_tokens_per_s": {name: round(tokens / median(name), 1) for name in runs},
              **{f"ratio_{name}": ratios(times, name) for name in orders}, "repeats": args.repeats, "peer_seconds": tried,
              "utilisation": round(statistics.median(flops / t / rate for t, rate in zip(times["ours"], rates)), 3),
              "matmul_gflops": round(statistics.median(rates) / 1e9, 1),
              "agreement": f"{len(some)} of {len(some)} greedy outputs identical", "machine": machine(device)}
    if args.alone:
        new = sum(limits[: args.alone])
        seconds = alternate({"ours": lambda: ours(which=range(args.alone))}, args.repeats, device)["ours"]
        result["alone"] = {"count": args.alone, "output_tokens": new, "output_tokens_per_s": spread([new / t for t in seconds], 1)}
    report(result, args.out)


if __name__ == "__main__":
    main()
