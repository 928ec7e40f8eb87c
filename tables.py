"""Tables and figures of finished runs: Table 1, Tables 8 and 9, the paper's own figures beside ours, heat maps, curves,
significance, what pivot.py kept."""

import json
from pathlib import Path

from tqdm import tqdm

from data import LANGUAGES, all_directions, group_of, read_jsonl
from files import UserError, markdown, read_json, read_lines
from scores import KEYS, NAMES, ROUGE_TOKENS, paired_bootstrap

COLUMNS = {"english": "English-centric", "non_english": "non-English-centric", "average": "Average"}
PAPER = Path(__file__).with_name("docs") / "paper.json"
DIGITS = {"off_target": 1, "off_target_ref": 1, "cut_off": 1, "empty": 1}  # the rates; scores have 2


def number(scores, key):
    return f"{scores[key]:.{DIGITS.get(key, 2)}f}" if scores and scores.get(key) is not None else ""


def averages(directions):
    """Unweighted means over the directions of each group and over all, as the paper's tables have them; a metric that
    is missing in a direction has none."""
    means = {}
    for name in COLUMNS:
        scores = [s for d, s in directions.items() if name in (group_of(*d.split("-")), "average")]
        if scores:
            means[name] = {k: sum(s[k] for s in scores) / len(scores) for k in KEYS if all(s.get(k) is not None for s in scores)}
    return means


def read_scores(folder):
    """{"averages": ..., "directions": ...} of a finished evaluation folder."""
    scores = read_json(Path(folder) / "scores.json")
    if not scores.get("averages") or not scores.get("directions"):
        raise UserError(f"{folder}/scores.json: no scores in it; --table takes --out folders of finished evaluations")
    return scores


def table_1(systems, keys=("bleu", "comet", "off_target")):
    """Averages a group, a line a system; metrics that no system has are left out. systems: {name: averages}."""
    keys = [k for k in keys if any(k in means.get("average", {}) for means in systems.values())]
    header = ["system", *(f"{NAMES[k]} {group}" for k in keys for group in COLUMNS.values())]
    return markdown(header, [[name, *(number(means.get(g), k) for k in keys for g in COLUMNS)] for name, means in systems.items()])


def tables_8_9(systems, keys=("bleu", "chrf", "rouge_l", "comet")):
    """All directions, a table a metric and a column a system. systems: {name: {"de-zh": scores}}."""
    directions = ["-".join(pair) for pair in all_directions(list(LANGUAGES))]
    text = ""
    for key in keys:
        having = {name: scores for name, scores in systems.items() if any(s.get(key) is not None for s in scores.values())}
        if having:
            there = [d for d in directions if any(d in scores for scores in having.values())]
            lines = [[d, *(number(scores.get(d), key) for scores in having.values())] for d in there]
            text += f"\n### {NAMES[key]}\n\n" + markdown(["direction", *having], lines)
    return text


def direction_table(scores):
    """One system's directions with every metric, its averages, and how the scores were computed."""
    keys = [k for k in KEYS if any(s.get(k) is not None for s in scores["directions"].values())]
    lines = [[name, *(number(s, k) for k in keys)] for name, s in scores["directions"].items()]
    lines += [[f"**{COLUMNS[name]}**", *(number(s, k) for k in keys)] for name, s in scores["averages"].items()]
    signatures = sorted({(name, sig) for s in scores["directions"].values() for name, sig in s["signatures"].items()})
    notes = [*(f"{name}: `{signature}`" for name, signature in signatures), ROUGE_TOKENS, *scores.get("notes", [])]
    return markdown(["direction", *(NAMES[k] for k in keys)], lines) + "\n" + "".join(f"{note}  \n" for note in notes)


def audit(paper):
    """Where the paper's tables disagree, one line each: a row's Average against its two groups of 10 and 20 directions,
    Table 1 against the averages of Tables 8 and 9, and the notes of docs/paper.json."""
    lines = []
    for table in ("table1", "table2", "table3", "table6", "table7"):
        for name, row in paper[table].items():
            for key in ("bleu", "comet"):
                mean = (row["english"][key] + 2 * row["non_english"][key]) / 3
                if abs(mean - row["average"][key]) > 0.0101:  # three figures of two digits each
                    where = f"{table.replace('table', 'Table ')}, {name}"
                    lines.append(f"{where}: its groups average to {mean:.2f} {NAMES[key]}, it prints {number(row['average'], key)}.")
    for name, same in paper["same_system"].items():
        means, printed = averages(paper["directions"][name]), paper["table1"][same]
        for key in ("bleu", "comet"):
            if any(abs(means[g][key] - printed[g][key]) > 0.015 for g in COLUMNS):
                ours, theirs = (" / ".join(number(m[g], key) for g in COLUMNS) for m in (means, printed))
                lines.append(f"{name}: the directions of Tables 8 and 9 average to {ours} {NAMES[key]}, Table 1 prints {theirs}.")
    return lines + paper["notes"]


def compare(folders, with_paper):
    """Markdown: Table 1 of evaluation folders, and with the paper's figures also Tables 8 and 9 and an audit of them."""
    names = [Path(folder).name for folder in folders]
    ours = {name if names.count(name) == 1 else str(folder): read_scores(folder) for name, folder in zip(names, folders)}
    table, directions = {n: s["averages"] for n, s in ours.items()}, {n: s["directions"] for n, s in ours.items()}
    if not with_paper:
        return table_1(table)
    paper = read_json(PAPER)
    table.update({f"paper: {name}": scores for name, scores in paper["table1"].items()})
    directions.update({f"paper: {name}": scores for name, scores in paper["directions"].items()})
    return (table_1(table) + tables_8_9(directions) + "\n### The paper's tables against each other\n\n"
            + "".join(f"- {line}\n" for line in audit(paper)))


def heat_maps(directions, folder):
    """One PNG a metric: source languages in rows, target languages in columns. directions: {"de-zh": scores}."""
    from matplotlib.figure import Figure  # slow to import

    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    languages = [lang for lang in LANGUAGES if any(lang in d.split("-") for d in directions)]
    for key in KEYS:
        grid = [[directions.get(f"{s}-{t}", {}).get(key) for t in languages] for s in languages]
        if not any(value is not None for row in grid for value in row):
            continue
        figure = Figure(figsize=(1.2 + 0.8 * len(languages), 0.9 + 0.7 * len(languages)))
        axes = figure.subplots()
        image = axes.imshow([[float("nan") if v is None else v for v in row] for row in grid], cmap="viridis")
        for y, row in enumerate(grid):
            for x, value in enumerate(row):
                if value is not None:
                    dark = image.norm(value) < 0.6
                    axes.text(x, y, f"{value:.1f}", ha="center", va="center", fontsize=9, color="white" if dark else "black")
        axes.set(xticks=range(len(languages)), yticks=range(len(languages)), xticklabels=languages, yticklabels=languages,
                 xlabel="target", ylabel="source", title=NAMES[key])
        figure.savefig(folder / f"{key}.png", dpi=120)


def curves(runs, path):
    """Training curves of train.py's run folders as one PNG: NLL, KL and learning rate a step, dev loss where it was
    measured. Raises UserError for a folder without them, or a path that can't be such a picture."""
    from matplotlib.figure import Figure

    if Path(path).suffix != ".png" or not Path(path).parent.is_dir():
        raise UserError(f"--out {path}: --curves writes a .png file into a folder that exists")

    figure = Figure(figsize=(15, 4), layout="constrained")
    panels = dict(zip(("nll", "kl", "lr"), figure.subplots(1, 3)))
    for run in runs:
        try:
            rows = [json.loads(line) for line in read_lines(Path(run) / "metrics.jsonl")]
        except ValueError:
            raise UserError(f"{run}/metrics.jsonl: not JSON lines; is the run being written?") from None
        steps, dev = [row for row in rows if "lr" in row], [row for row in rows if "dev" in row]
        if not steps:
            raise UserError(f"{run}/metrics.jsonl: no steps in it; --curves takes run folders of train.py")
        for key, axes in panels.items():
            line, = axes.plot([row["step"] for row in steps], [row[key] for row in steps], label=Path(run).name, linewidth=1)
            if key != "lr" and dev:
                xs, ys = [row["step"] for row in dev], [row["dev"][key] for row in dev]
                axes.plot(xs, ys, "o--", color=line.get_color(), label=f"{Path(run).name}, dev")
    for key, title in (("nll", "NLL a target token (eq. 8)"), ("kl", "KL a target token (eq. 7)"), ("lr", "learning rate")):
        panels[key].set(title=title, xlabel="step")
        panels[key].legend()
    figure.savefig(path, dpi=120)


def group(rows):
    """Rows by direction: {(src, tgt): rows}."""
    by_direction = {}
    for row in rows:
        by_direction.setdefault((row["src_lang"], row["tgt_lang"]), []).append(row)
    return by_direction


def against(folder, other, samples):
    """Markdown: paired bootstrap of two finished evaluations, a line a direction (scores.paired_bootstrap). Raises
    UserError if they have no direction in common or translated other sentences."""
    ours, theirs = (group(read_jsonl(Path(side) / "hypotheses.jsonl", need=("tgt",), text=("hyp",))) for side in (folder, other))
    shared = [pair for pair in ours if pair in theirs]
    if not shared:
        raise UserError(f"--against {other}: no direction in common with {folder}")
    lines, better = [], {"bleu": [0, 0], "chrf": [0, 0]}
    for pair in tqdm(shared, desc="resampling", disable=None):
        found = paired_bootstrap(ours[pair], theirs[pair], pair[1], samples)
        line = ["-".join(pair)]
        for key, r in found.items():
            tie = r["ours"] == r["theirs"]  # of no difference at all sacrebleu's p is its least
            line += [f"{r[side]:.2f} ± {r[f'{side}_ci']:.2f}" for side in ("ours", "theirs")] + ["-" if tie else f"{r['p']:.3f}"]
            if r["p"] < 0.05 and not tie:
                better[key][r["ours"] < r["theirs"]] += 1
        lines.append(line)
    names = [Path(folder).name, Path(other).name]
    header = ["direction", *(f"{NAMES[key]} {what}" for key in better for what in (*names, "p"))]
    summary = "".join(f"{NAMES[key]}: {names[0]} better in {a}, {names[1]} better in {b} of {len(lines)} directions (p < 0.05)  \n"
                      for key, (a, b) in better.items())
    return markdown(header, lines) + f"\n{summary}± is half of the 95 % interval; paired bootstrap by sacrebleu, {samples} samples.\n"


def report_table(report, rules):
    """Generated, kept and dropped by rule, a line a direction. A pair whose English was dropped counts as "en: rule"."""
    keys = ["generated", "kept", *(f"en: {rule}" for rule in rules[:-1]), *rules]
    keys = [k for k in keys if k in ("generated", "kept") or any(r.get(k) for r in report.values())]
    return markdown(["direction", *keys, "ended because"], [[d, *(str(r.get(k, 0)) for k in keys), r["ended"]] for d, r in report.items()])
