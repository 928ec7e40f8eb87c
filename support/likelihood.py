"""How likely a system finds the reference translations: the NLL per character, which tells systems
apart where BLEU is near 0.

    python support/likelihood.py --adapter runs/stage2/adapter --out runs/scores/stage2
    python support/likelihood.py --model Qwen/Qwen2.5-0.5B-Instruct --out runs/scores/base

Writes likelihood.json beside an evaluation's scores, and prints a table; what is written already is
printed. Per character, not per token, so that backbones of other tokenizers can be compared; nats,
the end of turn included.
"""

import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import IGNORE, LANGUAGES, collate, encode, group_of
from generate import Engine, check_languages, load_engine
from support import runs
from support.corpora import read_jsonl
from support.report import by_direction, markdown
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


def middle(values: np.ndarray) -> list[float]:
    """[low, high] of the middle 95 % of `values`."""
    return [round(float(x), 4) for x in np.quantile(values, (0.025, 0.975))]


def sentence_draws(pairs: list[dict], samples: int) -> np.ndarray:
    """(samples, sentences): which sentences each resample takes, the same in every direction."""
    count = max(map(len, by_direction(pairs).values()))
    return np.random.default_rng(0).integers(0, count, (samples, count))


def per_character(nlls: list[float], pairs: list[dict], draws: np.ndarray) -> dict[str, dict]:
    """NLL per character of the references in each direction, in those with English ("english"), the
    others ("non_english") and all: {group: {"mean", "interval"}}. The 95 % interval is that of
    resampling sentences: a direction's n-th pair is drawn wherever another's n-th is, for it may be
    the same sentence. nlls are in the order of `pairs`; differences of two systems' will do."""
    seen, sums = Counter(), {}
    for nll, pair in zip(nlls, pairs, strict=True):
        direction = pair["src_lang"], pair["tgt_lang"]
        sentence = seen[direction]
        seen[direction] += 1
        for group in ("-".join(direction), group_of(*direction), "all"):
            of_group = sums.setdefault(group, np.zeros((2, draws.shape[1])))
            of_group[:, sentence] += nll, len(pair["tgt"].strip())
    found = {}
    for group, (nll, characters) in sums.items():
        values = nll[draws].sum(1) / np.maximum(1, characters[draws].sum(1))  # (samples,)
        mean = round(float(nll.sum() / characters.sum()), 4)
        found[group] = {"mean": mean, "interval": middle(values)}
    return found


def rescored(file: Path, identity: dict, test_sha256: str) -> dict | None:
    """What `file` says of this system and test set; None where it is of others, or not there."""
    if not file.exists():
        return None
    found = runs.read_json(file)
    same = found.get("identity") == identity and found.get("test_sha256") == test_sha256
    return found if same else None


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
    if not pairs:
        raise UserError(f"{args.test}: no sentence pairs in it")
    engine = load_engine(args.model, args.adapter, device=args.device, dtype=args.dtype)
    languages = {pair["src_lang"] for pair in pairs} | {pair["tgt_lang"] for pair in pairs}
    check_languages(engine, languages, args.adapter or args.model)
    file, test = Path(args.out) / "likelihood.json", runs.file_sha256(args.test)
    result = rescored(file, engine.identity, test)
    if result is None:
        nlls = sentence_nlls(engine, pairs, args.batch_size)
        result = {"identity": engine.identity, "test_sha256": test}
        result["nll_per_character"] = per_character(nlls, pairs, sentence_draws(pairs, 1000))
        result["nlls"] = [round(nll, 4) for nll in nlls]
        runs.write_json(file, result)
    lines = []
    for name, of_group in result["nll_per_character"].items():
        interval = "{:.3f} to {:.3f}".format(*of_group["interval"])
        lines.append([name, f"{of_group['mean']:.3f}", interval])
    print(markdown(["direction", "NLL per character", "95 %"], lines), end="")


if __name__ == "__main__":
    runs.run_main(main)
