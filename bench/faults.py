"""Kill the pipeline anywhere and compare what comes out of it.

    python bench/faults.py [--kills 50] [--seed 0] [--out bench/results/faults.json]

The toy pipeline runs once undisturbed. Then, again and again, a stage starts from what the stages
before it had left, is killed with `kill -9` at a random moment (the launcher, one
rank, or all of them), and the same command is given again. Its files must be those of the
undisturbed run, byte for byte, and no temporary file may be left. Prints a table and writes the
JSON; takes about half a minute per kill.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from support.report import markdown
from support.runs import ArgumentParser, UserError, progress, run_main

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
TRAIN = "--model backbone --max-steps 40 --epochs 20 --lr 1e-2 --micro-batch-size 16 "
TRAIN += "--save-every 5 --log-every 5"
DECODE = "--max-new-tokens 24"
STAGES = {  # name: (whether under torchrun, command)
    "data": (False, "data.py --train-pairs 30"),
    "stage 1": (True, f"train.py --stage 1 {TRAIN}"),
    "pivot": (True, f"pivot.py --pairs 5 --max-ratio 9 {DECODE}"),
    "stage 2": (True, f"train.py --stage 2 {TRAIN}"),
    "evaluation": (True, f"evaluate.py --all-directions {DECODE}"),
    "one process": (False, f"train.py --stage 1 --out runs/alone {TRAIN}"),
}
# What says when and how fast, and so is never the same twice.
CLOCKED = ("seconds", "tokens_per_s")
VICTIMS = ("launcher", "one rank", "all")


def command_of(stage: str) -> list[str]:
    """A stage's command line."""
    parallel, line = STAGES[stage]
    script, *flags = line.split()
    return [sys.executable, *(TORCHRUN if parallel else ()), str(ROOT / script), *flags]


def start(stage: str, folder: Path) -> subprocess.Popen:
    """A stage in `folder`, in a session of its own, so that nothing of it is missed."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    log = open(folder / "log.txt", "ab")  # noqa: SIM115 - the process has it
    settings = {"cwd": folder, "env": env, "stdout": log, "stderr": log}
    return subprocess.Popen(command_of(stage), start_new_session=True, **settings)


def finish(stage: str, folder: Path) -> float:
    """Run a stage to its end; its seconds. Raises UserError where it fails."""
    begin = time.monotonic()
    if start(stage, folder).wait(timeout=600):
        last = (folder / "log.txt").read_text(errors="replace").splitlines()[-20:]
        raise UserError(f"{folder}/log.txt: {stage} failed:\n" + "\n".join(last))
    return time.monotonic() - begin


def members(session: int) -> list[int]:
    """Processes of a session, its leader first."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(entry.name))
    return sorted(found, key=lambda pid: pid != session)


def kill(process: subprocess.Popen, victim: str, rng: random.Random) -> int:
    """Kill -9 `victim`, and whatever is left of the session a moment later, as a machine that goes
    down would. Returns how many processes the first blow hit."""
    alive = members(process.pid)
    chosen = {"launcher": alive[:1], "all": alive, "one rank": alive[1:]}[victim] or alive
    if victim == "one rank":
        chosen = [rng.choice(chosen)]
    for pid in chosen:
        signal_if_there(pid)
    time.sleep(rng.uniform(0, 2))
    for pid in members(process.pid):
        signal_if_there(pid)
    process.wait()
    return len(chosen)


def signal_if_there(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def contents(folder: Path) -> dict[str, str]:
    """{file: hash of what must be the same}, of all files of the pipeline."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or name.startswith(("corpora", "backbone", "log.txt")):
            continue
        if path.name in (".lock", "checkpoint.pt") or path.suffix == ".png":
            found[name] = ""  # its being there; checkpoint.pt is a zip file with dates
            continue
        data = path.read_bytes()
        if path.name == "metrics.jsonl":
            rows = [json.loads(line) for line in data.splitlines()]
            kept = [{k: v for k, v in row.items() if k not in CLOCKED} for row in rows]
            data = json.dumps(kept).encode()
        found[name] = hashlib.sha256(data).hexdigest()
    return found


def differences(folder: Path, expected: dict[str, str]) -> list[str]:
    """Files that a disturbed stage has and the undisturbed one has not, or otherwise."""
    found = contents(folder)
    names = found.keys() | expected.keys()
    return sorted(name for name in names if found.get(name) != expected.get(name))


def prepare(work: Path) -> None:
    """The toy world and a small backbone."""
    small = "--train 90 --dev 4 --test 3"
    world = [sys.executable, ROOT / "examples/tiny/world.py", "--out", "corpora", *small.split()]
    subprocess.run(world, cwd=work, check=True, stdout=subprocess.DEVNULL)
    small = "--hidden-size 32 --layers 2 --steps 300 --phrase-steps 100 --lines 16 --lr 1e-2"
    where = [sys.executable, ROOT / "examples/tiny/pretrain.py", "--world", "corpora"]
    where += ["--out", "backbone", *small.split()]
    subprocess.run(where, cwd=work, check=True, stdout=subprocess.DEVNULL)


def parse_args():
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    work = str(Path(tempfile.gettempdir()) / "crosslora-faults")
    add("--work", default=work, help="folder for the runs; an earlier one's is emptied first")
    add("--kills", type=int, default=50)
    add("--seed", type=int, default=0, help="of stages' order, victims and moments")
    add("--stages", default=",".join(STAGES), help="comma-separated")
    add("--out", help="also write the JSON here")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    work = Path(args.work)
    if work.exists() and not (work / "trial").is_dir():
        raise UserError(f"--work {work}: not a folder of an earlier run, so it is not emptied")
    shutil.rmtree(work, ignore_errors=True)
    trial = work / "trial"  # where all stages run, since files name their folders
    trial.mkdir(parents=True)
    prepare(trial)
    before, expected, seconds = {}, {}, {}
    for number, stage in enumerate(STAGES):
        before[stage] = shutil.copytree(trial, work / f"{number}")
        seconds[stage] = finish(stage, trial)
        expected[stage] = contents(trial)
    rng, results = random.Random(args.seed), []
    stages = args.stages.split(",")
    for number in progress(range(args.kills), desc="kills"):
        stage, victim = stages[number % len(stages)], rng.choice(VICTIMS)
        moment = rng.uniform(0, seconds[stage])
        shutil.rmtree(trial, ignore_errors=True)
        shutil.copytree(before[stage], trial)
        process = start(stage, trial)
        time.sleep(moment)
        hit = kill(process, victim, rng) if process.poll() is None else 0
        finish(stage, trial)
        wrong = differences(trial, expected[stage])
        results.append({"stage": stage, "victim": victim, "moment": round(moment, 2), "hit": hit})
        results[-1]["differences"] = wrong
        if wrong:
            print(json.dumps(results[-1]), flush=True)
            shutil.copytree(trial, work / f"wrong-{number}", dirs_exist_ok=True)
    report(args, results, seconds)


def report(args, results: list[dict], seconds: dict[str, float]) -> None:
    """The table by stage, and the JSON."""
    lines = []
    for stage in seconds:
        own = [result for result in results if result["stage"] == stage]
        hit = sum(result["hit"] > 0 for result in own)
        wrong = sum(bool(result["differences"]) for result in own)
        lines.append([stage, f"{seconds[stage]:.0f}", str(len(own)), str(hit), str(wrong)])
    header = ["stage", "seconds undisturbed", "kills", "before its end", "differences"]
    print(markdown(header, lines), end="")
    if args.out:
        whole = {"seed": args.seed, "seconds": seconds, "kills": results}
        Path(args.out).write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
