"""The long run of tests/test_fuzz.py, and its table.

    python bench/fuzz.py [--cases 100] [--out bench/results/fuzz.json]

A case is read, or refused in one line that names file, line or flag, within a minute; anything else
(a traceback, a wrong value, a second line) fails the test, and this command with it. The cases are
the same every time.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from support.report import markdown
from support.runs import ArgumentParser, UserError, at_least, read_json, run_main


def table(counts: dict[str, list]) -> str:
    """A line per kind. counts: {kind: [refused, read, seconds of the longest]}."""
    lines = []
    for kind, (refused, read, longest) in counts.items():
        cells = [refused + read, refused, read, 0, longest]
        lines.append([kind.replace("_", " "), *map(str, cells)])
    cases = sum(refused + read for refused, read, _ in counts.values())
    lines.append(["**all**", str(cases), "", "", "0", ""])
    header = ["kind", "readings", "refused in one line", "read", "tracebacks", "longest, s"]
    return markdown(header, lines)


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--cases", type=int, default=100, help="per kind")
    parser.add_argument("--out", help="also write the JSON here")
    parser.add_argument("--show", help="print the table of such a JSON, and stop")
    args = parser.parse_args()
    if args.show:
        print(table(read_json(args.show)), end="")
        return
    at_least(1, args, "cases")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "counts.json"
        asked = {"CROSSLORA_FUZZ": str(args.cases), "CROSSLORA_FUZZ_COUNTS": str(file)}
        command = [sys.executable, "-m", "pytest", "-q", ROOT / "tests/test_fuzz.py"]
        if subprocess.run(command, cwd=ROOT, env={**os.environ, **asked}).returncode:
            raise UserError("tests/test_fuzz.py failed, see above")
        counts = read_json(file)
    print(table(counts), end="")
    if args.out:
        Path(args.out).write_text(json.dumps(counts, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
