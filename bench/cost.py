"""What CrossLoRA costs over a plain LoRA of rank 16 in the same code, in training and decoding, for 6 languages and for 100.

    python bench/cost.py --size S [--repeats 7] [--out bench/results/cost_S.json]

The plain LoRA is the same adapter with every row in one direction, so that all share one expert; then the rows' own directions
among 6 languages, and random ones among 100. The same sentences, run in turn; training is forward and backward of a batch
without the optimizer, whose work grows with the experts a batch uses. Prints one JSON line.
"""

import itertools
import random
from pathlib import Path

import torch

from common import alternate, bench_parser, load_both, lower, machine, make_checkpoint, prompts_and_limits, random_adapter, ratios, report, sentence_rows, tokenizer_of, training_settings

import model as backbone
from data import LANGUAGES, encode
from devices import Ranks, device_and_dtype
from generate import Row, decode, decoding_order
from train import backward


def main():
    parser = bench_parser(__doc__)
    parser.add_argument("--pairs", type=int, default=32, help="in training: the effective batch")
    parser.add_argument("--sentences", type=int, default=256, help="in decoding")
    parser.add_argument("--batch-size", type=int, default=128, help="places in decoding, generate.py's default; waiting sentences take those of ended ones")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, dtype = device_and_dtype("auto")
    folder = Path(args.work) / args.size
    make_checkpoint(args.size, folder, args.shared, device)
    cfg = backbone.Config.load(folder)
    tokenizer = tokenizer_of(args.size, folder, cfg)
    rows, source = sentence_rows(args.shared, max(args.pairs, args.sentences))
    examples, _ = encode(tokenizer, rows[: args.pairs])
    rows = rows[: args.sentences]
    assert len(examples) == args.pairs <= len(rows), "a pair is too long, or --pairs is more than --sentences"
    prompts, limits = prompts_and_limits(tokenizer, rows)
    settings = training_settings(cfg, device)
    hundred, rng = [f"l{i}" for i in range(100)], random.Random(0)
    adapters = {len(languages): random_adapter(cfg, languages, device) for languages in (LANGUAGES, hundred)}
    directions = {
        "plain LoRA": (6, [("de", "zh")] * len(rows)),
        "6 languages": (6, [(row["src_lang"], row["tgt_lang"]) for row in rows]),
        "100 languages": (100, [tuple(rng.sample(hundred, 2)) for _ in rows]),
    }

    def train_run(lm, count, langs):
        batch = [e._replace(src_lang=s, tgt_lang=t) for e, (s, t) in zip(examples, langs)]

        def run():
            adapters[count].zero_grad(set_to_none=True)
            backward(lm, adapters[count], batch, settings, Ranks(0, 1), dtype)
        return run

    def decode_run(lm, count, langs):
        def run():
            queue = (Row(i, prompts[i], *langs[i], limits[i]) for i in decoding_order(rows))
            for _ in decode(lm, adapters[count], dtype, queue, (), args.batch_size):
                continue
        return run

    result = {"bench": "cost", "size": args.size, "sentences": source, "pairs": len(examples), "count": len(rows), "batch_size": args.batch_size}
    for what, make in (("training", train_run), ("decoding", decode_run)):
        lm = load_both(args.size, folder, args.shared, device, "ours")[0]
        lower(itertools.chain(lm.parameters(), *(adapter.parameters() for adapter in adapters.values() if what == "decoding")), dtype)
        lm.pack(training=what == "training")
        times = alternate({name: make(lm, *directions[name]) for name in directions}, args.repeats, device)
        result[what] = {name: ratios(times, name, "plain LoRA") for name in directions if name != "plain LoRA"}
        del lm
    result["machine"] = machine(device)
    report(result, args.out)


if __name__ == "__main__":
    main()
