"""Pseudo-corpora for the 20 non-English directions: X -> English -> Y with the Stage 1 adapter (sections 3.3, A.2).

    torchrun --nproc_per_node=2 pivot.py --adapter runs/stage1/adapter --data data --out runs/pseudo
    torchrun --nproc_per_node=2 pivot.py --model meta-llama/... --data data --out runs/pseudo-base    # Table 7: the bare backbone
    torchrun --nproc_per_node=2 pivot.py --system nllb --data data --out runs/pseudo-nllb              # Table 7: NLLB

X comes from the part of OPUS-100 that Stage 1 did not train on. Translations are filtered; rounds go on until every
direction has --pairs of them or its source runs out. Writes pseudo.train.jsonl, pseudo.dev.jsonl, report.json and
report.md. The same command again continues a stopped run.
"""

import argparse
import hashlib
import json
import math
import random
from collections import Counter
from pathlib import Path

from baselines import add_system_argument, engine_of
from corpora import length_ratio
from data import PIVOT, pair_row, parse_languages, read_jsonl
from devices import claim_run, init_distributed
from files import UserError, at_least, file_sha256, read_json, run_main, write_atomic, write_jsonl
from generate import add_engine_arguments, check_languages, translate_jsonl
from scores import language_identifier
from tables import report_table

RULES = ("empty", "cut_off", "off_target", "length_ratio", "duplicate")


def rejected(row, lang, source, identify, max_ratio):
    """The first rule (section A.2) that drops a translation `row` into `lang` of `source`, or None."""
    if not row["hyp"].strip():
        return "empty"
    if row["finish"] == "length":
        return "cut_off"
    if identify(row["hyp"]) != lang:
        return "off_target"
    if length_ratio(source, row["hyp"]) > max_ratio:
        return "length_ratio"
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data", help="folder that data.py wrote; pivot.source.jsonl is read")
    parser.add_argument("--out", default="runs/pseudo", help="folder for the pseudo pairs and the report")
    parser.add_argument("--pairs", type=int, default=20000, help="pairs wanted a direction (section 4.1)")
    parser.add_argument("--dev-share", type=float, default=0.1, help="share set aside as dev: 2,000 of 20,000 (section A.2, Table 5)")
    parser.add_argument("--max-ratio", type=float, default=2.5,
                        help="longer over shorter side in letters, a Chinese character being three; the paper is silent")
    parser.add_argument("--share-english", action=argparse.BooleanOptionalAction, default=True,
                        help="one English translation of a sentence serves all targets of its language, whose pairs then share their "
                             "sources; without it every direction has sentences of its own: more work into English, and more sentences, "
                             "see data.py --pivot-pairs")
    parser.add_argument("--seed", type=int, default=0)
    add_engine_arguments(parser)
    add_system_argument(parser)
    args = parser.parse_args()
    at_least(1, args, "batch_size", "max_new_tokens", "pairs", "max_ratio")
    if not 0 <= args.dev_share < 1:
        raise UserError(f"--dev-share {args.dev_share}: must lie in [0, 1)")
    out, source_file = Path(args.out), Path(args.data) / "pivot.source.jsonl"
    ranks = init_distributed(args.device)
    pool = {}  # X -> its sentences, each once
    for row in read_jsonl(source_file, need=("src",)):
        pool.setdefault(row["src_lang"], {})[row["src"]] = None
    if not pool:
        raise UserError(f"{source_file}: no sentences in it; data.py --train-pairs must leave some of OPUS-100 to the pivot")
    languages = parse_languages(read_json(Path(args.data) / "config.json").get("languages", ""))  # what data.py prepared
    others = [lang for lang in languages if lang != PIVOT]
    if len(others) < 2:
        raise UserError(f"{args.data}: has {', '.join(languages)}; a pivot needs two languages beside {PIVOT}")
    engine = engine_of(args)
    check_languages(engine, set(languages), args.adapter or args.system or args.model)
    config = {**engine.identity, "pairs": args.pairs, "dev_share": args.dev_share, "max_ratio": args.max_ratio, "seed": args.seed,
              "max_new_tokens": args.max_new_tokens, "source_sha256": file_sha256(source_file),
              **({} if args.share_english else {"share_english": False})}
    lock = claim_run(out, config, ranks)
    if ranks.of_first((out / "report.json").exists):
        if ranks.rank == 0:
            print(f"{out}: made already\n" + (out / "report.md").read_text(encoding="utf-8"), end="")
        return
    sources = {lang: random.Random(f"{args.seed} {lang}").sample(list(pool.get(lang, {})), len(pool.get(lang, {}))) for lang in others}
    identify = language_identifier(languages)
    streams = {}  # directions that share their sentences -> these sentences
    for x in others:
        out_of_x = tuple((x, y) for y in others if y != x)
        streams |= {out_of_x: sources[x]} if args.share_english else {(d,): sources[x][i :: len(out_of_x)] for i, d in enumerate(out_of_x)}
    directions = [d for stream in streams for d in stream]
    kept = {d: {} for d in directions}  # target -> pair: a target that comes twice is a duplicate
    counts = {d: Counter() for d in directions}
    used, number = dict.fromkeys(streams, 0), 0
    work = out / "rounds"
    work.mkdir(exist_ok=True)

    def translated(rows, name, what):
        file, desc = work / f"{number}.{name}.jsonl", f"round {number}: {what}"
        return translate_jsonl(engine, rows, file, args.batch_size, args.max_new_tokens, ranks, desc)

    missing = lambda stream: max(args.pairs - len(kept[d]) for d in stream)
    while any(missing(stream) > 0 and used[stream] < len(streams[stream]) for stream in streams):
        number += 1
        rows, serves = [], []
        for stream, sentences in streams.items():
            # The rate of the worst direction so far says how many more sentences the missing pairs will take.
            rate = min((len(kept[d]) + 1) / (counts[d]["generated"] + 1) for d in stream)
            take = math.ceil(1.1 * missing(stream) / max(rate, 0.1)) if missing(stream) > 0 else 0
            rows += [{"src_lang": stream[0][0], "tgt_lang": PIVOT, "src": text} for text in sentences[used[stream] : used[stream] + take]]
            serves += [stream] * (len(rows) - len(serves))
            used[stream] = min(used[stream] + take, len(sentences))
        english = translated(rows, "english", "X -> en")
        rows = []
        for row, stream in zip(english, serves):
            why = rejected(row, PIVOT, row["src"], identify, args.max_ratio)
            for d in stream:  # those that still lack pairs
                if len(kept[d]) < args.pairs:
                    counts[d]["generated"] += 1
                    if why:
                        counts[d][f"en: {why}"] += 1
                    else:
                        rows.append({"src_lang": PIVOT, "tgt_lang": d[1], "src": row["hyp"], "x_lang": d[0], "x": row["src"]})
        for row in translated(rows, "targets", "en -> Y"):
            d, hyp = (row["x_lang"], row["tgt_lang"]), row["hyp"]
            why = rejected(row, d[1], row["x"], identify, args.max_ratio) or ("duplicate" if hyp in kept[d] else None)
            if why:
                counts[d][why] += 1
            elif len(kept[d]) < args.pairs:
                kept[d][hyp] = {**pair_row(*d, row["x"], hyp, "pseudo"), "pivot": row["src"]}
            else:
                counts[d]["generated"] -= 1  # more came than was wanted: neither kept nor dropped
    if lock is None:
        return  # the files are the first rank's
    train, dev, report = [], [], {}
    for stream in streams:
        for d in stream:
            # Ordered by the source's hash, so that targets that share their sources set mostly the same sentences aside as dev.
            pairs = sorted(kept[d].values(), key=lambda row: hashlib.sha256(row["src"].encode()).digest())
            aside = round(args.dev_share * len(pairs))
            dev += pairs[:aside]
            train += pairs[aside:]
            ended = "complete" if len(pairs) == args.pairs else f"source ran out after {used[stream]} sentences"
            report["-".join(d)] = {"generated": 0, **counts[d], "kept": len(pairs), "ended": ended}
    write_jsonl(out / "pseudo.train.jsonl", train)
    write_jsonl(out / "pseudo.dev.jsonl", dev)
    write_atomic(out / "report.md", report_table(report, RULES))
    write_atomic(out / "report.json", json.dumps(report, indent=2) + "\n")
    print(report_table(report, RULES) + f"{out / 'pseudo.train.jsonl'}: {len(train)} pairs, {out / 'pseudo.dev.jsonl'}: {len(dev)}")
    lock.close()


if __name__ == "__main__":
    run_main(main)
