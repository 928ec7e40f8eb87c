"""OPUS-100 and FLORES-200 (section 4.1): fetched from the hub or from their publishers, read as their publishers ship them, and cleaned.

    corpora/opus-100-corpus/v1.0/supervised/de-en/opus.de-en-{train,dev,test}.{de,en}
    corpora/flores200_dataset/{dev,devtest}/deu_Latn.{dev,devtest}

Whatever the source, it is these line-aligned files that are read; sources.json beside them says where they are from.
Files that are there already are not fetched again, so sources can be mixed and a stopped download goes on.
"""

import http.client
import json
import os
import re
import tarfile
import urllib.request
import zlib
from pathlib import Path

from tqdm import tqdm

from files import UserError, file_sha256, hub_snapshot, lock_folder, read_json, read_lines, write_atomic

NOISE = ("duplicate", "identical", "length_ratio")  # of OPUS-100's training pairs, see clean()
OPUS, FLORES = "opus-100-corpus/v1.0/supervised", "flores200_dataset"
OPUS_URL = "https://object.pouta.csc.fi/OPUS-100/v1.0/opus-100-corpus-{pair}-v1.0.tar.gz"
FLORES_URL = "https://dl.fbaipublicfiles.com/nllb/flores200_dataset.tar.gz"
ARCHIVES = {  # bytes and SHA-256 of the publishers' archives; another pair's are not checked but recorded
    "cs-en": (39673827, "e870a377d0eb7327ad9f5e4d979feb41ad0e0a331bc176fcdd7e45ecdda1ff0f"),
    "de-en": (67205361, "aca2cb2f71268700c5734c7b177fbc91dcadc1ac59844000a85d9d10d0bb19c0"),
    "en-is": (28831218, "1dfc59b45631dbf849c75a23b14379b05296cf651e24dd2df7ab3ab85f916624"),
    "en-ru": (68501634, "422c96c952e37a0e7ae924538f6c521a9dcedb200e0b29eab07a6e3fd00cca9d"),
    "en-zh": (83265500, "c417af397ec380032528a9de8e2fbed40e2de78e0bcc6bace0de257a01ae6635"),
    "flores-200": (25585843, "b8b0b76783024b85797e5cc75064eb83fc5288b41e9654dabc7be6ae944011f6"),
}
OPUS_HUB = "Helsinki-NLP/opus-100"
FLORES_HUB = "openlanguagedata/flores_plus"  # gated; FLORES+, which corrects some of FLORES-200's sentences
FLORES_PLUS = {"zho_Hans": "cmn_Hans"}  # codes that FLORES+ renamed


def opus_files(root, pair, split):
    """The two line-aligned files of a split; `pair` has its codes in alphabetical order, such as de-en."""
    return [Path(root) / OPUS / pair / f"opus.{pair}-{split}.{code}" for code in pair.split("-")]


def flores_file(root, code, split):
    return Path(root) / FLORES / split / f"{code}.{split}"


def read_aligned(files):
    """Line-aligned files, one per language -> list of tuples. Raises UserError when their line counts differ."""
    columns = [read_lines(file) for file in files]
    for file, column in zip(files, columns):
        if len(column) != len(columns[0]):
            raise UserError(f"{files[0]} has {len(columns[0])} lines but {file} has {len(column)}; they must be aligned")
    return list(zip(*([text.strip() for text in column] for column in columns)))


def write_lines(path, lines):
    """One sentence a line. A line end inside a sentence would shift all that follow, so it becomes a space."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(" ".join(line.splitlines()) + "\n" if "\n" in line or "\r" in line else line + "\n" for line in lines))


def download(url, path, size=None, sha256=None):
    """Fetch `url` to `path`, going on from `path`.part if a download was stopped. `path` appears when it is whole and
    has the size and hash that were published; a file put there by hand is held to them too. Returns its SHA-256.
    Raises UserError."""
    part = Path(f"{path}.part")
    if path.exists():
        return checked(path, size, sha256)
    path.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    whole = size
    try:
        if have == 0 or have != size:
            request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
            with urllib.request.urlopen(request, timeout=60) as response, open(part, "ab") as file:
                if response.status != 206:  # 206: the server goes on where we were; else it starts anew
                    file.truncate(have := 0)
                length = response.headers["Content-Length"]  # not every server says it
                whole = size or (have + int(length) if length else None)
                with tqdm(total=whole, initial=have, desc=path.name, unit="B", unit_scale=True, disable=None) as bar:
                    while block := response.read(1 << 20):
                        bar.update(file.write(block))
    except (OSError, http.client.HTTPException) as error:
        if have and getattr(error, "code", None) == 416:  # more is there than the server has: what is there can't be right
            part.unlink()
            return download(url, path, size, sha256)
        raise UserError(f"{url}: {getattr(error, 'reason', error) or type(error).__name__}; the same command goes on from what is "
                        f"there. Or fetch it elsewhere and put it at {path}, or try another --source") from None
    if whole is not None and part.stat().st_size < whole:
        raise UserError(f"{url}: the connection ended after {part.stat().st_size} of {whole} bytes; the same command goes on from there")
    try:
        found = checked(part, size, sha256)
    except UserError:
        part.unlink()
        raise
    os.replace(part, path)
    return found


def checked(path, size, sha256):
    """SHA-256 of a file. Raises UserError if its size or hash, where they are known, are not those."""
    found = (path.stat().st_size, file_sha256(path))
    if size is not None and found[0] != size or sha256 is not None and found[1] != sha256:
        raise UserError(f"{path}: not the file that was published ({found[0]} bytes, SHA-256 {found[1]}; "
                        f"published: {size} bytes, {sha256}); remove it, if it is still there, and try again")
    return found[1]


def extract(archive, targets):
    """Unpack the members of a .tar.gz that `targets` maps to paths, each atomically. Raises UserError if it can't."""
    left = dict(targets)
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                target = left.pop(member.name.removeprefix("./"), None)
                if target is not None:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    temporary = Path(f"{target}.tmp")
                    temporary.write_bytes(tar.extractfile(member).read())
                    os.replace(temporary, target)
                if not left:
                    return
    except (tarfile.TarError, OSError, EOFError, zlib.error, AttributeError) as error:
        raise UserError(f"{archive}: can't be unpacked ({error}); remove it and try again") from None
    raise UserError(f"{archive}: no {next(iter(left))} in it")


def from_publisher(root, name, targets):
    """`name`: an OPUS-100 pair or flores-200. Returns what sources.json says of it."""
    url = FLORES_URL if name == "flores-200" else OPUS_URL.format(pair=name)
    archive = root / url.rpartition("/")[2]
    sha256 = download(url, archive, *ARCHIVES.get(name, (None, None)))
    extract(archive, {str(path.relative_to(root)): path for path in targets})
    return {"source": url, "sha256": sha256}


def from_hub(root, name, targets):
    """The same from the hub's datasets, OPUS-100 and FLORES+. Raises UserError."""
    repository, read = (FLORES_HUB, flores_plus) if name == "flores-200" else (OPUS_HUB, opus_parquet)
    commit, columns = read(repository, name, targets)
    for path, lines in columns.items():
        write_lines(path, lines)
    return {"source": f"hub: {repository}", "revision": commit}


def opus_parquet(repository, pair, targets):
    """(commit, {path: sentences}) of OPUS-100 files: a parquet file or several a split, a row a pair."""
    folder, commit = hub_snapshot(repository, [f"{pair}/*.parquet"], repo_type="dataset")
    columns = {}
    for split, published in (("train", "train"), ("dev", "validation"), ("test", "test")):
        wanted = [path for path in targets if path.stem.endswith(f"-{split}")]
        if wanted:
            rows = read_parquet(repository, wanted[0], sorted(folder.glob(f"{pair}/{published}-*.parquet")))
            columns.update((path, [row["translation"][path.suffix[1:]] for row in rows]) for path in wanted)
    return commit, columns


def flores_plus(repository, _, targets):
    """(commit, {path: sentences}) of FLORES+ files: parquet or JSON lines, a file a language and split."""
    stems = {path: f"{path.parent.name}/{FLORES_PLUS.get(path.stem, path.stem)}" for path in targets}
    patterns = [f"{stem}.{kind}" for stem in stems.values() for kind in ("parquet", "jsonl")]
    folder, commit = hub_snapshot(repository, patterns, repo_type="dataset")
    columns = {}
    for path, stem in stems.items():
        json_lines = folder / f"{stem}.jsonl"
        if json_lines.exists():
            rows = [json.loads(line) for line in read_lines(json_lines)]
        else:
            rows = read_parquet(repository, path, sorted(folder.glob(f"{stem}.parquet")))
        columns[path] = [row["text"] for row in sorted(rows, key=lambda row: row["id"])]
    return commit, columns


def read_parquet(repository, path, files):
    """Rows of parquet files in their order. Raises UserError if there are none to make `path` from."""
    import pyarrow.parquet  # only the hub needs it

    if not files:
        raise UserError(f"{repository}: no {path.name} in it as we know its layout; try another --source")
    return pyarrow.parquet.read_table(files).to_pylist()


def all_files(root, pairs, flores_codes):
    """Every file of OPUS-100 `pairs` and of FLORES-200 codes: {pair or flores-200: [path, ...]}."""
    parts = {pair: [f for split in ("train", "dev", "test") for f in opus_files(root, pair, split)] for pair in pairs}
    return {**parts, "flores-200": [flores_file(root, code, split) for code in flores_codes for split in ("dev", "devtest")]}


def fetch(root, pairs, flores_codes, source):
    """Bring the files of OPUS-100 `pairs` and FLORES-200 codes that `root` lacks from `source`: publisher or hub. What is
    there is left alone, so a part can come from two sources; sources.json names both. Raises UserError."""
    root, get = Path(root), {"publisher": from_publisher, "hub": from_hub}[source]
    if all(path.exists() for targets in all_files(root, pairs, flores_codes).values() for path in targets):
        return  # the folder need not be writable
    lock = lock_folder(root)
    for name, targets in all_files(root, pairs, flores_codes).items():
        missing = [path for path in targets if not path.exists()]
        if missing:
            files = [str(path.relative_to(root)) for path in missing]
            # Written before the files, as "begun", so that a kill in between can't lose where they are from.
            note(root, name, {"source": source, "files": files, "state": "begun"})
            note(root, name, {**get(root, name, missing), "files": files})
    lock.close()


def note(root, name, entry):
    """Put `entry` into sources.json under `name`, in the place of one of the same files, else beside what is there."""
    known = sources(root)
    known[name] = [old for old in known.get(name, []) if not set(old["files"]) <= set(entry["files"])] + [entry]
    write_atomic(root / "sources.json", json.dumps(known, indent=2) + "\n")


def sources(root, wanted=None):
    """What is known of where the corpora, or those `wanted`, are from: {pair or flores-200: [{"source": ..., "files": [...], ...}]}."""
    path = Path(root) / "sources.json"
    known = read_json(path) if path.exists() else {}
    return known if wanted is None else {name: entries for name, entries in known.items() if name in wanted}


CHINESE = re.compile("[\u3400-\u9fff]")


def length_ratio(a, b):
    """Longer over shorter, in letters, a Chinese character counting as three. On FLORES-200's human translations this
    puts the six languages on one scale: 99.9 % of the pairs stay under 2.2 (under 6.1 in plain characters)."""
    a, b = (len(text) + 2 * len(CHINESE.findall(text)) for text in (a, b))
    return max(a, b) / max(1, min(a, b))


def clean(pairs, held_out_en, held_out_x, drop, max_ratio):
    """OPUS-100 training pairs (en, x) without noise, and a count a rule. Each pair counts under the first rule that it
    breaks; pairs with an empty side or a side in a dev or test set are always left out, those that break a rule in `drop`
    (of NOISE) too, and the others are counted but kept."""
    kept, seen, count = [], set(), dict.fromkeys(("read", "empty", "in_dev_or_test", *NOISE), 0)
    for en, x in pairs:
        count["read"] += 1
        broken = {"empty": not en or not x, "in_dev_or_test": en in held_out_en or x in held_out_x, "duplicate": (en, x) in seen,
                  "identical": en == x, "length_ratio": length_ratio(en, x) > max_ratio}
        rule = next((name for name, bad in broken.items() if bad), None)
        seen.add((en, x))
        if rule:
            count[rule] += 1
        if not any(bad and (name in drop or name not in NOISE) for name, bad in broken.items()):
            kept.append((en, x))
    return kept, count
