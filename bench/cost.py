"""What CrossLoRA costs over a plain LoRA of rank 16 in the same code, in training and decoding, for
6 languages and for 100.

    python bench/cost.py --size S [--repeats 7] [--out bench/results/cost_S.json]

The rows' own directions among 6 languages, and random ones among 100. The plain LoRA is the same
adapter on the same rows and directions (which say what of a prompt is copied from another's), with
one expert of A and one of B for all. Run in turn, training, which is short, three times as often; a
step includes the optimizer's, whose work grows with the experts that a batch uses. Prints one JSON
line.
"""

import copy
import itertools
import random

import torch
from common import (
    alternate,
    bench_parser,
    checkpoint_folder,
    load_both,
    lower,
    machine,
    make_checkpoint,
    prompts_and_limits,
    random_adapter,
    ratios,
    report,
    sentence_rows,
    tokenizer_of,
    training_settings,
)

import fast
import model as backbone
from data import LANGUAGES, encode
from generate import Row
from support.runs import Ranks, device_and_dtype
from support.translations import decoding_order
from train import Loss, backward


def one_expert(adapter):
    """The same adapter with one expert of A and one of B for all directions."""
    same, (a, b) = copy.copy(adapter), adapter.languages[:2]
    same.expert_names = lambda: ([a], [b])
    same.route = lambda src_lang, tgt_lang: (a, b)
    return same


def train_run(lm, adapter, examples, langs):
    """A function that takes one step of training."""
    batch = [e._replace(src_lang=s, tgt_lang=t) for e, (s, t) in zip(examples, langs)]
    names = dict(zip(("lora_A", "lora_B"), adapter.expert_names()))
    own = []
    for name, p in adapter.named_parameters():  # such as layers.0.up_proj.lora_A.de
        *_, side, expert = name.split(".")
        if expert in names[side]:
            own.append(p)
    # At a rate of 0 all runs, which share their experts, compute the same every time.
    optimizer = torch.optim.AdamW(own, lr=0, fused=True)
    loss, settings = Loss(lm, adapter, fast.forward_sums), training_settings()

    def run():
        optimizer.zero_grad(set_to_none=True)
        backward(loss, batch, settings, Ranks(0, 1), fast.micro_batches)
        torch.nn.utils.clip_grad_norm_([p for p in own if p.grad is not None], 1.0)
        optimizer.step()

    return run


def decode_run(lm, adapter, rows, prompts, limits, langs, batch_size):
    """A function that decodes all sentences."""
    order = decoding_order(
        [{**row, "src_lang": s, "tgt_lang": t} for row, (s, t) in zip(rows, langs)]
    )

    def run():
        queue = (Row(i, prompts[i], *langs[i], limits[i]) for i in order)
        for _ in fast.decode(lm, adapter, queue, (), batch_size):
            continue

    return run


def parse_args():
    parser = bench_parser(__doc__)
    add = parser.add_argument
    add("--pairs", type=int, default=32, help="in training: the effective batch")
    add("--sentences", type=int, default=256, help="in decoding")
    add("--batch-size", type=int, default=128, help="in decoding, generate.py's default")
    return parser.parse_args()


def main():
    args = parse_args()
    torch.set_num_threads(args.threads)
    device, dtype = device_and_dtype("auto")
    folder = checkpoint_folder(args)
    make_checkpoint(args.size, folder, args.shared, device)
    cfg = backbone.Config.load(folder)
    tokenizer = tokenizer_of(args.size, folder, cfg)
    rows, source = sentence_rows(args.shared, max(args.pairs, args.sentences))
    examples, _ = encode(tokenizer, rows[: args.pairs])
    rows = rows[: args.sentences]
    assert len(examples) == args.pairs <= len(rows), "a pair is too long, or too few --sentences"
    prompts, limits = prompts_and_limits(tokenizer, rows)
    hundred, rng = [f"l{i}" for i in range(100)], random.Random(0)
    own = [(row["src_lang"], row["tgt_lang"]) for row in rows]
    drawn = [tuple(rng.sample(hundred, 2)) for _ in rows]
    directions = {"6 languages": (list(LANGUAGES), own), "100 languages": (hundred, drawn)}
    adapters = {}
    for name, (languages, _) in directions.items():
        adapters[name] = random_adapter(cfg, languages, device)
    result = {"bench": "cost", "size": args.size, "sentences": source, "pairs": len(examples)}
    result.update(count=len(rows), batch_size=args.batch_size, optimizer=True)
    for what in ("training", "decoding"):
        lm = load_both(args.size, folder, args.shared, device, "ours")[0]
        lower(lm.parameters(), dtype)
        fast.prepare(lm, None, training=what == "training")
        runs = {}
        for (name, (_, langs)), one in itertools.product(directions.items(), (True, False)):
            fast.layers.lay_out_experts(adapters[name])
            if what == "decoding":
                lower(adapters[name].parameters(), dtype)
            adapter = one_expert(adapters[name]) if one else adapters[name]
            if what == "training":
                runs[name, one] = train_run(lm, adapter, examples, langs)
            else:
                work = rows, prompts, limits, langs, args.batch_size
                runs[name, one] = decode_run(lm, adapter, *work)
        times = alternate(runs, args.repeats * (3 if what == "training" else 1), device)
        result[what] = {name: ratios(times, (name, False), (name, True)) for name in directions}
        del lm, runs  # the runs hold the backbone, too, and the optimizers
        for adapter in adapters.values():
            adapter.zero_grad(set_to_none=True)
    result["machine"] = machine(device)
    report(result, args.out)


if __name__ == "__main__":
    main()
