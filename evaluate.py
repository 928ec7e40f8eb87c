"""Translate and score test sets in any directions, averaged as in Table 1 (sections 4.1, 4.4 and A.5).

    torchrun --nproc_per_node=2 evaluate.py --all-directions --adapter runs/stage2/adapter --out runs/eval/stage2
    python evaluate.py --directions de-zh,zh-de --adapter runs/stage2/adapter --out runs/eval/zh
    python evaluate.py --all-directions --hypotheses anybody.jsonl --out runs/eval/anybody    # score only
    python evaluate.py --table runs/eval/base runs/eval/stage1 --compare paper                 # Tables 1, 8 and 9
    python evaluate.py --out runs/eval/stage2 --against runs/eval/stage1                       # paired bootstrap
    python evaluate.py --curves runs/stage1 runs/stage2 --out curves.png

Writes hypotheses.jsonl, scores.json, table.md and heat maps. The same command again continues a stopped run.
"""

import argparse
import json
from pathlib import Path

from tqdm import tqdm

from baselines import add_system_argument, engine_of, translate_via_english
from data import LANGUAGES, all_directions, read_jsonl
from devices import claim_run, init_distributed
from files import UserError, at_least, file_sha256, read_json, run_main, write_atomic, write_jsonl
from generate import add_engine_arguments, check_languages, translate_jsonl
from scores import comet_scores, language_identifier, load_comet, score
from tables import against, averages, compare, curves, direction_table, group, heat_maps, table_1


def choose(rows, source, wanted):
    """{(src, tgt): rows} of the wanted directions ("all", or "de-zh,en-de"), English-centric first."""
    by_direction = group(rows)
    present = [lang for lang in LANGUAGES if any(lang in pair for pair in by_direction)]
    if wanted == "all":
        directions = all_directions(present)
    else:
        directions = [tuple(text.strip().split("-")) for text in wanted.split(",")]
        for pair in directions:
            if len(pair) != 2 or pair[0] == pair[1] or not set(pair) <= set(LANGUAGES):
                known = ", ".join(LANGUAGES)
                raise UserError(f"--directions: {'-'.join(pair)!r} is not a pair of known languages ({known}), such as de-zh")
    missing = ["-".join(pair) for pair in directions if pair not in by_direction]
    if missing or not directions:
        raise UserError(f"{source}: no pairs for {', '.join(missing) or 'any direction'}; --directions names those to score")
    return {pair: by_direction[pair] for pair in directions}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all-directions", action="store_true", help="every ordered pair of the test set's languages (30 in the paper)")
    parser.add_argument("--directions", help="comma-separated, such as de-zh,en-de")
    parser.add_argument("--test", default="data/test.jsonl", help="test set, as data.py writes it (section 4.1, Table 5)")
    parser.add_argument("--hypotheses", help="score this JSONL (src_lang, tgt_lang, src, tgt, hyp) instead of translating")
    parser.add_argument("--out", help="folder for hypotheses.jsonl, scores.json, table.md and heatmaps/")
    parser.add_argument("--via-english", action="store_true", help="translate directions without English in two hops")
    parser.add_argument("--comet", help="also score with this COMET model (section 4.1): Unbabel/wmt22-comet-da, or a local folder")
    parser.add_argument("--table", nargs="+", metavar="DIR", help="print Table 1 of these finished --out folders and stop")
    parser.add_argument("--compare", choices=["paper"], help="with --table: the paper's figures beside ours, Tables 8 and 9 too")
    parser.add_argument("--against", metavar="DIR", help="paired bootstrap of a finished --out folder against this one, and stop")
    parser.add_argument("--samples", type=int, default=1000, help="resamples of --against")
    parser.add_argument("--curves", nargs="+", metavar="RUN",
                        help="write --out, a PNG, with the training curves of these train.py runs, and stop")
    add_engine_arguments(parser)
    add_system_argument(parser)
    args = parser.parse_args()
    if args.compare and not args.table:
        raise UserError("--compare goes with --table DIR...")
    if args.table:
        return print(compare(args.table, args.compare == "paper"), end="")
    at_least(1, args, "batch_size", "max_new_tokens", "samples")
    if args.out is None:
        raise UserError("--out is needed: the folder for hypotheses and scores, or the .png of --curves")
    if args.curves:
        curves(args.curves, args.out)
        return print(args.out)
    if args.against:
        return print(against(args.out, args.against, args.samples), end="")
    if args.all_directions == (args.directions is not None):
        raise UserError("either --all-directions or --directions de-zh,... is needed")
    if args.hypotheses and (args.adapter or args.model or args.system or args.via_english):
        raise UserError("--hypotheses scores what is there; --adapter, --model, --system and --via-english have no part in it")
    wanted, out, source = "all" if args.all_directions else args.directions, Path(args.out), args.hypotheses or args.test
    ranks = init_distributed(args.device)
    need = ("src", "tgt") if args.comet or not args.hypotheses else ("tgt",)
    pairs = read_jsonl(source, need=need, text=("hyp",) if args.hypotheses else ())
    rows = choose(pairs, source, wanted)
    flat = [row for part in rows.values() for row in part]
    config = {"directions": wanted, "source": str(source), "source_sha256": file_sha256(source)}
    engine, via_english = None, False
    if not args.hypotheses:
        engine = engine_of(args)
        check_languages(engine, {lang for pair in rows for lang in pair}, args.adapter or args.system or args.model)
        via_english = args.via_english or engine.via_english
        config.update(engine.identity, max_new_tokens=args.max_new_tokens, via_english=via_english)
    identify = language_identifier(LANGUAGES)
    lock = claim_run(out, config, ranks)
    if engine is not None:
        translate = translate_via_english if via_english else translate_jsonl
        flat = translate(engine, flat, out / "hypotheses.jsonl", args.batch_size, args.max_new_tokens, ranks, out.name)
        rows = choose(flat, source, wanted)
    if lock is None:
        return  # scoring is the first rank's
    if args.hypotheses:
        write_jsonl(out / "hypotheses.jsonl", flat)
    directions = {"-".join(pair): score(part, pair[1], identify) for pair, part in tqdm(rows.items(), desc="scoring", disable=None)}
    hypotheses_sha256, notes, comet = file_sha256(out / "hypotheses.jsonl"), [], None
    old = read_json(out / "scores.json") if (out / "scores.json").exists() else {}
    if old.get("comet") and old["hypotheses_sha256"] == hypotheses_sha256:
        comet = old["comet"]  # of these very hypotheses: not computed again, and kept where another COMET fails
        for name, scores in directions.items():
            scores["comet"] = old["directions"][name]["comet"]

    def save():
        lines = notes + ([f"COMET: {comet}, times 100"] if comet else [])
        scores = {"config": config, "averages": averages(directions), "directions": directions, "notes": lines, "comet": comet,
                  "hypotheses_sha256": hypotheses_sha256}
        write_atomic(out / "scores.json", json.dumps(scores, indent=2, ensure_ascii=False) + "\n")
        write_atomic(out / "table.md", direction_table(scores))
        return scores

    save()  # COMET is slow and can fail: what is known by now is kept
    if args.comet not in (None, comet):
        del engine  # its memory is COMET's now
        try:
            every = iter(comet_scores(load_comet(args.comet), flat, device=args.device))
        except UserError as error:
            notes.append(str(error))
        else:
            comet = args.comet
            for name, part in rows.items():
                directions["-".join(name)]["comet"] = sum(next(every) for _ in part) / len(part)
    scores = save()
    heat_maps(directions, out / "heatmaps")
    print(direction_table(scores))
    print(table_1({out.name: scores["averages"]}))
    print(", ".join(str(out / name) for name in ("hypotheses.jsonl", "scores.json", "table.md", "heatmaps")))
    lock.close()  # after COMET this frame, and with it the lock, was seen to outlive main in one process


if __name__ == "__main__":
    run_main(main)
