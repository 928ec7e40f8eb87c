"""Tables and figures of finished runs: Tables 1, 8 and 9, the paper's figures beside ours, heat
maps, training curves, significance, what pivot.py kept.

    python support/report.py                                   # Table 1 of all of runs/scores
    python support/report.py runs/scores/base runs/scores/stage1 --paper     # beside the paper's
    python support/report.py runs/scores/stage2 --against runs/scores/stage1 # paired bootstrap
    python support/report.py runs/stage1 runs/stage2 --curves curves.png     # loss, KL, rate
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this is a command, too
from data import LANGUAGES, all_directions, group_of
from support import runs
from support.corpora import read_jsonl
from support.runs import UserError, read_json, read_lines, write_atomic, write_json
from support.scores import KEYS, NAMES, ROUGE_TOKENS, paired_bootstrap

COLUMNS = {
    "english": "English-centric",
    "non_english": "non-English-centric",
    "average": "Average",
}
PAPER = Path(__file__).with_name("paper.json")  # the figures that the paper prints
DIGITS = {"off_target": 1, "off_target_ref": 1, "cut_off": 1, "empty": 1}  # rates; scores have 2


# --- tables ---------------------------------------------------------------------------------------


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are aligned right. Cells are strings."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def number(scores: dict | None, key: str) -> str:
    """A score as the tables print it, empty where there is none."""
    value = scores.get(key) if scores else None
    return "" if value is None else f"{value:.{DIGITS.get(key, 2)}f}"


def by_direction(rows: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """Rows by direction: {(src, tgt): rows}."""
    groups = {}
    for row in rows:
        groups.setdefault((row["src_lang"], row["tgt_lang"]), []).append(row)
    return groups


def averages(directions: dict) -> dict[str, dict]:
    """Unweighted means over the directions of each group and over all, as the paper's tables have
    them; a metric that is missing in a direction has none."""
    means = {}
    for column in COLUMNS:
        scores = []
        for direction, of_direction in directions.items():
            if column in (group_of(*direction.split("-")), "average"):
                scores.append(of_direction)
        if scores:
            means[column] = mean_scores(scores)
    return means


def mean_scores(scores: list[dict]) -> dict:
    """The mean of each metric that all of `scores` have."""
    means = {}
    for key in KEYS:
        values = [of_direction.get(key) for of_direction in scores]
        if None not in values:
            means[key] = sum(values) / len(values)
    return means


def read_scores(folder: str | Path) -> dict:
    """{"averages": ..., "directions": ...} of a finished evaluation folder. Raises UserError."""
    scores = read_json(Path(folder) / "scores.json")
    if not scores.get("averages") or not scores.get("directions"):
        raise UserError(f"{folder}/scores.json: no scores in it; is it an evaluation's folder?")
    return scores


def write_scores(
    out: Path, config: dict, directions: dict, comet: str | None, notes: list[str], sha256: str
) -> dict:
    """scores.json and table.md of `directions`, {"de-zh": scores}; returns what the first holds."""
    scores = {
        "config": config,
        "averages": averages(directions),
        "directions": directions,
        "notes": notes + ([f"COMET: {comet}, times 100"] if comet else []),
        "comet": comet,
        "hypotheses_sha256": sha256,
    }
    write_json(out / "scores.json", scores)
    write_atomic(out / "table.md", direction_table(scores))
    return scores


def table_1(
    systems: dict[str, dict], keys: tuple[str, ...] = ("bleu", "comet", "off_target")
) -> str:
    """Averages per group, a line per system; metrics that no system has are left out.
    systems: {name: averages}."""
    present = set()
    for means in systems.values():
        present.update(means.get("average", {}))
    cells = [(key, column) for key in keys if key in present for column in COLUMNS]
    header = ["system", *(f"{NAMES[key]} {COLUMNS[column]}" for key, column in cells)]
    lines = []
    for name, means in systems.items():
        lines.append([name, *(number(means.get(column), key) for key, column in cells)])
    return markdown(header, lines)


def has(scores: dict, key: str) -> bool:
    """Whether any direction of a system has this metric."""
    return any(of_direction.get(key) is not None for of_direction in scores.values())


def tables_8_9(
    systems: dict[str, dict], keys: tuple[str, ...] = ("bleu", "chrf", "rouge_l", "comet")
) -> str:
    """All directions, a table per metric, a column per system.
    systems: {name: {"de-zh": scores}}."""
    text = ""
    for key in keys:
        having = {name: scores for name, scores in systems.items() if has(scores, key)}
        lines = []
        for direction in map("-".join, all_directions(list(LANGUAGES))):
            if any(direction in scores for scores in having.values()):
                cells = [number(scores.get(direction), key) for scores in having.values()]
                lines.append([direction, *cells])
        if having:
            text += f"\n### {NAMES[key]}\n\n" + markdown(["direction", *having], lines)
    return text


def direction_table(scores: dict) -> str:
    """One system's directions with every metric, its averages, and how scores were computed."""
    keys = [key for key in KEYS if has(scores["directions"], key)]
    lines, signatures = [], set()
    for name, of_direction in scores["directions"].items():
        lines.append([name, *(number(of_direction, key) for key in keys)])
        signatures.update(of_direction["signatures"].items())
    for column, means in scores["averages"].items():
        lines.append([f"**{COLUMNS[column]}**", *(number(means, key) for key in keys)])
    notes = [f"{name}: `{signature}`" for name, signature in sorted(signatures)]
    notes += [ROUGE_TOKENS, *scores.get("notes", [])]
    table = markdown(["direction", *(NAMES[key] for key in keys)], lines)
    return table + "\n" + "".join(f"{note}  \n" for note in notes)


def pivot_table(report: dict[str, dict], rules: tuple[str, ...]) -> str:
    """Generated, kept and dropped by rule, a line per direction of pivot.py's report. A pair whose
    English was dropped counts as "en: rule"."""
    keys = ["generated", "kept", "of these repetitive"]
    for key in [*(f"en: {rule}" for rule in rules[:-1]), *rules]:
        if any(counts.get(key) for counts in report.values()):
            keys.append(key)
    lines = []
    for direction, counts in report.items():
        cells = [str(counts.get(key, 0)) for key in keys]
        lines.append([direction, *cells, counts["ended"]])
    return markdown(["direction", *keys, "ended because"], lines)


# --- the paper's figures --------------------------------------------------------------------------


def audit(paper: dict) -> list[str]:
    """Where the paper's tables disagree, one line each: a row's Average against its two groups of
    10 and 20 directions, Table 1 against Tables 8 and 9, and the notes of paper.json."""
    lines = []
    for table in ("table1", "table2", "table3", "table6", "table7"):
        for name, row in paper[table].items():
            for key in ("bleu", "comet"):
                mean = (row["english"][key] + 2 * row["non_english"][key]) / 3
                if abs(mean - row["average"][key]) > 0.0101:  # rounding alone explains 0.01
                    where = f"{table.replace('table', 'Table ')}, {name}"
                    printed = number(row["average"], key)
                    ours = f"its groups average to {mean:.2f} {NAMES[key]}"
                    lines.append(f"{where}: {ours}, it prints {printed}.")
    for name, same in paper["same_system"].items():
        means, printed = averages(paper["directions"][name]), paper["table1"][same]
        for key in ("bleu", "comet"):
            if max(abs(means[c][key] - printed[c][key]) for c in COLUMNS) > 0.015:
                ours = " / ".join(number(means[c], key) for c in COLUMNS)
                theirs = " / ".join(number(printed[c], key) for c in COLUMNS)
                lines.append(
                    f"{name}: the directions of Tables 8 and 9 average to {ours} {NAMES[key]}, "
                    f"Table 1 prints {theirs}."
                )
    return lines + paper["notes"]


def uneven_note(directions: dict[str, dict], with_paper: bool) -> str:
    """A line where the averages are over other directions than each other's, or the paper's 30."""
    sets = [frozenset(scores) for scores in directions.values()]
    if len(set(sets)) == 1 and (not with_paper or len(sets[0]) == 30):
        return ""
    counts = [f"{name} {len(scores)}" for name, scores in directions.items()]
    of_paper = ", the paper's of 30" if with_paper else ""
    return f"\nThe averages are of different directions ({', '.join(counts)}{of_paper}).\n"


def compare(folders: list[str | Path], with_paper: bool) -> str:
    """Markdown: Table 1 of evaluation folders, and with the paper's figures also Tables 8 and 9 and
    an audit of them."""
    names = [Path(folder).resolve().name for folder in folders]
    table, directions = {}, {}
    for name, folder in zip(names, folders):
        scores = read_scores(folder)
        unique = name if names.count(name) == 1 else str(folder)
        table[unique], directions[unique] = scores["averages"], scores["directions"]
    note = uneven_note(directions, with_paper)
    if not with_paper:
        return table_1(table) + note
    paper = read_json(PAPER)
    for name, scores in paper["table1"].items():
        table[f"paper: {name}"] = scores
    for name, scores in paper["directions"].items():
        directions[f"paper: {name}"] = scores
    text = table_1(table) + note + tables_8_9(directions)
    text += "\n### The paper's tables against each other\n\n"
    return text + "".join(f"- {line}\n" for line in audit(paper))


# --- figures --------------------------------------------------------------------------------------


def new_figure(**settings: Any) -> Any:
    """A figure that is only ever saved: no backend is asked for, and `$` in a name is a letter."""
    os.environ["MPLBACKEND"] = "agg"  # Jupyter's would have to be there even so
    import matplotlib.figure  # slow to import

    matplotlib.rcParams["text.parse_math"] = False
    return matplotlib.figure.Figure(**settings)


def heat_maps(directions: dict, folder: str | Path) -> None:
    """A PNG per metric: source languages in rows, target languages in columns.
    directions: {"de-zh": scores}."""
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    present = {lang for direction in directions for lang in direction.split("-")}
    languages = [lang for lang in LANGUAGES if lang in present]
    for key in KEYS:
        if has(directions, key):
            grid = []
            for src_lang in languages:
                row = [directions.get(f"{src_lang}-{tgt}", {}).get(key) for tgt in languages]
                grid.append([float("nan") if value is None else value for value in row])
            heat_map(grid, languages, NAMES[key], folder / f"{key}.png")


def heat_map(grid: list[list[float]], languages: list[str], title: str, path: str | Path) -> None:
    """One PNG; cells of NaN stay empty."""
    size = len(languages)
    figure = new_figure(figsize=(1.2 + 0.8 * size, 0.9 + 0.7 * size))
    axes = figure.subplots()
    image = axes.imshow(grid, cmap="viridis")
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            if value == value:  # not NaN
                color = "white" if image.norm(value) < 0.6 else "black"
                text = {"ha": "center", "va": "center", "fontsize": 9, "color": color}
                axes.text(x, y, f"{value:.1f}", **text)
    axes.set(xticks=range(size), yticks=range(size), xticklabels=languages, yticklabels=languages)
    axes.set(xlabel="target", ylabel="source", title=title)
    save_figure(figure, path)


def save_figure(figure: Any, path: str | Path) -> None:
    """A whole PNG or none. Raises UserError."""
    with runs.replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def read_curves(run: str | Path) -> tuple[list[dict], list[dict]]:
    """(logged steps, dev losses) of a run folder of train.py. Raises UserError."""
    path = Path(run) / "metrics.jsonl"
    try:
        rows = [json.loads(line) for line in read_lines(path)]
    except ValueError:
        raise UserError(f"{path}: not JSON lines; is the run being written?") from None
    steps, dev = [row for row in rows if "lr" in row], [row for row in rows if "dev" in row]
    if not steps:
        raise UserError(f"{path}: no steps in it; --curves takes run folders of train.py")
    return steps, dev


def curves(run_folders: list[str], path: str | Path) -> None:
    """Training curves of train.py's run folders as one PNG: NLL, KL and learning rate by step, dev
    loss where it was measured. Raises UserError for a folder without them, or a path not .png."""
    if Path(path).suffix != ".png" or not Path(path).parent.is_dir():
        raise UserError(f"--curves {path}: writes a .png file into a folder that exists")
    figure = new_figure(figsize=(15, 4), layout="constrained")
    panels = dict(zip(("nll", "kl", "lr"), figure.subplots(1, 3)))
    for run in run_folders:
        steps, dev = read_curves(run)
        name = Path(run).name
        for key, axes in panels.items():
            xs, ys = [row["step"] for row in steps], [row[key] for row in steps]
            marker = "o" if len(xs) == 1 else None  # a line of one point can't be seen
            (line,) = axes.plot(xs, ys, label=name, linewidth=1, marker=marker)
            if key != "lr" and dev:
                xs, ys = [row["step"] for row in dev], [row["dev"][key] for row in dev]
                axes.plot(xs, ys, "o--", color=line.get_color(), label=f"{name}, dev")
    titles = {"nll": "NLL per target token (eq. 8)", "kl": "KL per target token (eq. 7)"}
    for key, axes in panels.items():
        axes.set(title=titles.get(key, "learning rate"), xlabel="step")
        axes.legend()
    save_figure(figure, path)


# --- significance ---------------------------------------------------------------------------------


def read_hypotheses(folder: str | Path) -> dict[tuple[str, str], list[dict]]:
    """{direction: rows} of a finished evaluation."""
    file = Path(folder) / "hypotheses.jsonl"
    return by_direction(read_jsonl(file, LANGUAGES, need=("tgt",), text=("hyp",)))


def against(folder: str | Path, other: str | Path, samples: int) -> str:
    """Markdown: paired bootstrap of two finished evaluations, a line per direction
    (scores.paired_bootstrap). Raises UserError if they have no direction in common or translated
    other sentences."""
    ours, theirs = read_hypotheses(folder), read_hypotheses(other)
    shared = [pair for pair in ours if pair in theirs]
    if not shared:
        raise UserError(f"--against {other}: no direction in common with {folder}")
    lines, better = [], {"bleu": [0, 0], "chrf": [0, 0]}
    for pair in runs.progress(shared, desc="resampling"):
        found = paired_bootstrap(ours[pair], theirs[pair], pair[1], samples)
        line = ["-".join(pair)]
        for key, result in found.items():
            # Of no difference at all sacrebleu's p is its least.
            tie = result["ours"] == result["theirs"]
            for side in ("ours", "theirs"):
                line.append(f"{result[side]:.2f} ± {result[f'{side}_ci']:.2f}")
            line.append("-" if tie else f"{result['p']:.3f}")
            if result["p"] < 0.05 and not tie:
                winner = 0 if result["ours"] > result["theirs"] else 1
                better[key][winner] += 1
        lines.append(line)
    names = [Path(folder).name, Path(other).name]
    header, summary = ["direction"], ""
    for key, (a, b) in better.items():
        header += [f"{NAMES[key]} {what}" for what in (*names, "p")]
        summary += (
            f"{NAMES[key]}: {names[0]} better in {a}, {names[1]} better in {b} of {len(lines)} "
            "directions (p < 0.05)  \n"
        )
    summary += "± is half of the 95 % interval; paired bootstrap by sacrebleu, "
    return markdown(header, lines) + f"\n{summary}{samples} samples.\n"


# --- the command ----------------------------------------------------------------------------------


def finished_evaluations(root: str | Path = "runs/scores") -> list[Path]:
    """The evaluation folders in `root`. Raises UserError where there is none."""
    folders = sorted(path.parent for path in Path(root).glob("*/scores.json"))
    if not folders:
        raise UserError(
            f"{root}: no finished evaluation in it; `python evaluate.py --all-directions` makes one"
        )
    return folders


def main() -> None:
    parser = runs.ArgumentParser(__doc__)
    add = parser.add_argument
    add("folders", nargs="*", help="evaluations; default: all of runs/scores. With --curves: runs")
    add("--paper", action="store_true", help="the paper's figures beside ours, Tables 8 and 9 too")
    add("--against", metavar="DIR", help="paired bootstrap of the one folder against this one")
    add("--samples", type=int, default=1000, help="resamples of --against")
    add("--curves", metavar="PNG", help="training curves of these runs of train.py")
    args = parser.parse_args()
    runs.at_least(1, args, "samples")
    if args.curves:
        curves(args.folders or ["runs/stage1", "runs/stage2"], args.curves)
        print(args.curves)
    elif args.against:
        if len(args.folders) != 1:
            raise UserError("--against compares one folder with another: name it")
        print(against(args.folders[0], args.against, args.samples), end="")
    else:
        print(compare(args.folders or finished_evaluations(), args.paper), end="")


if __name__ == "__main__":
    runs.run_main(main)
