"""Translate and score test sets in any directions, averaged as in Table 1 (sections 4.1, A.5).

    python evaluate.py --all-directions              # runs/stage2 -> runs/scores/stage2
    python evaluate.py --directions de-zh,zh-de --adapter runs/stage1/adapter
    python evaluate.py --all-directions --hypotheses anybody.jsonl      # score only
    python evaluate.py --all-directions --system nllb                   # Table 1's prior systems

Under torchrun several processes translate. Writes hypotheses.jsonl, scores.json, table.md and heat
maps, which support/report.py compares. The same command again continues a stopped run.
"""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from data import LANGUAGES, all_directions
from generate import add_engine_arguments, check_languages, default_adapter
from support import runs
from support.baselines import add_system_argument, engine_of
from support.corpora import read_jsonl
from support.report import by_direction, direction_table, heat_maps, table_1, write_scores
from support.runs import UserError
from support.scores import comet_scores, language_identifier, load_comet, score
from support.translations import translate_jsonl, translate_via_english


def choose(rows: list[dict], source: str, wanted: str) -> dict:
    """{(src, tgt): rows} of the wanted directions ("all", or "de-zh,en-de"), English-centric
    first."""
    groups = by_direction(rows)
    if wanted == "all":
        present = {lang for direction in groups for lang in direction}
        directions = all_directions([lang for lang in LANGUAGES if lang in present])
    else:
        directions = [parse_direction(text) for text in wanted.split(",")]
    missing = ["-".join(direction) for direction in directions if direction not in groups]
    if missing or not directions:
        which = ", ".join(missing) or "any direction"
        raise UserError(f"{source}: no pairs for {which}; --directions names those to score")
    return {direction: groups[direction] for direction in directions}


def parse_direction(text: str) -> tuple[str, ...]:
    """'de-zh' -> ('de', 'zh')."""
    pair = tuple(text.strip().split("-"))
    if len(pair) != 2 or pair[0] == pair[1] or not set(pair) <= set(LANGUAGES):
        known = ", ".join(LANGUAGES)
        name = "-".join(pair)
        raise UserError(f"--directions: {name!r} is no pair, such as de-zh, of {known}")
    return pair


def parse_args() -> Namespace:
    parser = runs.ArgumentParser(__doc__)
    add = parser.add_argument
    thirty = "every ordered pair of the test set's languages (30 in the paper)"
    add("--all-directions", action="store_true", help=thirty)
    add("--directions", help="comma-separated, such as de-zh,en-de")
    add("--test", default="data/test.jsonl", help="test set as data.py writes it (Table 5)")
    add("--hypotheses", help="score this JSONL (src_lang, tgt_lang, src, tgt, hyp) instead")
    add("--out", help="folder for all results; default runs/scores/NAME of the run or system")
    add("--via-english", action="store_true", help="two hops for directions without English")
    comet = "also score with this COMET (section 4.1): Unbabel/wmt22-comet-da, or a local folder"
    add("--comet", help=comet)
    add_engine_arguments(parser)
    add_system_argument(parser)
    args = parser.parse_args()
    runs.at_least(1, args, "batch_size", "max_new_tokens")
    if args.all_directions == (args.directions is not None):
        raise UserError("either --all-directions or --directions de-zh,... is needed")
    translates = args.adapter or args.model or args.system
    if args.hypotheses and (translates or args.via_english):
        excluded = "--adapter, --model, --system and --via-english"
        raise UserError(f"--hypotheses scores what is there; {excluded} have no part in it")
    if not (args.hypotheses or translates):
        args.adapter = default_adapter()
    args.out = args.out or f"runs/scores/{default_name(args)}"
    return args


def default_name(args: Namespace) -> str:
    """What an evaluation is called where --out doesn't say: stage2 for runs/stage2/adapter."""
    if args.hypotheses:
        return Path(args.hypotheses).stem
    if args.adapter:
        folder = Path(args.adapter).resolve()
        return folder.parent.name if folder.name == "adapter" else folder.name
    return args.system or Path(args.model).name


def read_test(args: Namespace, wanted: str) -> tuple[dict, str]:
    """({direction: its pairs}, the file they are from)."""
    source = args.hypotheses or args.test
    if not Path(source).exists() and not args.hypotheses:
        raise UserError(f"{source}: no such file; `python data.py --source publisher` makes it")
    need = ("src", "tgt") if args.comet or not args.hypotheses else ("tgt",)
    pairs = read_jsonl(source, LANGUAGES, need=need, text=("hyp",) if args.hypotheses else ())
    return choose(pairs, source, wanted), source


def known_comet(old: dict, hypotheses_sha256: str, directions: dict) -> str | None:
    """The COMET that an earlier scoring of these very hypotheses used, whose scores are kept."""
    if not old.get("comet") or old["hypotheses_sha256"] != hypotheses_sha256:
        return None
    for name, scores in directions.items():
        scores["comet"] = old["directions"][name]["comet"]
    return old["comet"]


def score_all(args: Namespace, out: Path, config: dict, rows: dict, identify: Callable) -> None:
    """Score the hypotheses of {direction: rows}, write and print the tables."""
    directions = {}
    for pair, part in runs.progress(rows.items(), desc="scoring"):
        directions["-".join(pair)] = score(part, pair[1], identify)
    sha256, notes = runs.file_sha256(out / "hypotheses.jsonl"), []
    old = runs.read_json(out / "scores.json") if (out / "scores.json").exists() else {}
    comet = known_comet(old, sha256, directions)
    # COMET is slow and can fail: what is known by now is kept.
    scores = write_scores(out, config, directions, comet, notes, sha256)
    if args.comet not in (None, comet):
        flat = [row for part in rows.values() for row in part]
        try:
            every = comet_scores(load_comet(args.comet), flat, device=args.device)
        except UserError as error:
            notes.append(str(error))
        else:
            comet = args.comet
            start = 0
            for pair, part in rows.items():
                own = every[start : start + len(part)]
                directions["-".join(pair)]["comet"] = sum(own) / len(part)
                start += len(part)
        scores = write_scores(out, config, directions, comet, notes, sha256)
    heat_maps(directions, out / "heatmaps")
    print(direction_table(scores))
    print(table_1({out.name: scores["averages"]}))
    results = ("hypotheses.jsonl", "scores.json", "table.md", "heatmaps")
    print(", ".join(str(out / name) for name in results))


def main() -> None:
    args = parse_args()
    out, wanted = Path(args.out), "all" if args.all_directions else args.directions
    ranks = runs.init_distributed(args.device, args.timeout)
    rows, source = read_test(args, wanted)
    flat = [row for part in rows.values() for row in part]
    config = {"directions": wanted, "source_sha256": runs.file_sha256(source)}
    engine, via_english = None, False
    if not args.hypotheses:
        engine = engine_of(args, ranks)
        languages = {lang for pair in rows for lang in pair}
        check_languages(engine, languages, args.adapter or args.system or args.model)
        via_english = args.via_english or engine.via_english
        config.update(engine.identity, max_new_tokens=args.max_new_tokens, via_english=via_english)
    identify = language_identifier(LANGUAGES)
    lock = runs.claim_run(out, config, ranks)
    if engine is not None:
        translate = translate_via_english if via_english else translate_jsonl
        file, sizes = out / "hypotheses.jsonl", (args.batch_size, args.max_new_tokens)
        flat = translate(engine, flat, file, *sizes, ranks, out.name)
        rows = choose(flat, source, wanted)
    if lock is None:
        return  # scoring is rank 0's
    if args.hypotheses:
        runs.write_jsonl(out / "hypotheses.jsonl", flat)
    del engine  # its memory is COMET's now
    score_all(args, out, config, rows, identify)
    lock.close()


if __name__ == "__main__":
    runs.run_main(main)
