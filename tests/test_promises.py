"""What README, Makefile, pages and the form of the code promise."""

import ast
import contextlib
import io
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TORCHRUN, inside, read_rows, refuses, run

import train
from support.runs import read_json

SEVEN = ["model", "crosslora", "data", "train", "generate", "pivot", "evaluate"]
HAS_FAST = (ROOT / "fast").is_dir()
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{n}.md" for n in ("paper", "choices", "checks", "reliability")),
    *(f"docs/{n}.md" for n in ("results", "seeds", "real-text", "human-text")),
]
BELOW = {  # what each script may import beside support/
    "model": set(),
    "data": {"model"},
    "crosslora": {"model"},
    "generate": {"model", "crosslora", "data"},
    "train": {"model", "crosslora", "data"},
    "pivot": {"generate", "data"},
    "evaluate": {"generate", "data"},
}


def tree_of(path):
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def functions(path):
    """Every function and method of a file."""
    return [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.FunctionDef)]


def our_files():
    """Every Python file but the tests."""
    paths = list(ROOT.glob("*.py"))
    for folder in ("fast", "support", "bench", "examples"):
        paths += (ROOT / folder).rglob("*.py")
    return [path.relative_to(ROOT) for path in paths]


def imports_of(path):
    """Full names of the modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


# --- README and pages -----------------------------------------------------------------------------


def test_readme_names_the_functions_that_compute_the_equations():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (eqs?\. [^|]*)\|[^|]*\| `(\w+)` in `(\w+\.py)` \|$", readme, re.M)
    numbers = set()
    for equations, name, file in rows:
        source = (ROOT / file).read_text(encoding="utf-8")
        (node,) = [n for n in tree_of(file).body if getattr(n, "name", None) == name]
        text = ast.get_source_segment(source, node)
        if "M" in equations:
            assert re.search(r"^ +M = ", text, re.M), name
            continue
        said = " ".join(re.findall(r"[Ee]qs?\. [\d ,-]+(?:and \d+)?|eq\. \d", text))
        for number in re.findall(r"\d", equations):
            assert number in said, (equations, name, said)
            numbers.add(number)
    assert numbers == set("123456789")


def test_readme_is_short_and_its_links_lead_somewhere():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            target = (ROOT / page).parent / link
            if link != "fast":  # which may be absent
                assert target.exists(), (page, link)


def test_every_file_that_readme_lists_is_there():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = re.search(r"## The files\n\n```\n(.*?)```", readme, re.S)[1]
    for name in SEVEN:
        assert re.search(rf"^{name}\.py ", listed, re.M), name
    for path in (ROOT / "support").glob("*.*"):
        assert path.name == "__init__.py" or path.name in listed, path


def help_of(script):
    """What a script prints on --help."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [script, "--help"])
        patch.syspath_prepend((ROOT / script).parent)  # as Python does
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    assert stop.value.code == 0
    return printed.getvalue()


def commands_in(text):
    """(script, what follows it) of every command line in a page."""
    for variable, script in (("TRAIN", "train"), ("EVAL", "evaluate"), ("PIVOT", "pivot")):
        text = text.replace(f"${variable}", f"{script}.py")
    text = text.replace("\\\n", " ")
    return re.findall(r"((?:[\w/]+/)?\w+\.py)((?: +[^\n`|#()]*)?)", text)


def test_every_flag_in_a_command_is_one_that_its_script_takes():
    """In README, pages, Makefile and docstrings."""
    texts = [(ROOT / page).read_text(encoding="utf-8") for page in [*PAGES, "Makefile"]]
    if HAS_FAST:
        texts.append((ROOT / "bench/README.md").read_text(encoding="utf-8"))
    for path in our_files():
        texts.append(ast.get_docstring(tree_of(path)) or "")
    takes, seen = {}, 0
    for script, rest in commands_in("\n\n".join(texts)):
        flags = re.findall(r"(?<![\w-])(--[a-z][\w-]*)", rest)
        if not flags or not (ROOT / script).exists():
            continue
        if script.startswith("bench/") and not HAS_FAST:
            continue  # they measure it
        if script not in takes:
            takes[script] = set(re.findall(r"--[a-z][\w-]*", help_of(script)))
        for flag in flags:
            seen += 1
            assert flag in takes[script], (script, flag, rest)
    assert seen > 80 and len(takes) > 10


@pytest.mark.skipif(not HAS_FAST, reason="the benchmarks measure fast/")
def test_the_bench_page_shows_what_was_measured():
    page = (ROOT / "bench/README.md").read_text(encoding="utf-8")

    def printed(script):
        command = [sys.executable, ROOT / "bench" / script]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    tables = printed("tables.py")
    assert tables.count("|") > 50 and tables in page
    assert printed("projection.py").partition("\n")[2] in page
    hours = json.loads((ROOT / "bench/results/projection.json").read_text())["gpu_hours"]["all"]
    assert f"about {hours:.1f} GPU-hours" in page


def test_the_reliability_page_shows_what_was_measured_and_names_tests_that_are_there():
    page = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    there = set()
    for path in (ROOT / "tests").glob("test_*.py"):
        there.update(node.name for node in functions(path.relative_to(ROOT)))
    named = re.findall(r"`(test_\w+)`", page)
    assert len(named) > 12 and not set(named) - there
    for script in ("faults", "fuzz"):
        shown = inside(ROOT / f"bench/{script}.py", "--show", ROOT / f"bench/results/{script}.json")
        assert shown.count("|") > 50 and shown in page, script


@pytest.mark.parametrize("script", ["report", "export", "baselines"])
def test_commands_in_support_run_from_anywhere(script, tmp_path):
    done = run(ROOT / f"support/{script}.py", "--help", cwd=tmp_path)
    assert f"python support/{script}.py" in done.stdout


# --- the paper's values and the Makefile ----------------------------------------------------------


@pytest.mark.parametrize(("stage", "epochs"), [(1, 3), (2, 2)])
def test_defaults_are_the_papers(monkeypatch, stage, epochs):
    monkeypatch.setattr(sys, "argv", ["train.py", "--stage", str(stage)])
    args = train.parse_args()
    assert (args.rank, args.alpha, args.dropout, args.rdrop_alpha) == (16, 64, 0.1, 0.1)
    assert (args.lr, args.weight_decay, args.warmup_ratio) == (5e-4, 0.02, 5e-4)
    assert (args.batch_size, args.micro_batch_size, args.epochs) == (32, 4, epochs)
    assert args.max_length == 512 and args.adapter_type == "crosslora"


def plan_of(*goals):
    """The commands that make would run."""
    return subprocess.run(
        ["make", "-n", *goals], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")
def test_the_makefile_is_the_map_of_the_method():
    steps = r"(data\.py|train\.py --stage \d|pivot\.py|evaluate\.py --\S+|support/report\.py)"
    chain = ["data.py", "train.py --stage 1", "pivot.py", "train.py --stage 2"]
    chain += ["evaluate.py --all-directions"] * 3 + ["support/report.py"]
    assert re.findall(steps, plan_of("paper")) == chain
    for goals in (["tiny"], ["tiny", "PLAIN=1"]):
        plan = plan_of(*goals)
        assert re.findall(steps, plan) == chain
        assert plan.count("--plain") == (6 if len(goals) == 2 else 0)
    plan = plan_of("small")
    assert re.findall(steps, plan) == [*chain[:4], *2 * chain[3:4], *5 * chain[4:5], chain[-1]]
    assert plan.count("support/likelihood.py") == 5 and "SmolLM2-135M" in plan
    assert "SmolLM2" not in plan_of("small", "MODEL=some/other") + plan_of("paper")
    assert re.findall(r"examples/tiny/(\w+)", plan_of("compare")) == [
        "world",
        "pretrain",
        "compare",
    ]
    test = plan_of("test")
    assert test.count("pytest") == 2 and "fast" not in re.search(r"cp -r (.*) \.plain", test)[1]


# --- the form of the code -------------------------------------------------------------------------


def test_the_scripts_import_downwards_only():
    for name in SEVEN:
        imports = {module.partition(".")[0] for module in imports_of(f"{name}.py")}
        assert imports & set(SEVEN) <= BELOW[name], name
        assert "fast" not in imports  # support.runs.load_fast brings it, if it is there
    for path in our_files():
        imports = imports_of(path)
        if path.parts[0] == "fast":
            for module in imports:
                ours = module.split(".")[0] in {*SEVEN, "support"}
                allowed = ("model", "crosslora", "data", "support.runs")
                assert not ours or module.startswith(allowed), (path, module)
        if path.parts[0] not in ("bench",) and str(path) != "support/baselines.py":
            assert not imports & {"transformers", "peft"}, path


def test_the_seven_have_nothing_that_only_speed_needs():
    words = (
        r"torch\.ops|\baten\b|autograd\.Function|CUDAGraph|cuda\.graph|cpuinfo|mkldnn|mkl|packed"
    )
    for name in SEVEN:
        found = re.findall(words, (ROOT / f"{name}.py").read_text(encoding="utf-8"))
        assert not found, (name, found)


def test_the_seven_are_plain():
    """No nested comprehension, no bound lambda, no closure that rebinds an outer name."""
    comprehensions = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    for name in SEVEN:
        for node in ast.walk(tree_of(f"{name}.py")):
            where = name, getattr(node, "lineno", 0)
            if isinstance(node, comprehensions):
                inner = [n for n in ast.walk(node) if isinstance(n, comprehensions)]
                assert len(inner) == 1, where
            assert not isinstance(node, ast.Nonlocal | ast.Global), where
            if isinstance(node, ast.Assign):
                assert not isinstance(node.value, ast.Lambda), where


def test_functions_are_short_and_typed():
    for path in our_files():
        for node in functions(path):
            where = path, node.name
            assert node.end_lineno - node.lineno < 60, where
            if path.parts[0] in ("fast", "bench", "examples"):
                continue
            of_itself = ("self", "cls")
            untyped = [a.arg for a in node.args.args if not a.annotation and a.arg not in of_itself]
            assert not untyped, (where, untyped)
            assert node.returns is not None or node.name == "__init__", where


def test_nothing_runs_what_it_reads():
    """No pickle but our own checkpoint, no code from a hub."""
    for path in our_files():
        text = (ROOT / path).read_text(encoding="utf-8")
        assert "trust_remote_code" not in text and "import pickle" not in text, path
        for call in re.findall(r"torch\.load\(([^\n]*)", text):
            assert "weights_only=True" in call, (path, call)


def test_the_defaults_chain(tmp_path, monkeypatch):
    """The commands of the README, one after another in a folder of their own, with no flags but
    those that make the world small; before its turn each says which command it waits for."""
    monkeypatch.chdir(tmp_path)
    small = ["--train", "90", "--dev", "4", "--test", "3"]
    inside(ROOT / "examples/tiny/world.py", "--out", "corpora", *small)
    small = "--hidden-size 32 --layers 2 --steps 300 --phrase-steps 100 --lines 16 --lr 1e-2"
    where = "--world", "corpora", "--out", "backbone"
    run(ROOT / "examples/tiny/pretrain.py", *where, *small.split(), cwd=tmp_path)
    small = "--model backbone --max-steps 40 --epochs 20 --lr 1e-2 --micro-batch-size 16"
    train, decode = (ROOT / "train.py", *small.split()), ("--max-new-tokens", 24)
    chain = [
        (ROOT / "data.py", "--source", "publisher", "--train-pairs", 30),
        (*train, "--stage", 1),
        (ROOT / "pivot.py", *decode, "--pairs", 5, "--max-ratio", 9),
        (*train, "--stage", 2),
        (ROOT / "evaluate.py", "--all-directions", *decode),
        (ROOT / "support/report.py",),
    ]
    waits_for = [
        "",
        "data: no manifest.json in it; --data takes a folder that data.py has finished, "
        "`python data.py --source publisher` makes it",
        "`train.py --stage 1` makes runs/stage1/adapter",
        "`torchrun --nproc_per_node=2 pivot.py` makes runs/pseudo",
        "",  # Stage 1's adapter will do
        "`python evaluate.py --all-directions` makes one",
    ]
    for i, command in enumerate(chain):
        if waits_for[i + 1 :] and waits_for[i + 1]:
            refuses(*chain[i + 1], says=waits_for[i + 1])  # too early
        parallel = command[0].name in ("train.py", "pivot.py")
        done = run(*(TORCHRUN if parallel else ()), *command, cwd=tmp_path)
    assert read_rows("runs/pseudo/pseudo.train.jsonl"), Path("runs/pseudo/report.md").read_text()
    scores = read_json("runs/scores/stage2/scores.json")
    assert len(scores["directions"]) == 30 and done.stdout.splitlines()[2].startswith("| stage2 |")
    one = run(ROOT / "generate.py", "--src", "de", "--tgt", "is", "Guten Morgen.", cwd=tmp_path)
    assert one.stdout.strip() and not list(tmp_path.rglob("*.tmp"))
