"""Decoding speed against transformers' generate: the same weights, sentences and lengths, in turn.

    python bench/generate_speed.py --size S [--repeats 7] [--threads 2] [--out bench/results/x.json]
    python bench/generate_speed.py --size S --peers '' --against ../before       # before and after

Ours: fast/'s `decode`, all directions mixed, every row on its own experts, waiting rows taking the
places of ended ones. `plain`: generate.py's own. The peer: `generate` with its KV cache and one
adapter of peft for all rows (one direction, which favours it), padded on the left; the best of
--peer-batches, adapter merged and unmerged, on the first --trial sentences: `usual` in the order of
the sentences, `sorted` by the prompt's length. Random weights don't end a sentence: on all sides a
row ends after as many tokens as its reference has. On a CPU, fp32, each side has a process of its
own; on a GPU all share the frozen weights but for q, k and v, compared in fp32 and timed in bf16.
Prints one JSON line.
"""

import copy
import statistics
import sys

import torch
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
    now,
    prompts_and_limits,
    ratios,
    report,
    sentence_rows,
    serve,
    spread,
    start_sides,
    tokenizer_of,
)
from transformers import StoppingCriteria

import fast
import generate
import model as backbone
from generate import Row
from support.runs import device_and_dtype
from support.translations import decoding_order


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
        pads = [T - len(prompts[i]) for i in part]
        ids = [[0] * pad + prompts[i] for pad, i in zip(pads, part)]
        mask = [[0] * pad + [1] * (T - pad) for pad in pads]
        most = torch.tensor([limits[i] for i in part], device=device)
        out = model.generate(
            input_ids=torch.tensor(ids, device=device),  # (B, T)
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=int(most.max()),
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            stopping_criteria=[Ends(most, T)],
        )
        for i, row in zip(part, out[:, T:].tolist()):
            outputs[i] = row[: limits[i]]
    return outputs


class Case:
    """Both sides' models and what there is to decode."""

    def __init__(self, args, device, dtype):
        self.args, self.device, self.dtype = args, device, dtype
        folder = checkpoint_folder(args)
        self.lm, self.adapter, self.peer = load_both(
            args.size, folder, args.shared, device, args.side
        )
        self.cfg = backbone.Config.load(folder)
        tokenizer = tokenizer_of(args.size, folder, self.cfg)
        self.rows, self.source = sentence_rows(args.shared, max(args.sentences, args.alone))
        self.prompts, self.limits = prompts_and_limits(tokenizer, self.rows)
        count = args.sentences
        by_length = sorted(range(count), key=lambda i: -len(self.prompts[i]))
        self.orders = {"usual": list(range(count)), "sorted": by_length}
        if self.lm:
            self.layer_weights = sum(p.numel() for p in self.lm.model.layers.parameters())

    def prepare(self):
        fast.prepare(self.lm, self.adapter, training=False)

    def whole(self, outputs, order):
        """These outputs, if each is there and as long as it was to be."""
        lengths = {i: len(out) for i, out in outputs.items()}
        assert lengths == {i: self.limits[i] for i in order}
        return outputs

    def ours(self, decode, which=None, one_way=False):
        """Outputs {index: ids} by `decode`, of the sentences `which`, or the timed ones."""
        chosen = set(range(self.args.sentences) if which is None else which)
        order = [i for i in decoding_order(self.rows) if i in chosen]

        def queue():
            for i in order:
                langs = self.rows[i]["src_lang"], self.rows[i]["tgt_lang"]
                langs = ("de", "zh") if one_way else langs
                yield Row(i, self.prompts[i], *langs, self.limits[i])

        size = self.args.batch_size
        decoded = decode(self.lm, self.adapter, queue(), (), size)
        return self.whole({key: ids for key, ids, _ in decoded}, order)

    def both_ways(self):
        """The peer with its adapter merged, and unmerged."""
        merged = {"merged": copy.deepcopy(self.peer).merge_and_unload().eval()}
        if self.args.merged_only:
            return merged
        return {"unmerged": self.peer.eval(), **merged}

    def theirs(self, order, peers):
        """The peer in its best setting, each tried once on the first sentences: (run, seconds of
        each)."""
        what = self.prompts, self.limits
        for model in peers.values():  # the first to be tried should not pay for the start
            peer_decode(model, *what, order[:2], 2, self.device)
        seconds, best = {}, None
        for size in map(int, self.args.peer_batches.split(",")):
            for kind, model in peers.items():
                started = now(self.device)
                peer_decode(model, *what, order[: self.args.trial], size, self.device)
                took = round(now(self.device) - started, 2)
                if not seconds or took < min(seconds.values()):
                    best = size, model
                seconds[f"batch {size}, {kind}"] = took

        def run():
            return self.whole(peer_decode(best[1], *what, order, best[0], self.device), order)

        return run, seconds

    def check(self):
        """Hold ours against the peer before anything is timed. Returns how many outputs agreed."""
        short = [i for i in self.orders["sorted"] if self.limits[i] <= 48]
        some = short[:: max(1, len(short) // 16)]
        theirs = peer_decode(self.peer.eval(), self.prompts, self.limits, some, 32, self.device)
        ours = self.ours(fast.decode, some, one_way=True)
        apart = {i: (theirs[i], ours[i]) for i in some if theirs[i] != ours[i]}
        assert not apart, f"greedy outputs differ, {{sentence: (the peer's, ours)}}: {apart}"
        if self.dtype != torch.float32:
            modules = self.lm, self.adapter, self.peer
            lower([p for module in modules for p in module.parameters()], self.dtype)
        return len(some)

    def flops(self):
        """2 per weight and token, needed or not."""
        tokens = sum(self.limits[: self.args.sentences])
        read = sum(map(len, self.prompts[: self.args.sentences]))
        head = tokens * self.cfg.vocab_size * self.cfg.hidden_size
        return 2 * ((read + tokens) * self.layer_weights + head)


def parse_args():
    parser = bench_parser(__doc__)
    add = parser.add_argument
    add("--sentences", type=int, default=96)
    tried = "sentences on which the peer's settings are tried: as many as the largest batch"
    add("--trial", type=int, default=64, help=tried)
    add("--peer-batches", default="8,16,32,64", help="of which the peer gets the fastest")
    alone = "also time ours alone on so many, whose end, when few are left, is a smaller part"
    add("--alone", type=int, default=0, help=alone)
    add("--batch-size", type=int, default=128, help="of ours, generate.py's default")
    which = "which to measure: plain, usual, sorted; '' for ours alone"
    add("--peers", default="plain,usual,sorted", help=which)
    unmerged = "don't try the unmerged adapter: at L it takes 2 to 4 times as long"
    add("--merged-only", action="store_true", help=unmerged)
    add_side_arguments(parser, ["ours", "plain", "usual", "sorted"])
    args = parser.parse_args()
    if args.alone and device_and_dtype("auto")[0].type == "cpu":
        parser.error("--alone is for a GPU")
    return args


def be_side(case, name):
    """One side's process."""
    if name not in OURS:
        serve(*case.theirs(case.orders[name], case.both_ways()))
        return
    if name == "ours":
        case.prepare()
    decode = fast.decode if name == "ours" else generate.decode
    serve(lambda: case.ours(decode), None)


def main():
    args = parse_args()
    torch.set_num_threads(args.threads)
    device, dtype = device_and_dtype("auto")
    case = Case(args, device, dtype)
    if args.side:
        be_side(case, args.side)
        return
    others = [name for name in ("plain", "usual", "sorted") if name in args.peers.split(",")]
    peers = [name for name in others if name not in OURS]
    agreed = case.check()
    if device.type == "cpu":
        case.lm = case.adapter = case.peer = None  # the sides have their own
        runs = start_sides(["ours", *others], args)
        tried = {name: runs[name].told for name in peers}
    else:
        case.prepare()
        assert "plain" not in others, "plain and fast/ can't share a model that is prepared"
        runs, tried, both = {"ours": lambda: case.ours(fast.decode)}, {}, case.both_ways()
        for name in peers:
            runs[name], tried[name] = case.theirs(case.orders[name], both)
    print(tried, file=sys.stderr, flush=True)
    rates = []  # of a large product, after every turn: these machines change their pace
    times = alternate(runs, args.repeats, device, lambda: rates.append(matmul_rate(device, dtype)))
    seconds = {name: statistics.median(times[name]) for name in runs}
    tokens = sum(case.limits[: args.sentences])
    used = [case.flops() / t / rate for t, rate in zip(times["ours"], rates)]
    result = {
        "bench": "generate",
        "size": args.size,
        "sentences": case.source,
        "count": args.sentences,
        "prompt_tokens": sum(map(len, case.prompts[: args.sentences])),
        "output_tokens": tokens,
        "batch_size": args.batch_size,
        "sentences_per_s": {name: round(args.sentences / t, 2) for name, t in seconds.items()},
        "output_tokens_per_s": {name: round(tokens / t, 1) for name, t in seconds.items()},
        **{f"ratio_{name}": ratios(times, name) for name in runs if name != "ours"},
        "repeats": args.repeats,
        "peer_seconds": tried,
        "utilisation": round(statistics.median(used), 3),
        "matmul_gflops": round(statistics.median(rates) / 1e9, 1),
        "agreement": f"{agreed} of {agreed} greedy outputs identical",
        "machine": machine(device),
    }
    if args.against:
        result["against"] = commit_of(args.against)
    if args.alone:
        result["alone"] = time_alone(case, args)
    report(result, args.out)


def time_alone(case, args):
    new = sum(case.limits[: args.alone])
    runs = {"ours": lambda: case.ours(fast.decode, range(args.alone))}
    seconds = alternate(runs, args.repeats, case.device)["ours"]
    rate = spread([new / t for t in seconds], 1)
    return {"count": args.alone, "output_tokens": new, "output_tokens_per_s": rate}


if __name__ == "__main__":
    main()
