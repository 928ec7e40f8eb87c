"""docs/results.md from what compare.py measured (docs/data/compare.json).

    python examples/tiny/page.py

The part of the page between its two markers is written anew, what stands around it is kept.
"""

import itertools
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from world import PHRASE

from support.report import COLUMNS, PAPER, markdown, page_around
from support.runs import ArgumentParser, read_json, run_main, write_atomic

LLAMA = "LLaMA-3-8B-Instruct"
TABLES = {  # the paper's table -> (name here, name there), best first
    "table1": [
        ("CrossLoRA", f"{LLAMA} CrossLoRA Stage 2"),
        ("MoLoRA (Static)", f"{LLAMA} MoLoRA (Static)"),
        ("MoLoRA (Top-k)", f"{LLAMA} MoLoRA (Top-k)"),
        ("LoRA", f"{LLAMA} LoRA"),
    ],
    "table2": [
        ("CrossLoRA", "All + Reinitialized"),
        ("Pseudo-corpora + Stage 1", "Pseudo-corpora + Stage 1"),
        ("All + Stage 1", "All + Stage 1"),
    ],
    "table3": [
        ("CrossLoRA", "6 Experts"),
        ("3 Experts", "3 Experts"),
        ("1 Shared Source Expert", "1 Shared Source Expert"),
        ("1 Shared Target Expert", "1 Shared Target Expert"),
    ],
    "table6": [("CrossLoRA", "w/ R-Drop"), ("w/o R-Drop", "w/o R-Drop")],
}
# Student's, by degrees of freedom
T_975 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
MAKER, TITLE = "examples/tiny/compare.py", "A controlled comparison on the toy world"


def claims():
    """Every ordering within the paper's tables: [(first, second, table, first there, second there),
    ...], the first above the second there."""
    found = []
    for table, systems in TABLES.items():
        for (first, first_there), (second, second_there) in itertools.combinations(systems, 2):
            found.append((first, second, table, first_there, second_there))
    return found


def interval(values):
    """Half of Student's 95 % interval of the mean; None of one value."""
    if len(values) < 2:
        return None
    error = statistics.stdev(values) / len(values) ** 0.5
    return T_975.get(len(values) - 1, 2.26) * error


def mean_and_interval(values, digits=2):
    mean, half = f"{statistics.mean(values):.{digits}f}", interval(values)
    return mean if half is None else f"{mean} ± {half:.{digits}f}"


def results_table(systems):
    """systems: {name: {"parameters", "lr", "seeds": [{"averages": ...}, ...]}}."""
    header = ["system", "trained parameters", "learning rate"]
    header += [f"BLEU {column}" for column in COLUMNS.values()]
    header += ["chrF++ Average", "off-target % Average"]
    lines = []
    for name, system in systems.items():
        means = [seed["averages"] for seed in system["seeds"]]
        size = system.get("parameters")
        cells = [name, f"{size:,}" if size else "", system.get("lr", "")]
        for column in COLUMNS:
            cells.append(mean_and_interval([mean[column]["bleu"] for mean in means]))
        cells.append(mean_and_interval([mean["average"]["chrf"] for mean in means]))
        cells.append(mean_and_interval([mean["average"]["off_target"] for mean in means], 1))
        lines.append(cells)
    return markdown(header, lines)


def verdict_of(diffs):
    """Whether Student's 95 % interval of the mean leaves out zero, and on which side."""
    half, mean = interval(diffs), statistics.mean(diffs)
    if half is None or abs(mean) <= half:
        return "the seeds don't tell"
    return "agrees" if mean > 0 else "contradicts"


def claims_table(systems, paper, bootstrap):
    """The paper's orderings by average BLEU beside ours. A difference is paired by seed.
    bootstrap: {"first over second": [directions in which the first is better, worse]}."""
    lines = []
    for first, second, table, first_there, second_there in claims():
        if first not in systems or second not in systems:
            continue
        printed = [paper[table][name]["average"]["bleu"] for name in (first_there, second_there)]
        diffs = []
        for a, b in zip(systems[first]["seeds"], systems[second]["seeds"]):
            diffs.append(a["averages"]["average"]["bleu"] - b["averages"]["average"]["bleu"])
        claim = f"{first} over {second}"
        theirs = f"{printed[0] - printed[1]:+.2f}"
        within = "{} / {}".format(*bootstrap.get(claim, ("-", "-")))
        where = table.replace("table", "Table ")
        cells = [f"{claim} ({where})", theirs, mean_and_interval(diffs), verdict_of(diffs)]
        lines.append([*cells, within])
    header = ["claim", "paper", "here", "verdict", "directions better / worse, one seed"]
    return markdown(header, lines)


def interference_table(systems):
    """What the directions of one expert do to each other."""
    lines = []
    for name, system in systems.items():
        found = system.get("interference")
        if found and found[0]["pairs"]:
            cosine = mean_and_interval([seed["cosine"] for seed in found], 3)
            opposed = mean_and_interval([seed["opposed"] for seed in found], 1)
            lines.append([name, cosine, opposed, f"{found[0]['pairs']:,}"])
    return markdown(["system", "gradient cosine", "opposed %", "pairs of directions"], lines)


def targets_table(systems, key, title):
    """A score by target language, mean over its five sources and the seeds."""
    lines = []
    for name, system in systems.items():
        cells = [name]
        for lang in PHRASE:
            values = [seed["targets"][lang][key] for seed in system["seeds"]]
            cells.append(f"{statistics.mean(values):.1f}")
        lines.append(cells)
    return markdown(["system", *(f"{title} into {lang}" for lang in PHRASE)], lines)


def matched(systems, stage_1_steps):
    """Which systems have CrossLoRA's steps, and which its parameters."""
    ours, others, parameters = systems["CrossLoRA"], [], []
    for name, system in systems.items():
        if "steps" not in system or name == "CrossLoRA":
            continue
        if system["steps"] != ours["steps"]:
            others.append(f"{name} ({system['steps']})")
        if system["parameters"] != ours["parameters"]:
            parameters.append(f"{name} ({system['parameters'] / ours['parameters']:.2f} times)")
    return (
        f"Step-matched: Stage 2 takes {ours['steps']} steps in all systems but "
        f"{', '.join(others)}; the two called + Stage 1 have Stage 1's {stage_1_steps} steps "
        f"before that. Parameter-matched to CrossLoRA: all but {', '.join(parameters)}."
    )


def page_of(data):
    """The page's generated part. data: what docs/data/compare.json holds."""
    systems, first = data["systems"], data["seeds"][0]
    return (
        f"Seeds {', '.join(map(str, data['seeds']))} of the adapters, on one world, one backbone "
        "and one test set: mean ± half of the 95 % interval over the seeds (Student's); another "
        "backbone is not in it. In each seed CrossLoRA's Stage 1 writes the pseudo-corpus of all "
        f"systems. Stage 2 is trained on {data['pairs']} pairs per direction with English, at most "
        "as many pseudo pairs (a tenth of them are its dev set), and what stands for FLORES-200, "
        "in batches of 32; Pseudo-corpora + Stage 1 on the pseudo pairs only. An expert has the "
        "paper's rank of 16, plain LoRA 96. "
        f"{matched(systems, data['stage_1_steps'])} Tested on "
        f"{data['test_pairs']} sentences per direction. The learning rate of Stage 2 is each "
        f"system's best of {', '.join(data['grid'])} by the NLL on its dev set, mostly pseudo "
        f"pairs, at seed {first}.\n\n"
        + results_table(systems)
        + "\nThe paper's orderings, average BLEU on Llama-3-8B there, on the toy world here; "
        "a verdict, on this one backbone, only where the 95 % interval of the mean over the seeds "
        "leaves out zero, each row by itself: of sixteen such verdicts one may well be chance. "
        f"Last column: paired bootstrap within seed {first}, directions of 30 with p < 0.05, BLEU; "
        "one or two come by chance.\n\n"
        + claims_table(systems, read_json(PAPER), data["bootstrap"])
        + "\nWhat the directions that share an expert do to each other, at the end of training "
        "(`interference.py`): the mean cosine between two directions' gradients of one expert's "
        "matrix, and how many such pairs point apart. No sentence is in two directions.\n\n"
        + interference_table(systems)
        + "\nBy target language, mean over sources and seeds:\n\n"
        + targets_table(systems, "off_target", "off-target %")
        + "\n"
        + targets_table(systems, "bleu", "BLEU")
    )


def main():
    parser = ArgumentParser("Write the page anew from what compare.py measured.")
    parser.add_argument("--data", default="docs/data/compare.json", help="compare.py's --data-out")
    parser.add_argument("--results", default="docs/results.md", help="Markdown file")
    args = parser.parse_args()
    before, behind = page_around(args.results, MAKER, TITLE)
    write_atomic(args.results, before + page_of(read_json(args.data)) + behind)


if __name__ == "__main__":
    run_main(main)
