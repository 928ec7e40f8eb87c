"""Every adapter that the paper compares, on the toy world: same data, same budget, several seeds
(Tables 1, 2, 3 and 6 in small).

    python examples/tiny/compare.py --world runs/tiny/world --backbone runs/tiny/backbone \\
        --out runs/compare --results docs/results.md --data-out docs/data/compare.json

A seed trains CrossLoRA's Stage 1 and writes one pseudo-corpus with it; every system then trains
Stage 2 on the same pairs for the same steps. Each run is the project's own commands; the same
command again goes on where it was stopped. The part of --results between its two markers is written
anew, what stands around it is kept.
"""

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from page import MAKER, TITLE, claims, page_of
from world import PHRASE

from support.report import (
    COLUMNS,
    better_and_worse,
    mean_scores,
    page_around,
    read_curves,
    read_hypotheses,
    read_scores,
)
from support.runs import (
    ArgumentParser,
    UserError,
    read_json,
    run_main,
    write_atomic,
    write_json,
)

SYSTEMS = {  # name -> flags of Stage 2
    "LoRA": ["--adapter-type", "lora"],
    "MoLoRA (Top-k)": ["--adapter-type", "molora-topk"],
    "MoLoRA (Static)": ["--adapter-type", "molora-static"],
    "1 Shared Source Expert": ["--adapter-type", "shared-source"],
    "1 Shared Target Expert": ["--adapter-type", "shared-target"],
    "3 Experts": ["--adapter-type", "groups"],
    "w/o R-Drop": ["--rdrop-alpha", "0"],
    "CrossLoRA": [],
    "Pseudo-corpora + Stage 1": ["--init-adapter", "{stage1}/adapter", "--stage-2-data", "pseudo"],
    "All + Stage 1": ["--init-adapter", "{stage1}/adapter"],
}
KEPT = ("bleu", "chrf", "off_target")
DECODE = ("--max-new-tokens", 48, "--batch-size", 128)


def short_name(system):
    """A system's name as a folder's."""
    return "".join(c if c.isalnum() else "-" for c in system.lower())


class Comparison:
    """The runs of all systems and seeds, by the project's commands."""

    def __init__(self, args):
        # Children run in ROOT.
        self.out, self.world = Path(args.out).resolve(), Path(args.world).resolve()
        self.backbone, self.data = Path(args.backbone).resolve(), self.out / "data"
        self.args, self.probe = args, self.out / "probe"
        (self.out / "logs").mkdir(parents=True, exist_ok=True)

    def run(self, log, script, *flags):
        """A command to its end, what it prints in a log."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        path = self.out / "logs" / f"{log}.log"
        command = [sys.executable, script, *map(str, flags)]
        with open(path, "w") as file:
            to_file = {"stdout": file, "stderr": subprocess.STDOUT}
            done = subprocess.run(command, cwd=ROOT, env=environment, **to_file)
        if done.returncode:
            raise UserError(f"{path}: its command ended with status {done.returncode}")

    def prepare_data(self):
        where = "--data", self.world, "--out", self.data, "--languages", ",".join(PHRASE)
        sizes = "--train-pairs", self.args.pairs, "--test-pairs", self.args.test_pairs
        self.run("data", "data.py", *where, *sizes, "--dev-pairs", 5)
        sizes = "--train", 1, "--dev", 1, "--test", 600  # 20 sentences for each direction alone
        self.run("probe", "examples/tiny/world.py", "--out", self.probe, "--seed", 1, *sizes)

    def train(self, log, stage, seed, out, lr, *flags):
        where = "--model", self.backbone, "--data", self.data, "--out", out
        settings = "--lr", lr, "--epochs", 1, "--micro-batch-size", 16, "--seed", seed
        self.run(log, "train.py", "--stage", stage, *where, *settings, *flags)

    def evaluate(self, log, out, *engine):
        test = "--all-directions", "--test", self.data / "test.jsonl", "--out", out
        self.run(f"{log}-eval", "evaluate.py", *test, *engine, *DECODE)

    def base(self):
        self.evaluate("base", self.out / "base", "--model", self.backbone)

    def stage_1(self, seed):
        """Stage 1 and the pseudo-corpus of a seed."""
        folder, log = self.out / f"seed{seed}", f"seed{seed}-stage1"
        adapter = "--adapter", folder / "stage1/adapter"
        self.train(log, 1, seed, folder / "stage1", self.args.lr)
        where = *adapter, "--data", self.data, "--out", folder / "pseudo"
        self.run(f"seed{seed}-pivot", "pivot.py", *where, "--pairs", self.args.pairs, *DECODE)
        self.evaluate(log, folder / "scores/stage1", *adapter)

    def of(self, job):
        """(the name of its logs, its run folder) of a (seed, system, lr)."""
        seed, system, lr = job
        run = self.out / f"seed{seed}" / f"{short_name(system)}-{lr}"
        return f"seed{seed}-{run.name}", run

    def stage_2(self, job):
        """Train Stage 2 of a (seed, system, lr). Returns its dev NLL."""
        (seed, system, lr), (log, run) = job, self.of(job)
        stage1, pseudo = run.parent / "stage1", run.parent / "pseudo"
        flags = [flag.format(stage1=stage1) for flag in SYSTEMS[system]]
        try:
            self.train(log, 2, seed, run, lr, "--pseudo", pseudo, *flags)
        except UserError as error:
            if not (run / "not_finite.jsonl").exists():
                raise
            print(f"{error}: it diverged", file=sys.stderr)
            return math.inf
        _, dev = read_curves(run)
        return dev[-1]["dev"]["nll"]

    def score(self, job):
        """Evaluate the run of a (seed, system, lr). Returns the evaluation's folder."""
        log, run = self.of(job)
        scores = run.parent / "scores" / run.name
        self.evaluate(log, scores, "--adapter", run / "adapter")
        return scores

    def interference(self, job):
        """What interference.py says of the run of a (seed, system, lr)."""
        log, run = self.of(job)
        where = "--adapter", run / "adapter", "--world", self.probe
        self.run(f"{log}-interference", "examples/tiny/interference.py", *where)
        log = self.out / "logs" / f"{log}-interference.log"
        return json.loads(log.read_text().splitlines()[-1])


def seed_of(scores):
    """What the page needs of an evaluation's folder."""
    found, targets = read_scores(scores), {}
    for lang in PHRASE:
        own = []
        for name, of_direction in found["directions"].items():
            if name.endswith(f"-{lang}"):
                own.append(of_direction)
        means = mean_scores(own)
        targets[lang] = {key: round(means[key], 2) for key in KEPT}
    averages = {}
    for column in COLUMNS:
        kept = {key: round(found["averages"][column][key], 3) for key in KEPT}
        averages[column] = kept
    return {"averages": averages, "targets": targets}


def parse_args():
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--world", required=True, help="folder that world.py wrote")
    add("--backbone", required=True, help="folder that pretrain.py wrote")
    add("--out", required=True, help="folder for all runs")
    add("--results", required=True, help="Markdown file to write the tables into")
    add("--systems", default=",".join(SYSTEMS), help="comma-separated")
    add("--seeds", default="0,1,2", help="comma-separated")
    add("--pairs", type=int, default=150, help="training pairs per direction, real and pseudo")
    add("--test-pairs", type=int, default=30, help="test sentences per direction")
    add("--jobs", type=int, default=os.cpu_count(), help="runs at a time, a thread each")
    add("--lr", default="5e-3", help="peak learning rate of Stage 1")
    grid = "learning rates of Stage 2: each system takes its best by dev NLL at the first seed"
    add("--grid", default="1.25e-3,2.5e-3,5e-3,1e-2", help=grid)
    add("--data-out", required=True, help="JSON file, what --results is made from")
    args = parser.parse_args()
    args.systems, seeds = args.systems.split(","), args.seeds.split(",")
    if args.jobs < 1 or not all(seed.isdecimal() for seed in seeds):
        raise UserError("--jobs must be at least 1, --seeds whole numbers such as 0,1,2")
    args.seeds, args.grid = [int(seed) for seed in seeds], args.grid.split(",")
    unknown = [name for name in args.systems if name not in SYSTEMS]
    if unknown:
        raise UserError(f"--systems: {unknown[0]!r} is none of {', '.join(SYSTEMS)}")
    return args


def all_of(pool, function, jobs, desc):
    """[function(job), ...], as many at a time as the pool has threads."""
    return list(tqdm(pool.map(function, jobs), total=len(jobs), desc=desc, disable=None))


def main():
    args = parse_args()
    path = Path(args.results)
    before, behind = page_around(path, MAKER, TITLE)
    comparison = Comparison(args)
    comparison.prepare_data()
    first = args.seeds[0]
    with ThreadPoolExecutor(args.jobs) as pool:
        base = pool.submit(comparison.base)
        all_of(pool, comparison.stage_1, args.seeds, "stage 1 and pivot")
        base.result()
        tries = [(first, system, lr) for system in args.systems for lr in args.grid]
        dev = dict(zip(tries, all_of(pool, comparison.stage_2, tries, "learning rates")))
        best = {}
        for system in args.systems:
            nlls = [dev[first, system, lr] for lr in args.grid]
            best[system] = args.grid[nlls.index(min(nlls))]
        jobs = [(seed, system, best[system]) for seed in args.seeds for system in args.systems]
        all_of(pool, comparison.stage_2, jobs, "stage 2")
        scores = dict(zip(jobs, all_of(pool, comparison.score, jobs, "scores")))
        pulls = dict(zip(jobs, all_of(pool, comparison.interference, jobs, "interference")))
    out = comparison.out
    stage_1 = [seed_of(out / f"seed{seed}/scores/stage1") for seed in args.seeds]
    systems = {"backbone alone": {"seeds": [seed_of(out / "base")]}}
    systems["CrossLoRA, Stage 1"] = {"seeds": stage_1, "lr": args.lr}
    for system in args.systems:
        lr, nlls = best[system], {}
        for tried in args.grid:
            nll = dev[first, system, tried]
            nlls[tried] = nll if math.isfinite(nll) else None  # it diverged
        summary = read_json(comparison.of((first, system, lr))[1] / "summary.json")
        systems[system] = {
            "lr": lr,
            "dev_nll": nlls,
            "parameters": summary["trainable_parameters"],
            "steps": summary["steps"],
            "seeds": [seed_of(scores[seed, system, lr]) for seed in args.seeds],
            "interference": [pulls[seed, system, lr] for seed in args.seeds],
        }
    data = {"seeds": args.seeds, "pairs": args.pairs, "test_pairs": args.test_pairs}
    stage_1_steps = read_json(out / f"seed{first}/stage1/summary.json")["steps"]
    data.update(grid=args.grid, stage_1_steps=stage_1_steps, systems=systems, bootstrap={})
    for a, b, *_ in claims():
        if a in best and b in best:
            folders = [scores[first, system, best[system]] for system in (a, b)]
            ours, theirs = map(read_hypotheses, folders)
            data["bootstrap"][f"{a} over {b}"] = better_and_worse(ours, theirs, 300)["bleu"]
    for file in (path, Path(args.data_out)):
        file.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.data_out, data)
    text = page_of(data)
    write_atomic(path, before + text + behind)
    print(f"{text}\n{path}")


if __name__ == "__main__":
    run_main(main)
