"""What CrossLoRA costs over a plain LoRA of rank 16 in the same code, in training and decoding, for 6 languages and for 100.

    python bench/cost.py --size S [--repeats 7] [--out bench/results/cost_S.json]    # training, which is short, three times as often

The rows' own directions among 6 languages, and random ones among 100. The plain LoRA is the same adapter on the same rows and directions
(which say what of a prompt is copied from another's), with one expert of A and one of B for all. Run in turn; training is a whole step, the
optimizer's included, whose work grows with the experts that a batch uses. Prints one JSON line.
"""

import copy
import itertools
import random

import torch

from common import (alternate, bench_parser, checkpoint_folder, load_both, lower, machine, make_checkpoint, prompts_and_limits,
                    random_adapter, ratios, report, sentence_rows, tokenizer_of, training_settings)

import model as backbone
from data import LANGUAGES, encode
from devices import Ranks, device_and_dtype
from generate import Row, decode, decoding_order
from train import backward


def main():
    parser = bench_parser(__doc__)
    parser.add_argument("--pairs", type=int, default=32, help="in training: the effective batch")
    parser.add_argument("--sentences", type=int, default=256, help="in decoding")
    parser.add_argument("--batch-size", type=int, default=128,
                        help="places in decoding, generate.py's default; waiting sentences take those of ended ones")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, dtype = device_and_dtype("auto")
    folder = checkpoint_folder(args)
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
    directions = {"6 languages": (list(LANGUAGES), [(row["src_lang"], row["tgt_lang"]) for row in rows]),
                  "100 languages": (hundred, [tuple(rng.sample(hundred, 2)) for _ in rows])}
    adapters = {name: random_adapter(cfg, languages, device) for name, (languages, _) in directions.items()}

    def plain(adapter):
        same = copy.copy(adapter)
        same.experts = [adapter.languages[0]], [adapter.languages[1]]
        same.route = lambda src_lang, tgt_lang: (adapter.languages[0], adapter.languages[1])
        return same

    def train_run(lm, adapter, langs):
        batch = [e._replace(src_lang=s, tgt_lang=t) for e, (s, t) in zip(examples, langs)]
        sides = dict(zip(("lora_A", "lora_B"), adapter.experts))
        # A name is, for instance, layers.0.up_proj.lora_A.de.
        own = [p for name, p in adapter.named_parameters() if name.split(".")[-1] in sides[name.split(".")[-2]]]
        # At a rate of 0 all runs, which share their experts, compute the same every time.
        optimizer = torch.optim.AdamW(own, lr=0, fused=True)

        def run():
            optimizer.zero_grad(set_to_none=True)
            backward(lm, adapter, batch, settings, Ranks(0, 1), dtype)
            torch.nn.utils.clip_grad_norm_([p for p in own if p.grad is not None], 1.0)
            optimizer.step()
        return run

    def decode_run(lm, adapter, langs):
        order = decoding_order([{**row, "src_lang": s, "tgt_lang": t} for row, (s, t) in zip(rows, langs)])

        def run():
            queue = (Row(i, prompts[i], *langs[i], limits[i]) for i in order)
            for _ in decode(lm, adapter, dtype, queue, (), args.batch_size):
                continue
        return run

    result = {"bench": "cost", "size": args.size, "sentences": source, "pairs": len(examples), "count": len(rows),
              "batch_size": args.batch_size, "optimizer": True}
    for what, make in (("training", train_run), ("decoding", decode_run)):
        lm = load_both(args.size, folder, args.shared, device, "ours")[0]
        lower(itertools.chain(lm.parameters(), *(adapter.parameters() for adapter in adapters.values() if what == "decoding")), dtype)
        lm.pack(training=what == "training")
        runs = {(name, one): make(lm, plain(adapters[name]) if one else adapters[name], langs)
                for name, (_, langs) in directions.items() for one in (True, False)}
        times = alternate(runs, args.repeats * (3 if what == "training" else 1), device)
        result[what] = {name: ratios(times, (name, False), (name, True)) for name in directions}
        del lm, runs  # the runs hold the backbone, too, and the optimizers
        for adapter in adapters.values():
            adapter.zero_grad(set_to_none=True)
    result["machine"] = machine(device)
    report(result, args.out)


if __name__ == "__main__":
    main()
