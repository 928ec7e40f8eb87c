"""Files of translations that a stopped run continues, on any number of processes."""

import glob
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from data import PIVOT, is_non_english
from support import runs
from support.runs import Ranks, UserError
from support.text import is_empty


class Translator(Protocol):
    """What translates: a generate.Engine, or a support.baselines.Baseline."""

    languages: list[str]
    identity: dict  # what a result depends on
    via_english: bool  # whether it takes two hops between others
    place: str  # device and precision, as in "cpu in float32"

    def translate_each(
        self, rows: list[dict], max_new_tokens: int, batch_size: int
    ) -> Iterator[tuple[int, str, str]]:
        """(index, translation, "stop" or "length") of rows, as they come."""
        ...


def decoding_order(rows: list[dict]) -> list[int]:
    """Indices of `rows`, longest source first, so that rows of a batch are of similar length and no
    long one is left to the end. Among sources of much the same length, direction by direction."""

    def key(i: int) -> tuple[int, str, str]:
        return -(len(rows[i]["src"]) // 16), rows[i]["src_lang"], rows[i]["tgt_lang"]

    return sorted(range(len(rows)), key=key)


def read_part(path: Path) -> tuple[dict[int, dict], int]:
    """Finished rows of a part file as {id: row}, and its length up to the last whole line, since a
    kill can cut the last."""
    whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
    rows = [json.loads(line) for line in whole.splitlines()]
    return {row["id"]: row for row in rows}, len(whole) + bool(whole)


def read_parts(parts: Iterable[Path]) -> dict[int, dict]:
    """Finished rows of several part files as {id: row}."""
    done = {}
    for part in parts:
        done.update(read_part(part)[0])
    return done


def job_of(engine: Translator, rows: list[dict], max_new_tokens: int) -> str:
    """8 hex digits of what translations depend on, for the names of files that hold parts."""
    job = json.dumps([rows, max_new_tokens, engine.identity])
    return hashlib.sha256(job.encode()).hexdigest()[:8]


def finished(out: Path, parts: list[Path], ranks: Ranks) -> list[dict]:
    """The rows of `out`, now that it is whole; rank 0 removes `parts`, also those that a killed run
    has left beside it."""
    ranks.barrier()
    if ranks.rank == 0:
        for part in parts:
            part.unlink(missing_ok=True)

    def read() -> list[dict]:
        return [json.loads(line) for line in out.read_text(encoding="utf-8").split("\n") if line]

    return ranks.broadcast_from_rank0(read)


def translate_jsonl(
    engine: Translator,
    rows: list[dict],
    out: str | Path,
    batch_size: int,
    max_new_tokens: int,
    ranks: Ranks,
    desc: str,
) -> list[dict]:
    """Translate `rows` into the JSONL file `out`, each row plus "hyp" and "finish", and return its
    rows.

    Rows are dealt to the ranks in turn. Finished ones are appended to `out`.part-JOB-RANK, so that
    a stopped run continues where it was, on any number of ranks; `out` appears when it is whole.
    """
    out = Path(out)
    stem = f"{out.name}.part-{job_of(engine, rows, max_new_tokens)}"  # other jobs' are not ours
    pattern = f"{glob.escape(stem)}-*"
    if not ranks.broadcast_from_rank0(out.exists):
        # By rank 0, before anybody writes: what is left is dealt to the ranks in the same way.
        done = ranks.broadcast_from_rank0(lambda: set(read_parts(out.parent.glob(pattern))))
        left = [i for i in decoding_order(rows) if i not in done][ranks.rank :: ranks.world]
        if ranks.rank == 0:
            so_far = f", {len(done)} of them done before" if done else ""
            start = f"{desc}: {len(rows)} sentences on {engine.place}{so_far}"
            print(start, file=sys.stderr, flush=True)
        part = out.with_name(f"{stem}-{ranks.rank}")
        with (
            runs.open_locked(part, out) as file,
            runs.progress(None, ranks.rank, total=len(left), desc=desc, unit="sent") as bar,
        ):
            file.truncate(read_part(part)[1])
            todo = [rows[i] for i in left]
            for n, hyp, finish in engine.translate_each(todo, max_new_tokens, batch_size):
                line = {"id": left[n], "hyp": hyp, "finish": finish}
                file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
                file.flush()
                bar.update()
        ranks.barrier()
        if ranks.rank == 0:
            join_parts(rows, out, read_parts(out.parent.glob(pattern)))
    return finished(out, list(out.parent.glob(pattern)), ranks)


def join_parts(rows: list[dict], out: Path, done: dict[int, dict]) -> None:
    """Write `out` from what all ranks have done."""
    if len(done) < len(rows):
        raise UserError(
            f"{out}: some parts of it are not visible on this machine yet; "
            "the same command continues from here"
        )
    whole = []
    for i, row in enumerate(rows):
        whole.append({**row, "hyp": done[i]["hyp"], "finish": done[i]["finish"]})
    runs.write_jsonl(out, whole)


def report_cut(done: list[dict], max_new_tokens: int) -> None:
    """Say on stderr which translations are not whole, and why."""
    cut = sum(row["finish"] == "length" for row in done)
    too_long = sum(row["finish"] == "length" and row["hyp"] == "" for row in done)
    of_all = f"of {len(done)}"
    if cut > too_long:
        why = f"were cut off at --max-new-tokens {max_new_tokens} or the model's last position"
        print(f"{cut - too_long} {of_all} outputs {why}", file=sys.stderr)
    if too_long:
        why = "alone fill the model's positions: they have no translation"
        print(f"{too_long} {of_all} sources {why}", file=sys.stderr)


def translate_via_english(
    engine: Translator,
    rows: list[dict],
    out: str | Path,
    batch_size: int,
    max_new_tokens: int,
    ranks: Ranks,
    desc: str,
) -> list[dict]:
    """As translate_jsonl, but in two hops, X -> English -> Y, where English is on neither side; the
    English in between is kept as `pivot`, and an output is cut off if either hop was. As ALMA is
    evaluated (section 4.3). A sentence with several targets is put into English once; one whose
    English is empty stays empty."""
    out, work = Path(out), (batch_size, max_new_tokens, ranks, desc)
    job = job_of(engine, rows, max_new_tokens)  # another job's hops are not ours
    hops = [out.with_name(f"{out.name}.{hop}-{job}") for hop in ("to-english", "from-english")]
    if not ranks.broadcast_from_rank0(out.exists):
        first = {source_of(row): {**row, "tgt_lang": PIVOT} for row in rows if takes_two_hops(row)}
        english = translate_jsonl(engine, list(first.values()), hops[0], *work)
        pivots = {source_of(row): row for row in english}
        starts = []  # of the second hop: the English, or the row itself
        for row in rows:
            if takes_two_hops(row):
                row = {**row, "src_lang": PIVOT, "src": pivots[source_of(row)]["hyp"]}
            starts.append(row)
        full = [row for row in starts if not is_empty(row["src"])]
        translated = translate_jsonl(engine, full, hops[1], *work)
        ranks.barrier()  # everybody has read the hops
        if ranks.rank == 0:
            runs.write_jsonl(out, join_hops(rows, pivots, starts, iter(translated)))
    return finished(out, hops, ranks)


def takes_two_hops(row: dict) -> bool:
    return is_non_english((row["src_lang"], row["tgt_lang"]))


def source_of(row: dict) -> tuple[str, str]:
    return row["src_lang"], row["src"]


def join_hops(
    rows: list[dict],
    pivots: dict[tuple[str, str], dict],
    starts: list[dict],
    translated: Iterator[dict],
) -> list[dict]:
    """`rows` with what came of both hops; `translated` lacks those whose start is empty."""
    result = []
    for row, start in zip(rows, starts):
        last = {"hyp": "", "finish": "stop"} if is_empty(start["src"]) else next(translated)
        whole = {**row, "hyp": last["hyp"], "finish": last["finish"]}
        if takes_two_hops(row):
            pivot = pivots[source_of(row)]
            whole["pivot"] = pivot["hyp"]
            if pivot["finish"] == "length":
                whole["finish"] = "length"
        result.append(whole)
    return result
