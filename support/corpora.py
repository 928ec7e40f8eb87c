"""OPUS-100 and FLORES-200 (section 4.1), fetched, read as their publishers ship them, and cleaned;
and the JSON lines that the scripts hand each other.

    corpora/opus-100-corpus/v1.0/supervised/de-en/opus.de-en-{train,dev,test}.{de,en}
    corpora/flores200_dataset/{dev,devtest}/deu_Latn.{dev,devtest}

Whatever the source, it is these line-aligned files that are read; sources.json beside them says
where they are from. Files that are there already are not fetched again, so sources can be mixed
and a stopped download goes on.
"""

import http.client
import json
import os
import re
import tarfile
import urllib.request
import zlib
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path

from support.runs import (
    UserError,
    file_sha256,
    hub_snapshot,
    lock_folder,
    progress,
    read_json,
    read_lines,
    replacing,
    write_atomic,
    write_json,
)
from support.text import comparable, is_empty

NOISE = ("duplicate", "identical", "length_ratio")  # of OPUS-100's training pairs, see clean()
OPUS, FLORES = "opus-100-corpus/v1.0/supervised", "flores200_dataset"
OPUS_URL = "https://object.pouta.csc.fi/OPUS-100/v1.0/opus-100-corpus-{pair}-v1.0.tar.gz"
FLORES_URL = "https://dl.fbaipublicfiles.com/nllb/flores200_dataset.tar.gz"
# bytes and SHA-256 of the publishers' archives; another pair's are not checked but recorded
ARCHIVES = {
    "cs-en": (39673827, "e870a377d0eb7327ad9f5e4d979feb41ad0e0a331bc176fcdd7e45ecdda1ff0f"),
    "de-en": (67205361, "aca2cb2f71268700c5734c7b177fbc91dcadc1ac59844000a85d9d10d0bb19c0"),
    "en-is": (28831218, "1dfc59b45631dbf849c75a23b14379b05296cf651e24dd2df7ab3ab85f916624"),
    "en-ru": (68501634, "422c96c952e37a0e7ae924538f6c521a9dcedb200e0b29eab07a6e3fd00cca9d"),
    "en-zh": (83265500, "c417af397ec380032528a9de8e2fbed40e2de78e0bcc6bace0de257a01ae6635"),
    "flores-200": (25585843, "b8b0b76783024b85797e5cc75064eb83fc5288b41e9654dabc7be6ae944011f6"),
}
OPUS_HUB = "Helsinki-NLP/opus-100"
FLORES_HUB = "openlanguagedata/flores_plus"  # gated; it corrects some of FLORES-200's sentences
FLORES_PLUS = {"zho_Hans": "cmn_Hans"}  # codes that FLORES+ renamed


def opus_files(root: str | Path, pair: str, split: str) -> list[Path]:
    """The two line-aligned files of a split; `pair` has its codes in alphabetical order, such as
    de-en."""
    return [Path(root) / OPUS / pair / f"opus.{pair}-{split}.{code}" for code in pair.split("-")]


def flores_file(root: str | Path, code: str, split: str) -> Path:
    return Path(root) / FLORES / split / f"{code}.{split}"


def read_aligned(files: list[Path]) -> list[tuple[str, ...]]:
    """Line-aligned files, one per language -> list of tuples. Raises UserError when their line
    counts differ."""
    columns = [read_lines(file) for file in files]
    for file, column in zip(files, columns):
        if len(column) != len(columns[0]):
            raise UserError(
                f"{files[0]} has {len(columns[0])} lines but {file} has {len(column)}; "
                "they must be aligned"
            )
    return [tuple(text.strip() for text in row) for row in zip(*columns)]


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """One sentence per line. A line end inside a sentence would shift all that follow, so it
    becomes a space."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = []
    for line in lines:
        if "\n" in line or "\r" in line:
            line = " ".join(line.splitlines())
        whole.append(line + "\n")
    write_atomic(path, "".join(whole))


def download(url: str, path: Path, size: int | None = None, sha256: str | None = None) -> str:
    """Fetch `url` to `path`, going on from `path`.part if a download was stopped. `path` appears
    when it is whole and has the size and hash that were published; a file put there by hand is held
    to them too. Returns its SHA-256. Raises UserError."""
    part = Path(f"{path}.part")
    if path.exists():
        return checked(path, size, sha256)
    path.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    whole = size
    try:
        if have != size:
            whole = fetch_rest(url, part, have, size)
    except (OSError, http.client.HTTPException) as error:
        if have and getattr(error, "code", None) == 416:
            part.unlink()  # more is there than the server has: it can't be right
            return download(url, path, size, sha256)
        why = getattr(error, "reason", error) or type(error).__name__
        raise UserError(
            f"{url}: {why}; the same command goes on from what is there. Or fetch it elsewhere and "
            f"put it at {path}, or try another --source"
        ) from None
    if whole is not None and part.stat().st_size < whole:
        raise UserError(
            f"{url}: the connection ended after {part.stat().st_size} of {whole} bytes; "
            "the same command goes on from there"
        )
    try:
        found = checked(part, size, sha256)
    except UserError:
        part.unlink()
        raise
    os.replace(part, path)
    return found


def fetch_rest(url: str, part: Path, have: int, size: int | None) -> int | None:
    """Append to the file `part` what follows its first `have` bytes. Returns how many bytes there
    are in all, None where neither `size` nor the server says it."""
    headers = {"Range": f"bytes={have}-"} if have else {}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=60) as response, open(part, "ab") as file:
        if response.status != 206:  # 206: the server goes on where we were; else it starts anew
            have = 0
            file.truncate(have)
        length = response.headers["Content-Length"]  # not every server says it
        whole = size or (have + int(length) if length else None)
        bar = progress(total=whole, initial=have, desc=part.stem, unit="B", unit_scale=True)
        with bar:
            while block := response.read(1 << 20):
                bar.update(file.write(block))
    return whole


def checked(path: Path, size: int | None, sha256: str | None) -> str:
    """SHA-256 of a file. Raises UserError where size or hash are known, and are others."""
    found = (path.stat().st_size, file_sha256(path))
    if size is not None and found[0] != size or sha256 is not None and found[1] != sha256:
        raise UserError(
            f"{path}: not the file that was published ({found[0]} bytes, SHA-256 {found[1]}; "
            f"published: {size} bytes, {sha256}); remove it, if it is still there, and try again"
        )
    return found[1]


def extract(archive: Path, targets: dict[str, Path]) -> None:
    """Unpack the members of a .tar.gz that `targets` maps to paths, each atomically. Raises
    UserError if it can't."""
    left = dict(targets)
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                target = left.pop(member.name.removeprefix("./"), None)
                if target is not None:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    content = tar.extractfile(member).read()
                    with replacing(target) as temporary:
                        temporary.write_bytes(content)
                if not left:
                    return
    except (tarfile.TarError, OSError, EOFError, zlib.error, AttributeError) as error:
        raise UserError(
            f"{archive}: can't be unpacked ({error}); remove it and try again"
        ) from None
    raise UserError(f"{archive}: no {next(iter(left))} in it")


def from_publisher(root: Path, name: str, targets: list[Path]) -> dict:
    """Download and unpack the files of an OPUS-100 pair or flores-200. Returns the entry for
    sources.json. Raises UserError."""
    url = FLORES_URL if name == "flores-200" else OPUS_URL.format(pair=name)
    archive = root / url.rpartition("/")[2]
    sha256 = download(url, archive, *ARCHIVES.get(name, (None, None)))
    extract(archive, {str(path.relative_to(root)): path for path in targets})
    return {"source": url, "sha256": sha256}


def from_hub(root: Path, name: str, targets: list[Path]) -> dict:
    """The same from the hub's datasets, OPUS-100 and FLORES+. Raises UserError."""
    if name == "flores-200":
        repository = FLORES_HUB
        commit, columns = flores_plus(targets)
    else:
        repository = OPUS_HUB
        commit, columns = opus_parquet(name, targets)
    for path, lines in columns.items():
        write_lines(path, lines)
    return {"source": f"hub: {repository}", "revision": commit}


def opus_parquet(pair: str, targets: list[Path]) -> tuple[str, dict[Path, list[str]]]:
    """(commit, {path: sentences}) of OPUS-100 files: one parquet file or several per split, a row
    per pair."""
    folder, commit = hub_snapshot(OPUS_HUB, [f"{pair}/*.parquet"], repo_type="dataset")
    columns = {}
    for split, published in (("train", "train"), ("dev", "validation"), ("test", "test")):
        paths = [path for path in targets if path.stem.endswith(f"-{split}")]
        if not paths:
            continue
        shards = sorted(folder.glob(f"{pair}/{published}-*.parquet"))
        rows = read_parquet(OPUS_HUB, paths[0], shards)
        for path in paths:
            columns[path] = [row["translation"][path.suffix[1:]] for row in rows]
    return commit, columns


def flores_plus(targets: list[Path]) -> tuple[str, dict[Path, list[str]]]:
    """(commit, {path: sentences}) of FLORES+ files: parquet or JSON lines, one per language and
    split."""
    stems, patterns = {}, []
    for path in targets:
        stems[path] = f"{path.parent.name}/{FLORES_PLUS.get(path.stem, path.stem)}"
        patterns += [f"{stems[path]}.parquet", f"{stems[path]}.jsonl"]
    folder, commit = hub_snapshot(FLORES_HUB, patterns, repo_type="dataset")
    columns = {}
    for path, stem in stems.items():
        json_lines = folder / f"{stem}.jsonl"
        if json_lines.exists():
            rows = [json.loads(line) for line in read_lines(json_lines)]
        else:
            rows = read_parquet(FLORES_HUB, path, sorted(folder.glob(f"{stem}.parquet")))
        columns[path] = [row["text"] for row in sorted(rows, key=lambda row: row["id"])]
    return commit, columns


def read_parquet(repository: str, path: Path, files: list[Path]) -> list[dict]:
    """Rows of parquet files in their order. Raises UserError if there are none for `path`."""
    import pyarrow.parquet  # only the hub needs it

    if not files:
        raise UserError(
            f"{repository}: no {path.name} in it as we know its layout; try another --source"
        )
    return pyarrow.parquet.read_table(files).to_pylist()


def all_files(root: str | Path, pairs: list[str], flores_codes: list[str]) -> dict[str, list[Path]]:
    """Every file of OPUS-100 `pairs` and of FLORES-200 codes: {pair or flores-200: [path, ...]}."""
    files = {}
    for pair in pairs:
        files[pair] = []
        for split in ("train", "dev", "test"):
            files[pair] += opus_files(root, pair, split)
    files["flores-200"] = []
    for code in flores_codes:
        for split in ("dev", "devtest"):
            files["flores-200"].append(flores_file(root, code, split))
    return files


def find_inputs(
    root: str | Path, pairs: list[str], flores_codes: list[str], source: str
) -> list[Path]:
    """The files of OPUS-100 `pairs` and of FLORES-200 codes, those that `root` lacks fetched from
    `source`, folder (nowhere), publisher or hub. Raises UserError for a file that is not there."""
    if source != "folder":
        fetch(root, pairs, flores_codes, source)
    inputs = []
    for files in all_files(root, pairs, flores_codes).values():
        inputs += files
    for file in inputs:
        if not file.exists():
            raise UserError(
                f"{file}: no such file; --data takes OPUS-100 and FLORES-200 as published, "
                "--source publisher or hub fetches them"
            )
    return inputs


def fetch(root: str | Path, pairs: list[str], flores_codes: list[str], source: str) -> None:
    """Bring the files of OPUS-100 `pairs` and FLORES-200 codes that `root` lacks from `source`:
    publisher or hub. What is there is left alone, so a part can come from two sources; sources.json
    names both. Raises UserError."""
    root = Path(root)
    lacks = {}
    for name, targets in all_files(root, pairs, flores_codes).items():
        missing = [path for path in targets if not path.exists()]
        if missing:
            lacks[name] = missing
    if not lacks:
        return  # the folder need not be writable
    lock = lock_folder(root)
    for name, missing in lacks.items():
        files = [str(path.relative_to(root)) for path in missing]
        # Written before the files, as "begun", so that a kill in between can't lose where they are
        # from.
        note_source(root, name, {"source": source, "files": files, "state": "begun"})
        get = from_publisher if source == "publisher" else from_hub
        note_source(root, name, {**get(root, name, missing), "files": files})
    lock.close()


def note_source(root: Path, name: str, entry: dict) -> None:
    """Put `entry` into sources.json under `name`, in the place of one of the same files, else
    beside what is there."""
    known, replaced = sources(root), set(entry["files"])
    others = [old for old in known.get(name, []) if not set(old["files"]) <= replaced]
    known[name] = [*others, entry]
    write_json(root / "sources.json", known)


def sources(root: str | Path, wanted: Collection[str] | None = None) -> dict[str, list[dict]]:
    """Where the corpora, or those `wanted`, are from as far as it is known:
    {pair or flores-200: [{"source": ..., "files": [...], ...}]}."""
    path = Path(root) / "sources.json"
    known = read_json(path) if path.exists() else {}
    if wanted is None:
        return known
    return {name: entries for name, entries in known.items() if name in wanted}


CHINESE = re.compile("[\u3400-\u9fff]")


def length_ratio(a: str, b: str) -> float:
    """Longer over shorter, in letters, a Chinese character counting as three. On FLORES-200's human
    translations this puts the six languages on one scale: 99.9 % of the pairs stay under 2.2 (under
    6.1 in plain characters)."""
    a, b = (len(text) + 2 * len(CHINESE.findall(text)) for text in (a, b))
    return max(a, b) / max(1, min(a, b))


def full_pairs(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those without an empty side."""
    return [(en, x) for en, x in pairs if not is_empty(en) and not is_empty(x)]


def clean(
    pairs: list[tuple[str, str]],
    held_out_en: set[str],
    held_out_x: set[str],
    drop: Collection[str],
    max_ratio: float,
) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """OPUS-100 training pairs (en, x) without noise, and a count per rule.

    Each pair counts under the first rule that it breaks. Pairs with an empty side or a side in a
    dev or test set are always left out, those that break a rule in `drop` (of NOISE) too; the
    others are counted but kept. Texts are compared by support.text.comparable, as those held out
    are given.
    """
    always = {"empty", "in_dev_or_test"}
    kept, seen = [], set()
    count = dict.fromkeys(("read", "empty", "in_dev_or_test", *NOISE), 0)
    for en, x in pairs:
        count["read"] += 1
        said = comparable(en), comparable(x)
        checks = {
            "empty": "" in said,
            "in_dev_or_test": said[0] in held_out_en or said[1] in held_out_x,
            "duplicate": said in seen,
            "identical": said[0] == said[1],
            "length_ratio": length_ratio(en, x) > max_ratio,
        }
        seen.add(said)
        broken = [rule for rule, bad in checks.items() if bad]
        if broken:
            count[broken[0]] += 1
        if not always.union(drop).intersection(broken):
            kept.append((en, x))
    return kept, count


def file_entry(file: Path, rows: list[dict]) -> dict:
    """What the manifest says of a file of sentence pairs: number, origins, hash."""
    origins = Counter(row["origin"] for row in rows)
    return {"pairs": len(rows), "origins": dict(origins), "sha256": file_sha256(file)}


def print_report(manifest: dict, out: str | Path) -> None:
    """What data.py made: a line per language, with what its corpus could not give, and per file."""
    settings = manifest["settings"]
    for lang, count in manifest["corpora"].items():
        line = ", ".join(f"{name} {number}" for name, number in count.items())
        for name, flag in (("stage1", "train_pairs"), ("dev", "dev_pairs"), ("test", "test_pairs")):
            elsewhere = name == "test" and settings["flores_test"]  # the test set is FLORES-200's
            if count[name] < settings[flag] and not elsewhere:
                line += f"  (asked for {settings[flag]} {name})"
        print(f"{lang}: {line}")
    for name, entry in manifest["files"].items():
        flores = entry["origins"].get("flores-200", 0)
        share = f", {flores} of them FLORES-200's (--flores-pairs)" if "train" in name else ""
        print(f"{Path(out) / name}: {entry['pairs']} pairs{share}")


def read_jsonl(
    path: str | Path,
    languages: Collection[str],
    need: tuple[str, ...] = ("src", "tgt"),
    text: tuple[str, ...] = (),
) -> list[dict]:
    """Sentence pairs of a JSONL file as dicts. `need` names the keys that must hold text that is
    not empty, `text` those that may be empty.

    Raises UserError with file and line number for a line that is not a JSON object of such text,
    names a language outside `languages`, translates a language into itself, or can't be written
    as UTF-8 again.
    """
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        try:
            rows.append(parse_row(line, languages, need, text))
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from None
    return rows


def parse_row(
    line: str, languages: Collection[str], need: tuple[str, ...], text: tuple[str, ...]
) -> dict:
    """The sentence pair of a line. Raises ValueError that says what is wrong with it."""
    if is_empty(line):
        raise ValueError("an empty line")
    try:
        row = json.loads(line)
        if "\\u" in line:  # half of a surrogate pair is no character
            json.dumps(row, ensure_ascii=False).encode()
    except ValueError as error:
        raise ValueError(f"not a whole JSON object, one per line ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"not a JSON object but {type(row).__name__}")
    for key in ("src_lang", "tgt_lang", *need, *text):
        if not isinstance(row.get(key), str):
            raise ValueError(f"no text under {key!r}")
        if key not in text and is_empty(row[key]):
            raise ValueError(f"{key!r} is empty")
    check_direction(row, languages)
    return row


def check_direction(row: dict, languages: Collection[str]) -> None:
    """Raises ValueError for a language that is none of `languages`, or translated into itself."""
    for key in ("src_lang", "tgt_lang"):
        if row[key] not in languages:
            known = ", ".join(languages)
            raise ValueError(f"unknown language {row[key]!r} in {key}; known: {known}")
    if row["src_lang"] == row["tgt_lang"]:
        raise ValueError(f"src_lang and tgt_lang are both {row['src_lang']!r}")
