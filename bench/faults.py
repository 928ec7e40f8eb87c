"""Disturb the pipeline anywhere and compare what comes out of it.

    python bench/faults.py [--faults 60] [--seed 0] [--out bench/results/faults.json]

The toy pipeline runs once undisturbed. Then, again and again, a stage starts from what the stages
before it had left, and meets a fault:

- kill -9 at a random moment, of the launcher, one rank or all of them
- kill -9 while a checkpoint is being written
- SIGTERM, as schedulers send it, to the launcher
- a full disk: a small tmpfs, where this user may mount one; and a disk that becomes read-only

Then the same command is given again. All files must be those of the undisturbed run, and no
temporary file may be left. Prints a table and writes the JSON; half a minute or so per fault.
"""

import contextlib
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

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from support.report import markdown
from support.runs import ArgumentParser, UserError, progress, read_json, run_main
from support.weights import digest_of

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
    "report": (False, "support/report.py --curves runs/curves.png"),
    "one process": (False, f"train.py --stage 1 --out runs/alone {TRAIN}"),
}
KILLS = ("launcher", "one rank", "all")
FAULTS = {  # name: stages that can meet it
    "kill": tuple(STAGES),
    "kill in a checkpoint": ("stage 1", "stage 2", "one process"),
    "SIGTERM": ("stage 1", "stage 2", "one process"),
    # In one process, whose exit status and last line are its own.
    "full disk": ("data", "pivot", "evaluation", "report", "one process"),
    "read-only": ("data", "pivot", "evaluation", "report", "one process"),
}
# What says when and how fast, and so is never the same twice.
CLOCKED = ("seconds", "tokens_per_s")


def command_of(stage: str, alone: bool) -> list[str]:
    """A stage's command line. alone: without torchrun."""
    parallel, line = STAGES[stage]
    parallel = parallel and not alone
    script, *flags = line.split()
    return [sys.executable, *(TORCHRUN if parallel else ()), str(ROOT / script), *flags]


def start(stage: str, folder: Path, alone: bool = False) -> subprocess.Popen:
    """A stage in `folder`, in a session of its own, so that nothing of it is missed."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    log = open(folder / "log.txt", "ab")  # noqa: SIM115 - the process has it
    settings = {"cwd": folder, "env": env, "stdout": log, "stderr": log}
    return subprocess.Popen(command_of(stage, alone), start_new_session=True, **settings)


def finish(stage: str, folder: Path) -> float:
    """Run a stage to its end; its seconds. Raises UserError where it fails."""
    begin = time.monotonic()
    if start(stage, folder).wait(timeout=600):
        last = (folder / "log.txt").read_text(errors="replace").splitlines()[-20:]
        print("\n".join(last), file=sys.stderr)
        raise UserError(f"{folder}/log.txt: {stage} failed, see above")
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


def kill(process: subprocess.Popen, rng: random.Random) -> dict:
    """Kill -9 somebody, and whatever is left of the session a moment later, as a machine that goes
    down would."""
    victim, alive = rng.choice(KILLS), members(process.pid) or [process.pid]
    chosen = {"launcher": alive[:1], "all": alive, "one rank": alive[1:]}[victim] or alive
    if victim == "one rank":
        chosen = [rng.choice(chosen)]
    for pid in chosen:
        signal_if_there(pid)
    time.sleep(rng.uniform(0, 2))
    for pid in members(process.pid):
        signal_if_there(pid)
    process.wait()
    return {"victim": victim, "hit": len(chosen)}


def signal_if_there(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def values_of(path: Path) -> bytes:
    """What a checkpoint.pt holds: as a zip file it has dates."""
    state = torch.load(path, weights_only=True)
    tensors = dict(state["adapter"])
    for number, moments in state["optimizer"]["state"].items():
        for name, tensor in moments.items():
            tensors[f"{number} {name}"] = tensor
    rest = [state["step"], state["optimizer"]["param_groups"]]
    return f"{rest} {digest_of(tensors)}".encode()


def contents(folder: Path) -> dict[str, str]:
    """{file: hash of what must be the same}, of all files of the pipeline."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or name.startswith(("corpora", "backbone", "log.txt")):
            continue
        data = values_of(path) if path.name == "checkpoint.pt" else path.read_bytes()
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


# --- the faults -----------------------------------------------------------------------------------


class Trial:
    """One stage that is disturbed once."""

    def __init__(self, stage: str, folder: Path, seconds: float, grows: int, rng: random.Random):
        """seconds, grows: what the stage takes, and the bytes it writes, undisturbed."""
        self.stage, self.folder, self.rng = stage, folder, rng
        self.seconds, self.grows = seconds, grows

    def kill(self) -> dict:
        moment = self.rng.uniform(0, self.seconds)
        process = start(self.stage, self.folder)
        time.sleep(moment)
        if process.poll() is not None:
            return {"moment": moment, "hit": 0}
        return {"moment": moment, **kill(process, self.rng)}

    def kill_in_a_checkpoint(self) -> dict:
        """All at once, as soon as a checkpoint is half there."""
        process, number = start(self.stage, self.folder), self.rng.randint(1, 6)
        seen, there = 0, False
        while process.poll() is None:
            was, there = there, any(self.folder.glob("runs/*/checkpoint.pt.tmp"))
            seen += there and not was
            if seen == number:
                break
        alive = members(process.pid)
        for pid in alive:
            signal_if_there(pid)
        process.wait()
        half = [str(path.name) for path in self.folder.glob("runs/*/checkpoint.pt.tmp")]
        return {"checkpoint": number, "hit": len(alive), "half there": half}

    def sigterm(self) -> dict:
        moment = self.rng.uniform(0, self.seconds)
        process = start(self.stage, self.folder)
        time.sleep(moment)
        process.terminate()
        begin = time.monotonic()
        code = process.wait(timeout=60)
        took = time.monotonic() - begin
        found = {"moment": moment, "hit": int(code != 0), "status": code, "took": round(took, 2)}
        # Before Python listens the signal ends it; torchrun has a status of its own.
        wrong = took > 30 or (not STAGES[self.stage][0] and code not in (0, 143, -15))
        return {**found, "wrong": f"status {code} after {took:.0f} s"} if wrong else found

    def full_disk(self) -> dict:
        room = int(self.rng.uniform(0.02, 0.98) * self.grows)
        with self.disk(f"size={room_of(self.written) + room}") as mounted:
            return self.refused("No space left on device") if mounted else {"hit": 0}

    def read_only(self) -> dict:
        moment = self.rng.uniform(0, self.seconds)
        with self.disk("size=1g") as mounted:
            if not mounted:
                return {"hit": 0}
            process = start(self.stage, self.folder, alone=True)
            time.sleep(moment)
            for pid in members(process.pid):  # no disk can change with files open for writing
                signal_if_there(pid)
            if process.wait() == 0 or not mount("-o", "remount,ro", self.written):
                return {"hit": 0}
            found = {"moment": moment, **self.refused("Read-only file system")}
            mount("-o", "remount,rw", self.written)
            return found

    @property
    def written(self) -> Path:
        """The folder that the stage writes into."""
        return self.folder / ("data" if self.stage == "data" else "runs")

    @contextlib.contextmanager
    def disk(self, options: str):
        """A small disk of its own for `written`, whose files are back on the large one behind it.
        Yields whether it could be mounted."""
        self.written.mkdir(exist_ok=True)
        before = shutil.copytree(self.written, self.folder.with_name("aside"), dirs_exist_ok=True)
        mounted = mount("-t", "tmpfs", "-o", options, "tmpfs", self.written)
        try:
            if mounted:
                shutil.copytree(before, self.written, dirs_exist_ok=True)
            yield mounted
        finally:
            shutil.rmtree(before)
            if mounted:
                after = shutil.copytree(self.written, self.folder.with_name("aside"))
                subprocess.run(["umount", self.written], check=True)
                shutil.copytree(after, self.written, dirs_exist_ok=True)
                shutil.rmtree(after)

    def refused(self, reason: str) -> dict:
        """Run the stage to its end; where it fails, its last line must give the reason."""
        code = start(self.stage, self.folder, alone=True).wait(timeout=600)
        if code == 0:
            return {"hit": 0}
        log = (self.folder / "log.txt").read_text(errors="replace")
        said, wrong = log.splitlines()[-1], ""
        if code != 2 or reason not in said or "Traceback" in log:
            wrong = f"status {code}: {said}"
        left = [str(path) for path in self.written.rglob("*.tmp")]
        found = {"hit": 1, "said": said.replace(str(self.folder), "."), "left": left}
        return {**found, "wrong": wrong or f"left {left}"} if wrong or left else found


def mount(*flags) -> bool:
    """Whether mount(8) did it."""
    return subprocess.run(["mount", *map(str, flags)], capture_output=True).returncode == 0


def room_of(folder: Path) -> int:
    """Bytes of a folder's files in whole pages, and their entries'."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return sum(-(-size // 4096) * 4096 for size in sizes) + 4096


def plan(number: int, chosen: list[str], rng: random.Random) -> list[tuple[str, str]]:
    """(stage, fault) of each trial: two thirds are kills, all stages in turn."""
    others = [(stage, fault) for fault, stages in FAULTS.items() for stage in stages]
    others = [(stage, fault) for stage, fault in others if fault != "kill" and stage in chosen]
    rng.shuffle(others)
    trials = []
    for i in range(number):
        if i % 3 == 2 and others:
            trials.append(others[i // 3 % len(others)])
        else:
            trials.append((chosen[(i - i // 3) % len(chosen)], "kill"))
    return trials


# --- the command ----------------------------------------------------------------------------------


def parse_args():
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    work = str(Path(tempfile.gettempdir()) / "crosslora-faults")
    add("--work", default=work, help="folder for the runs; an earlier one's is emptied first")
    add("--faults", type=int, default=90, help="two thirds of them kills at random moments")
    add("--seed", type=int, default=0, help="of stages' order, victims and moments")
    add("--stages", default=",".join(STAGES), help="comma-separated")
    add("--out", help="also write the JSON here")
    add("--show", help="print the table of such a JSON, and stop")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.show:
        print(table(read_json(args.show)["faults"]), end="")
        return
    work = Path(args.work)
    if work.exists() and not (work / "trial").is_dir():
        raise UserError(f"--work {work}: not a folder of an earlier run, so it is not emptied")
    shutil.rmtree(work, ignore_errors=True)
    folder = work / "trial"  # where all stages run, since files name their folders
    folder.mkdir(parents=True)
    prepare(folder)
    before, expected, seconds, grows = {}, {}, {}, {}
    for number, stage in enumerate(STAGES):
        before[stage] = shutil.copytree(folder, work / f"{number}")
        seconds[stage] = finish(stage, folder)
        expected[stage] = contents(folder)
        grows[stage] = room_of(folder) - room_of(before[stage])
    rng, results = random.Random(args.seed), []
    trials = plan(args.faults, args.stages.split(","), rng)
    for number, (stage, fault) in enumerate(progress(trials, desc="faults")):
        shutil.rmtree(folder)
        shutil.copytree(before[stage], folder)
        trial = Trial(stage, folder, seconds[stage], grows[stage], rng)
        found = getattr(trial, fault.replace(" ", "_").replace("-", "_").lower())()
        finish(stage, folder)
        wrong = differences(folder, expected[stage])
        results.append({"stage": stage, "fault": fault, **found, "differences": wrong})
        if wrong or found.get("wrong"):
            print(json.dumps(results[-1]), flush=True)
            shutil.copytree(folder, work / f"wrong-{number}", dirs_exist_ok=True)
    print(table(results), end="")
    if args.out:
        whole = {"seed": args.seed, "seconds": seconds, "faults": results}
        Path(args.out).write_text(json.dumps(whole, indent=1) + "\n")


def was_hit(result: dict) -> bool:
    """Whether the fault came in time; of a kill in a checkpoint, whether it was half there."""
    return result["hit"] > 0 and result.get("half there") != []


def table(results: list[dict]) -> str:
    """A line per stage and fault."""
    lines = []
    for stage in STAGES:
        for fault in FAULTS:
            own = [r for r in results if (r["stage"], r["fault"]) == (stage, fault)]
            if own:
                hit = sum(was_hit(result) for result in own)
                wrong = sum(bool(r["differences"] or r.get("wrong")) for r in own)
                lines.append([f"{stage}: {fault}", str(len(own)), str(hit), str(wrong)])
    hit = sum(was_hit(result) for result in results)
    wrong = sum(bool(r["differences"] or r.get("wrong")) for r in results)
    lines.append(["**all**", str(len(results)), str(hit), str(wrong)])
    return markdown(["stage: fault", "trials", "in time", "differences"], lines)


if __name__ == "__main__":
    run_main(main)
