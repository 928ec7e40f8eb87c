"""docs/results.md from what compare.py measured (docs/data/compare.json)."""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from world import PHRASE

from support.report import COLUMNS, PAPER, markdown
from support.runs import read_json

CLAIMS = [  # (the paper has the first above the second, table, their names there)
    (
        "MoLoRA (Top-k)",
        "LoRA",
        "table1",
        "LLaMA-3-8B-Instruct MoLoRA (Top-k)",
        "LLaMA-3-8B-Instruct LoRA",
    ),
    (
        "MoLoRA (Static)",
        "MoLoRA (Top-k)",
        "table1",
        "LLaMA-3-8B-Instruct MoLoRA (Static)",
        "LLaMA-3-8B-Instruct MoLoRA (Top-k)",
    ),
    (
        "CrossLoRA",
        "MoLoRA (Static)",
        "table1",
        "LLaMA-3-8B-Instruct CrossLoRA Stage 2",
        "LLaMA-3-8B-Instruct MoLoRA (Static)",
    ),
    (
        "CrossLoRA",
        "LoRA",
        "table1",
        "LLaMA-3-8B-Instruct CrossLoRA Stage 2",
        "LLaMA-3-8B-Instruct LoRA",
    ),
    ("CrossLoRA", "All + Stage 1", "table2", "All + Reinitialized", "All + Stage 1"),
    (
        "CrossLoRA",
        "Pseudo-corpora + Stage 1",
        "table2",
        "All + Reinitialized",
        "Pseudo-corpora + Stage 1",
    ),
    ("CrossLoRA", "3 Experts", "table3", "6 Experts", "3 Experts"),
    (
        "CrossLoRA",
        "1 Shared Source Expert",
        "table3",
        "6 Experts",
        "1 Shared Source Expert",
    ),
    ("3 Experts", "1 Shared Source Expert", "table3", "3 Experts", "1 Shared Source Expert"),
    (
        "1 Shared Source Expert",
        "1 Shared Target Expert",
        "table3",
        "1 Shared Source Expert",
        "1 Shared Target Expert",
    ),
    ("CrossLoRA", "w/o R-Drop", "table6", "w/ R-Drop", "w/o R-Drop"),
]
# Student's, by degrees of freedom
T_975 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
MAKER, TITLE = "examples/tiny/compare.py", "A controlled comparison on the toy world"


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
    for first, second, table, first_there, second_there in CLAIMS:
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
        if found and found["pairs"]:
            lines.append([name, f"{found['cosine']:.3f}", f"{found['opposed']:.1f}"])
    return markdown(["system", "gradient cosine", "opposed %"], lines)


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


def page_of(data):
    """The page's generated part. data: what docs/data/compare.json holds."""
    systems, lengths = data["systems"], []
    steps = {(s["steps"], "Pseudo" in name) for name, s in systems.items() if "steps" in s}
    for number, few in sorted(steps):
        lengths.append(f"{number} steps" + (" (pseudo pairs only)" if few else ""))
    seeds = ", ".join(map(str, data["seeds"]))
    first = data["seeds"][0]
    return (
        f"Seeds {seeds}: mean ± half of the 95 % interval over them (Student's). Each system is "
        f"trained on the same data: {data['pairs']} pairs per direction with English, at most as "
        "many pseudo pairs (a tenth of them are its dev set), and what stands for FLORES-200. All "
        f"take the same {' or '.join(lengths)} of 32: step-matched. An expert has the paper's rank "
        "of 16, plain LoRA 96, which gives it CrossLoRA's number of parameters; the others are not "
        f"parameter-matched. Tested on {data['test_pairs']} sentences per direction. The learning "
        f"rate of Stage 2 is each system's best of {', '.join(data['grid'])} by dev NLL at seed "
        f"{first}.\n\n"
        + results_table(systems)
        + "\nThe paper's orderings, average BLEU on Llama-3-8B there, on the toy world here; a "
        "verdict only where the 95 % interval of the mean over the seeds leaves out zero. Last "
        f"column: paired bootstrap within seed {first}, directions of 30 with p < 0.05, BLEU.\n\n"
        + claims_table(systems, read_json(PAPER), data["bootstrap"])
        + "\nWhat the directions that share an expert do to each other, at the end of training "
        f"(`interference.py`, seed {first}): the mean cosine between two directions' gradients of "
        "one expert's matrix, and how many such pairs point apart.\n\n"
        + interference_table(systems)
        + "\nBy target language, mean over sources and seeds:\n\n"
        + targets_table(systems, "off_target", "off-target %")
        + "\n"
        + targets_table(systems, "bleu", "BLEU")
    )
