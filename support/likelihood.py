"""How likely a system finds the reference translations: the NLL per character, which tells systems
apart where BLEU is near 0.

    python support/likelihood.py --adapter runs/stage2/adapter --out runs/scores/stage2
    python support/likelihood.py --model Qwen/Qwen2.5-0.5B-Instruct --out runs/scores/base

Writes likelihood.json beside an evaluation's scores, and prints a table. Per character, not per
token, so that backbones of other tokenizers can be compared; nats, the end of turn included.
"""

import random
import sys
from argparse import Namespace
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import IGNORE, LANGUAGES, collate, encode, group_of
from generate import Engine, check_languages, load_engine
from support import runs
from support.corpora import read_jsonl
from support.report import markdown
from support.runs import UserError


@torch.no_grad()
def sentence_nlls(engine: Engine, pairs: list[dict], batch_size: int) -> list[float]:
    """NLL of each pair's target and its end, in nats (eq. 6's summands, added up). Raises UserError
    for a pair that the model's positions don't hold."""
    most = engine.model.cfg.max_position_embeddings
    examples, dropped = encode(engine.tokenizer, pairs, most)
    if dropped:
        raise UserError(f"{dropped} test pairs are longer than the model's {most} positions")
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    found = [0.0] * len(examples)
    starts = range(0, len(order), batch_size)
    for start in runs.progress(starts, desc="references"):
        rows = order[start : start + batch_size]
        batch = [examples[i] for i in rows]
        tokens, labels = (part.to(engine.model.device) for part in collate(batch))  # (B, T) each
        lora = None
        if engine.adapter is not None:
            src_langs = [example.src_lang for example in batch]
            lora = engine.adapter(src_langs, [example.tgt_lang for example in batch])
        is_target = labels != IGNORE  # (B, T)
        hidden = engine.model(tokens, lora)[is_target]  # (N, D)
        logits = engine.model.lm_head(hidden).float()  # (N, V)
        nll = F.cross_entropy(logits, labels[is_target], reduction="none")  # (N,)
        row_of = is_target.nonzero()[:, 0]  # (N,)
        sums = torch.zeros(len(batch), device=nll.device).index_add(0, row_of, nll)  # (B,)
        for i, total in zip(rows, sums.tolist()):
            found[i] = total
    return found


def per_character(nlls: list[float], pairs: list[dict], samples: int = 1000) -> dict:
    """NLL per character of the references with its 95 % interval, by resampling pairs (one sentence
    in several directions counts as several)."""
    lengths = [len(pair["tgt"].strip()) for pair in pairs]
    rng, means = random.Random(0), []
    for _ in range(samples):
        chosen = rng.choices(range(len(nlls)), k=len(nlls))
        means.append(sum(nlls[i] for i in chosen) / sum(lengths[i] for i in chosen))
    means.sort()
    low, high = means[round(0.025 * samples)], means[round(0.975 * samples) - 1]
    mean = sum(nlls) / sum(lengths)
    return {"nll": mean, "low": low, "high": high, "sentences": len(nlls)}


def by_group(nlls: list[float], pairs: list[dict]) -> dict[str, dict]:
    """per_character of each direction, of English-centric and other directions, and of all."""
    members = {}
    for i, pair in enumerate(pairs):
        direction = pair["src_lang"], pair["tgt_lang"]
        for name in ("-".join(direction), group_of(*direction), "all"):
            members.setdefault(name, []).append(i)
    found = {}
    for name, own in members.items():
        found[name] = per_character([nlls[i] for i in own], [pairs[i] for i in own])
    return found


def parse_args() -> Namespace:
    parser = runs.ArgumentParser(__doc__)
    add = parser.add_argument
    add("--model", help="backbone: folder or hub name; default: the adapter's; alone: no adapter")
    add("--adapter", help="adapter folder that train.py wrote")
    add("--test", default="data/test.jsonl", help="test set as data.py writes it")
    add("--out", required=True, help="folder for likelihood.json")
    add("--batch-size", type=int, default=16, help="sentences at a time")
    runs.add_device_arguments(parser)
    args = parser.parse_args()
    runs.at_least(1, args, "batch_size")
    if args.model is None and args.adapter is None:
        raise UserError("--adapter or --model is needed")
    return args


def main() -> None:
    args = parse_args()
    if not (Path(args.out) / "scores.json").exists():
        raise UserError(f"--out {args.out}: no evaluation's folder; evaluate.py comes first")
    pairs = read_jsonl(args.test, LANGUAGES)
    engine = load_engine(args.model, args.adapter, device=args.device, dtype=args.dtype)
    languages = {pair["src_lang"] for pair in pairs} | {pair["tgt_lang"] for pair in pairs}
    check_languages(engine, languages, args.adapter or args.model)
    nlls = sentence_nlls(engine, pairs, args.batch_size)
    found = by_group(nlls, pairs)
    result = {"identity": engine.identity, "test_sha256": runs.file_sha256(args.test)}
    result.update(nll_per_character=found, nlls=[round(nll, 4) for nll in nlls])
    runs.write_json(Path(args.out) / "likelihood.json", result)
    lines = []
    for name, of_group in found.items():
        interval = f"{of_group['low']:.3f} to {of_group['high']:.3f}"
        lines.append([name, f"{of_group['nll']:.3f}", interval])
    print(markdown(["direction", "NLL per character", "95 %"], lines), end="")


if __name__ == "__main__":
    runs.run_main(main)
