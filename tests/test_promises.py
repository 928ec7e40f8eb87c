"""What README, Makefile and the size limits promise."""

import json
import re
import shutil
import subprocess
import sys

import pytest

import train
from conftest import ROOT

METHOD = ["model.py", "crosslora.py", "data.py", "train.py", "generate.py", "evaluate.py", "pivot.py"]
LOWER = {"files", "kernels", "attention", "devices", "corpora", "data", "model", "experts", "crosslora"}
BELOW = {  # what each script may import
    "files.py": set(), "kernels.py": set(), "attention.py": set(), "devices.py": {"files"}, "corpora.py": {"files"},
    "data.py": {"files", "corpora"}, "model.py": {"files", "kernels", "attention"}, "experts.py": {"kernels"},
    "crosslora.py": {"files", "experts"},
    "generate.py": LOWER, "baselines.py": LOWER | {"generate"}, "plan.py": LOWER, "scores.py": LOWER, "tables.py": LOWER | {"scores"},
    "train.py": LOWER | {"plan"}, "pivot.py": LOWER | {"generate", "baselines", "scores", "tables"},
    "evaluate.py": LOWER | {"generate", "baselines", "scores", "tables"},
}


def test_size_is_a_feature():
    lines = {name: len((ROOT / name).read_text().splitlines()) for name in METHOD}
    assert sum(lines.values()) < 2000, lines
    for path in ROOT.glob("*.py"):
        text = path.read_text().splitlines()
        assert len(text) <= 400 and max(map(len, text)) <= 140, path  # lines without end would make the first a game


def test_readme_points_at_the_lines_that_compute_the_equations():
    rows = re.findall(r"\| eqs?\. ([\d, -]+)[^|]*\|[^|]*\|([^|]*)\|", (ROOT / "README.md").read_text())
    found = [(numbers, *pointer) for numbers, where in rows for pointer in re.findall(r"`(\w+\.py):(\d+)`", where)]
    assert len(found) >= 12
    for numbers, name, line in found:
        text = (ROOT / name).read_text().splitlines()[int(line) - 1]
        assert re.search(rf"eqs?\. .*{numbers.strip()}\b", text), (numbers, name, line, text)


def test_readme_shows_what_was_measured():
    readme = (ROOT / "README.md").read_text()
    printed = lambda script: subprocess.run([sys.executable, ROOT / "bench" / script], capture_output=True, text=True, check=True).stdout
    assert printed("tables.py").count("|") > 50 and printed("tables.py") in readme
    assert printed("projection.py").partition("\n")[2] in readme
    assert f"about {json.loads((ROOT / 'bench/results/projection.json').read_text())['gpu_hours']['all']:.1f} GPU-hours" in readme


def test_defaults_are_the_papers(monkeypatch):
    for stage, epochs in ((1, 3), (2, 2)):
        monkeypatch.setattr(sys, "argv", ["train.py", "--stage", str(stage)])
        args = train.parse_args()
        assert (args.rank, args.alpha, args.dropout, args.rdrop_alpha) == (16, 64, 0.1, 0.1)
        assert (args.lr, args.weight_decay, args.warmup_ratio, args.max_length) == (5e-4, 0.02, 5e-4, 512)
        assert (args.batch_size, args.micro_batch_size, args.epochs) == (32, 4, epochs)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")
def test_the_makefile_is_the_map_of_the_method():
    compare = subprocess.run(["make", "-n", "compare"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"examples/tiny/(\w+)", compare) == ["world", "pretrain", "compare"]
    plan = subprocess.run(["make", "-n", "paper"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    steps = re.findall(r"(data\.py|train\.py --stage \d|pivot\.py|evaluate\.py --\S+)", plan)
    assert steps == ["data.py", "train.py --stage 1", "pivot.py", "train.py --stage 2",
                     *["evaluate.py --all-directions"] * 3, "evaluate.py --table"]


def test_every_flag_in_the_readme_exists():
    """Each --flag of a command line in README, Makefile or a script's own docstring is one that its script takes."""
    scripts = [*ROOT.glob("*.py"), *ROOT.glob("examples/tiny/*.py"), *ROOT.glob("bench/*.py")]
    takes = {path.name: set(re.findall(r'add_argument\("(--[\w-]+)"', path.read_text())) for path in scripts}
    shared = takes["generate.py"] - {"--src", "--tgt", "--input", "--output"}
    for name in ("train.py", "pivot.py", "evaluate.py", "baselines.py"):
        takes[name] |= shared | {"--system"} if name != "train.py" else {"--device", "--dtype"}
    for name in ("train_speed.py", "generate_speed.py", "cost.py"):
        takes[name] |= takes["common.py"]
    readme = (ROOT / "README.md").read_text()
    for variable, script in (("$TRAIN", "train.py"), ("$EVAL", "evaluate.py"), ("$PIVOT", "pivot.py")):
        readme = readme.replace(variable, script)
    texts = [readme, (ROOT / "Makefile").read_text(), *(path.read_text().split('"""')[1] for path in ROOT.glob("*.py"))]
    seen = 0
    for script, rest in re.findall(r"(\w+\.py)((?: +[^\n`|#()]*)?)", "\n".join(texts).replace("\\\n", " ")):
        for flag in re.findall(r"(?<![\w-])(--[a-z][\w-]*)", rest):
            if script in takes:
                seen += 1
                assert flag in takes[script], (script, flag, rest)
    assert seen > 80


def test_the_scripts_import_downwards_only():
    scripts = {path.stem for path in ROOT.glob("*.py")}
    for path in ROOT.glob("*.py"):
        imports = set(re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.M))
        assert imports & scripts <= BELOW[path.name], path
        assert path.name == "baselines.py" or not imports & {"transformers", "peft"}, path
