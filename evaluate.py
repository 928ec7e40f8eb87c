"""Translate and score test sets: BLEU, off-target rate and cut-off rate a direction, averaged as in Table 1.

    torchrun --nproc_per_node=2 evaluate.py --all-directions --adapter runs/stage2/adapter --out runs/eval/stage2
    python evaluate.py --directions de-zh,zh-de --adapter runs/stage2/adapter --out runs/eval/zh
    python evaluate.py --all-directions --hypotheses anybody.jsonl --out runs/eval/anybody    # score only
    python evaluate.py --table runs/eval/base runs/eval/stage1 runs/eval/stage2               # Table 1 of finished runs

Writes hypotheses.jsonl, scores.json and table.md. The same command again continues a stopped run.
"""

import argparse
import json
from pathlib import Path

from sacrebleu.metrics import BLEU
from tqdm import tqdm

from data import LANGUAGES, all_directions, group_of, read_jsonl
from files import UserError, file_sha256, read_json, run_main, write_atomic
from generate import (add_engine_arguments, check_counts, claim_run, init_distributed, language_identifier, load_engine, markdown,
                      translate_jsonl)

SCORES = ("bleu", "off_target", "off_target_ref", "cut_off", "empty")
COLUMNS = {"english": "English-centric", "non_english": "non-English-centric", "average": "Average"}


def choose(rows, source, wanted):
    """{(src, tgt): rows} of the wanted directions ("all", or "de-zh,en-de"), English-centric first."""
    by_direction = {}
    for row in rows:
        by_direction.setdefault((row["src_lang"], row["tgt_lang"]), []).append(row)
    present = [lang for lang in LANGUAGES if any(lang in pair for pair in by_direction)]
    if wanted == "all":
        directions = all_directions(present)
    else:
        directions = [tuple(text.strip().split("-")) for text in wanted.split(",")]
        for pair in directions:
            if len(pair) != 2 or pair[0] == pair[1] or not set(pair) <= set(LANGUAGES):
                raise UserError(f"--directions: {'-'.join(pair)!r} is not a pair of known languages ({', '.join(LANGUAGES)}), such as de-zh")
    missing = ["-".join(pair) for pair in directions if pair not in by_direction]
    if missing:
        raise UserError(f"{source}: no pairs for {', '.join(missing)}")
    return {pair: by_direction[pair] for pair in directions}


def score(rows, tgt_lang, identify):
    """Scores of one direction's rows (each with tgt and hyp), in percent, and BLEU's signature.

    off_target: hypotheses that langid takes for another language, empty ones included; off_target_ref is the same
    for the references, so that the identifier's own errors can be told from the system's.
    """
    hyps, refs = [row["hyp"] for row in rows], [row["tgt"] for row in rows]
    bleu = BLEU(tokenize=LANGUAGES[tgt_lang].bleu)
    share = lambda flags: 100 * sum(flags) / len(rows)
    return {
        "bleu": bleu.corpus_score(hyps, [refs]).score,
        "off_target": share(not h.strip() or identify(h) != tgt_lang for h in hyps),
        "off_target_ref": share(identify(r) != tgt_lang for r in refs),
        "cut_off": share(row.get("finish") == "length" for row in rows),
        "empty": share(not h.strip() for h in hyps),
        "sentences": len(rows),
        "signature": str(bleu.get_signature()),
    }


def averages(directions):
    """Unweighted means over the directions of each group and over all, as the paper's tables have them."""
    groups = {name: [s for d, s in directions.items() if name in (group_of(*d.split("-")), "average")] for name in COLUMNS}
    return {name: {key: sum(s[key] for s in scores) / len(scores) for key in SCORES} for name, scores in groups.items() if scores}


def direction_table(scores):
    header = ["direction", "BLEU", "off-target %", "same, references %", "cut off %", "empty %"]
    lines = [[name, *(f"{s[k]:.2f}" for k in SCORES)] for name, s in scores["directions"].items()]
    lines += [[f"**{COLUMNS[name]}**", *(f"{s[k]:.2f}" for k in SCORES)] for name, s in scores["averages"].items()]
    signatures = sorted({s["signature"] for s in scores["directions"].values()})
    return markdown(header, lines) + "\n" + "\n".join(f"BLEU signature: `{s}`" for s in signatures) + "\n"


def summary_table(folders):
    """Table 1 of finished evaluation folders, one row each, named by the folder."""
    rows = []
    for folder in folders:
        means = read_json(Path(folder) / "scores.json").get("averages")
        if not means:
            raise UserError(f"{folder}/scores.json: no averages in it; --table takes --out folders of finished evaluations")
        rows.append([Path(folder).name, *(f"{means[g]['bleu']:.2f}" if g in means else "" for g in COLUMNS),
                     *(f"{means[g]['off_target']:.1f}" if g in means else "" for g in COLUMNS)])
    header = ["system", *(f"BLEU {name}" for name in COLUMNS.values()), *(f"off-target % {name}" for name in COLUMNS.values())]
    return markdown(header, rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all-directions", action="store_true", help="every ordered pair of the test set's languages (30 in the paper)")
    parser.add_argument("--directions", help="comma-separated, such as de-zh,en-de")
    parser.add_argument("--test", default="data/test.jsonl", help="test set, as data.py writes it (section 4.1, Table 5)")
    parser.add_argument("--hypotheses", help="score this JSONL (src_lang, tgt_lang, tgt, hyp) instead of translating")
    parser.add_argument("--out", help="folder for hypotheses.jsonl, scores.json and table.md")
    parser.add_argument("--table", nargs="+", metavar="DIR", help="print Table 1 of these finished --out folders and stop")
    add_engine_arguments(parser)
    args = parser.parse_args()
    if args.table:
        print(summary_table(args.table), end="")
        return
    check_counts(args)
    if args.all_directions == (args.directions is not None):
        raise UserError("either --all-directions or --directions de-zh,... is needed")
    if args.out is None:
        raise UserError("--out is needed: the folder for hypotheses and scores")
    if args.hypotheses and (args.adapter or args.model):
        raise UserError("--hypotheses scores what is there; --adapter and --model have no part in it")
    wanted, out, source = args.directions or "all", Path(args.out), args.hypotheses or args.test
    ranks = init_distributed(args.device)
    pairs = read_jsonl(source, need=("tgt",), text=("hyp",)) if args.hypotheses else read_jsonl(source)
    rows = choose(pairs, source, wanted)
    flat = [row for part in rows.values() for row in part]
    config = {"directions": wanted, "source": str(source), "source_sha256": file_sha256(source)}
    engine = None
    if not args.hypotheses:
        engine = load_engine(args.model, args.adapter, args.prompt_format, args.device, args.dtype)
        strangers = sorted({lang for pair in rows for lang in pair} - set(engine.languages))
        if strangers:
            raise UserError(f"{args.adapter or args.model}: no expert for {', '.join(strangers)}; it has {', '.join(engine.languages)}")
        config.update(engine.identity, max_new_tokens=args.max_new_tokens)
    identify = language_identifier(LANGUAGES)
    lock = claim_run(out, config, ranks)
    if engine is not None:
        flat = translate_jsonl(engine, flat, out / "hypotheses.jsonl", args.batch_size, args.max_new_tokens, ranks, out.name)
        rows = choose(flat, source, wanted)
    if lock is None:
        return  # scoring is the first rank's
    directions = {}
    for (src_lang, tgt_lang), part in tqdm(rows.items(), desc="scoring", disable=None):
        directions[f"{src_lang}-{tgt_lang}"] = score(part, tgt_lang, identify)
    scores = {"config": config, "averages": averages(directions), "directions": directions}
    write_atomic(out / "scores.json", json.dumps(scores, indent=2, ensure_ascii=False) + "\n")
    write_atomic(out / "table.md", direction_table(scores))
    print(direction_table(scores))
    print(summary_table([out]) + f"\n{out / 'hypotheses.jsonl' if engine else source}, {out / 'scores.json'}, {out / 'table.md'}")


if __name__ == "__main__":
    run_main(main)
