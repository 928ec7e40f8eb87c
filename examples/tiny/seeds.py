"""Whether `make tiny` keeps its promise over several backbones: the page of `make seeds`.

    python examples/tiny/seeds.py --runs runs/tiny runs/tiny-seed2 runs/tiny-seed3 \\
        --page docs/seeds.md --data-out docs/data/seeds.json

The page's part between its two markers is written from --data-out alone (without --runs: as it is),
what stands around it is kept.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from support import runs
from support.report import COLUMNS, markdown, page_around, read_scores

MAKER, TITLE = "examples/tiny/seeds.py", "The toy world over several backbones"
SYSTEMS = ("base", "stage1", "stage2")
WON, ZERO_SHOT, LOST = 30, 20, 3  # BLEU: at least, at least, at most


def of_run(run: Path) -> dict:
    """A backbone's seed, and each system's scores: {"seed", system: {"bleu", "off_target"}}."""
    found = {"seed": runs.read_json(run / "backbone/pretraining/config.json")["seed"]}
    for system in SYSTEMS:
        averages = read_scores(run / "scores" / system)["averages"]
        found[system] = {}
        for key in ("bleu", "off_target"):
            by_group = {column: round(averages[column][key], 2) for column in COLUMNS}
            found[system][key] = by_group
    return found


def gains(found: dict) -> tuple[float, float, float]:
    """What the promise is about: BLEU won by Stage 1 in English-centric directions, by Stage 2 in
    the others, and lost by Stage 2 in English-centric ones."""
    base, stage1, stage2 = (found[system]["bleu"] for system in SYSTEMS)
    won = stage1["english"] - base["english"]
    zero_shot = stage2["non_english"] - stage1["non_english"]
    return won, zero_shot, stage1["english"] - stage2["english"]


def is_kept(found: dict) -> bool:
    won, zero_shot, lost = gains(found)
    return won >= WON and zero_shot >= ZERO_SHOT and lost <= LOST


def page_of(data: dict) -> str:
    """The page's generated part. data: what --data-out holds."""
    promise = (
        "`make tiny` promises: Stage 1 lifts the 10 directions with English by at least "
        f"{WON} BLEU over the backbone alone; Stage 2 lifts the 20 others by at least {ZERO_SHOT} "
        f"over Stage 1, and loses at most {LOST} in the 10. Here it is with each of several "
        "backbones.\n"
    )
    header = ["seed", "right language %, backbone", "BLEU, backbone"]
    for stage in ("Stage 1", "Stage 2"):
        header += [f"{stage}, English-centric", f"{stage}, others"]
    header += ["Stage 2, average", "won by Stage 1", "won by Stage 2", "lost", "promise"]
    lines, averages = [], []
    for found in data["runs"]:
        base, stage1, stage2 = (found[system]["bleu"] for system in SYSTEMS)
        right = 100 - found["base"]["off_target"]["average"]
        averages.append(stage2["average"])
        scores = [right, base["average"], stage1["english"], stage1["non_english"]]
        scores += [stage2["english"], stage2["non_english"], stage2["average"], *gains(found)]
        cells = [str(found["seed"]), *(f"{score:.1f}" for score in scores)]
        lines.append([*cells, "kept" if is_kept(found) else "broken"])
    spread = max(averages) - min(averages)
    return (
        f"{promise}\n{markdown(header, lines)}\n"
        f"Stage 2's average lies between {min(averages):.1f} and {max(averages):.1f}, "
        f"a spread of {spread:.1f} BLEU.\n"
    )


def main() -> None:
    parser = runs.ArgumentParser(__doc__)
    add = parser.add_argument
    add("--runs", nargs="+", type=Path, help="folders of `make tiny`; without: --data-out is read")
    add("--page", required=True, help="Markdown file to write the table into")
    add("--data-out", required=True, help="JSON file, what --page is made from")
    args = parser.parse_args()
    before, behind = page_around(args.page, MAKER, TITLE)
    if args.runs is not None:
        runs.write_json(args.data_out, {"runs": [of_run(run) for run in args.runs]})
    page = page_of(runs.read_json(args.data_out))
    runs.write_atomic(args.page, before + page + behind)
    print(f"{page}\n{args.page}")


if __name__ == "__main__":
    runs.run_main(main)
