"""Ctrl-C while Python is still importing torch, a second or two: one line instead of a traceback.
The scripts import this before all else; afterwards support.runs.run_main has its own line."""

import os
import sys
from types import TracebackType


def end_in_one_line(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print("stopped before it began", file=sys.stderr, flush=True)
    os._exit(130)  # 128 + SIGINT


def over() -> None:
    """Python's own way with errors again."""
    if sys.excepthook is end_in_one_line:
        sys.excepthook = sys.__excepthook__


if "torch" not in sys.modules:
    sys.excepthook = end_in_one_line
