"""Files, folders and errors: what every script promises its user about them. Nothing here knows of languages or models."""

import fcntl
import hashlib
import json
import os
import sys
import time
from pathlib import Path


CHECKPOINT = ["config.json", "tokenizer.json", "*.safetensors", "model.safetensors.index.json"]


class UserError(Exception):
    """Something the user can mend; its text is the one line they read."""


def reason(error):
    """The first line of a library's error, or its type where it says nothing."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def run_main(main):
    """Call `main()`; a UserError, or what the system refuses, becomes one line on stderr and exit status 2, Ctrl-C exit status 130."""
    try:
        main()
        sys.stdout.flush()  # else a full disk or a closed pipe would show only as Python ends
    except (UserError, OSError) as error:
        if isinstance(error, OSError):
            if error.filename is None:  # of stdout: what is left for it goes nowhere, or it would fail again at the end
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            error = f"{error.filename or 'output'}: {error.strerror or error}"
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(5)  # what the machine's first rank sees, too, is said once: torchrun ends this one meanwhile
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command continues from here", file=sys.stderr)
        sys.exit(130)


def write_atomic(path, text):
    """Write `text` to `path` so that a reader, or a kill, finds the old file or the new one, never half of it."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_jsonl(path, rows):
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def markdown(header, rows):
    """A Markdown table; all columns but the first are aligned right. Cells are strings."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def read_json(path):
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content


def file_sha256(path):
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


def read_lines(path):
    """Lines of a text file, split at \\n only: U+2028 or NEL inside a sentence is text, not a line end."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    lines = text.split("\n")
    return [line.removesuffix("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]


def open_alone(path, work):
    """`path` open for appending, and locked until it is closed. Raises UserError, about the file or folder `work`, if another process
    holds the lock."""
    try:
        file = open(path, "ab")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{work}: another process is at work in it (workers outlive a killed torchrun; end them first)") from None
    except OSError as error:
        raise UserError(f"{work}: {error.strerror or error}") from None
    return file


def lock_folder(folder):
    """Make `folder` if needed and lock it until the returned file is closed. Raises UserError if another process has."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or error}") from None
    return open_alone(Path(folder) / ".lock", folder)


def claim(folder, config, write=True):
    """Make `folder` the home of a run with `config`, and lock it until the returned file is closed.

    Raises UserError if a run with other settings lives there or another process works there, so that the same
    command resumes and a different one never overwrites. write=False only compares.
    """
    folder, path = Path(folder), Path(folder) / "config.json"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; --out takes a folder")
    if path.exists():
        old = read_json(path)
        if 2 * len(old.keys() & config.keys()) < len(config):
            raise UserError(f"{folder}: holds the run of another script; choose another --out")
        differ = [f"{k} was {old.get(k)!r}, now {config.get(k)!r}" for k in sorted({*old, *config}) if old.get(k) != config.get(k)]
        if differ:
            more = f"; and {len(differ) - 3} more" if len(differ) > 3 else ""
            raise UserError(f"{folder}: holds a run with other settings ({'; '.join(differ[:3])}{more}); choose another --out or remove it")
    elif folder.exists() and any(not p.name.endswith((".tmp", ".lock")) for p in folder.iterdir()):
        raise UserError(f"{folder}: not empty and not a run of this script; choose another --out")
    if not write:
        return None
    lock = lock_folder(folder)
    claim(folder, config, write=False)  # again, now that nobody else can write
    if not path.exists():
        write_atomic(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    return lock


def hub_snapshot(name, patterns, repo_type="model"):
    """(folder, commit) of the files of a hub repository that match `patterns`, downloaded where they are not in the
    hub's cache yet. `name` is owner/name or owner/name@revision; HF_HUB_OFFLINE=1 takes the cache alone. Raises
    UserError when the hub does not give them."""
    from huggingface_hub import snapshot_download  # slow to import, and local files need none of it
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        folder = Path(snapshot_download(repository, repo_type=repo_type, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # many libraries' errors, one meaning for the user
        page = f"https://huggingface.co/{'datasets/' if repo_type == 'dataset' else ''}{repository}"
        if isinstance(error, GatedRepoError):
            todo = f"accept its licence at {page}, then `hf auth login`"
        elif isinstance(error, RepositoryNotFoundError):
            todo = "check the name; a private repository needs `hf auth login`"
        elif isinstance(error, LocalEntryNotFoundError):
            todo = "no network (or HF_HUB_OFFLINE is set) and not in the hub's cache; fetch it elsewhere and pass the local folder"
        else:
            todo = f"check the name, the revision and {page}, or pass a local folder"
        raise UserError(f"{name}: the hub did not give it ({reason(error)}); {todo}") from None
    return folder, folder.name  # the cache names a snapshot's folder by its commit


def at_least(least, args, *flags):
    """Raises UserError for a flag below `least`; None, a default to be worked out, is let through."""
    for flag in flags:
        if getattr(args, flag) is not None and not getattr(args, flag) >= least:  # a nan is refused, too
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be at least {least}")


def check_output(path):
    if Path(path).exists():
        raise UserError(f"{path}: exists already; choose another --output or remove it")
    if not Path(path).parent.is_dir():
        raise UserError(f"{path}: its folder does not exist")


def resolve(name, files=CHECKPOINT):
    """(folder of a checkpoint, its pinned name). `name` is a folder, or a hub repository, as `owner/name` or
    `owner/name@revision`, which is downloaded; the pinned name is the absolute folder, or the repository at the commit
    that was got, so that what was made with it can be found again. `files` are the patterns to download. Raises
    UserError if there is neither."""
    if Path(name).is_dir():
        return Path(name), str(Path(name).resolve())
    if Path(name).exists() or name.startswith((".", "/", "~")) or name.partition("@")[0].count("/") != 1:
        raise UserError(f"{name}: no such folder; --model takes a checkpoint folder or a hub name such as Qwen/Qwen2.5-7B-Instruct")
    folder, commit = hub_snapshot(name, files)
    return folder, f"{name.partition('@')[0]}@{commit}"
