"""What every script promises about runs: errors, files, folders, locks, processes and devices.

Nothing here knows of languages or translation.
"""

import support.interrupts

import argparse
import atexit
import contextlib
import datetime
import errno
import fcntl
import hashlib
import importlib
import io
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple, NoReturn, TextIO

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

support.interrupts.over()  # torch is there: run_main, or whoever imports this, sees to Ctrl-C
CHECKPOINT = [  # patterns of the files that a backbone needs
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "*.safetensors",
    "model.safetensors.index.json",
]


# --- errors -----------------------------------------------------------------------------------


class UserError(Exception):
    """Something the user can mend; its text is the one line they read, whatever characters the
    value or name in it has."""

    def __init__(self, message: str):
        if len(message) > 2000:
            message = f"{message[:1000]} ... {message[-900:]}"
        if not message.isprintable():
            message = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        super().__init__(message)


def reason(error: Exception) -> str:
    """The first line of a library's error, or its type where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def run_main(main: Callable[[], None]) -> None:
    """Call `main()`. A UserError, or what the system refuses, becomes one line on stderr and exit
    status 2; Ctrl-C exit status 130."""
    try:
        if sys.stdout is None:
            raise UserError("standard output is closed")
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # whatever the locale: translations are UTF-8
                stream.reconfigure(encoding="utf-8", errors="backslashreplace")
        begun = time.monotonic()
        main()
        print_cost(time.monotonic() - begun)
        sys.stdout.flush()  # else a full disk or a closed pipe would show only as Python ends
    except UserError as error:
        stop(str(error))
    except OSError as error:
        if error.filename is None:  # of stdout: what is left for it goes nowhere, or it fails again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        stop(f"{error.filename or 'output'}: {error.strerror or error}")
    except KeyboardInterrupt:
        print("stopped; the same command continues from here", file=sys.stderr)
        sys.exit(130)
    except (RuntimeError, MemoryError) as error:
        line = what_befell(error)
        if line is None:
            raise
        stop(line)


def print_cost(seconds: float) -> None:
    """What a long command took, on stderr; by the first process alone."""
    if seconds < 60 or os.environ.get("RANK", "0") != "0":
        return
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on macOS bytes
    line = f"{peak / 2 ** (30 if sys.platform == 'darwin' else 20):.1f} GiB of memory at most"
    if torch.cuda.is_initialized():
        line += f", {torch.cuda.max_memory_reserved() / 2**30:.1f} GiB of the GPU's"
    print(f"took {datetime.timedelta(seconds=round(seconds))}, {line}", file=sys.stderr)


def is_out_of_memory(error: Exception) -> bool:
    """The host's memory or a GPU's."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or "can't allocate memory" in str(error)


def what_befell(error: Exception) -> str | None:
    """The line for an error that is no bug: no memory left, or another process hung or died."""
    text = str(error)
    if is_out_of_memory(error):
        flag = "--micro-batch-size" if Path(sys.argv[0]).name == "train.py" else "--batch-size"
        return (
            f"out of memory; lower {flag}, then the same command continues ({reason(error)[:99]})"
        )
    lost = ("imed out", "Connection closed", "Connection reset", "Broken pipe", "NCCL", "timeout")
    if dist.is_initialized() and any(word in text for word in lost):
        return "another process hung or died; the same command continues from the last checkpoint"
    return None


def stop(message: str) -> NoReturn:
    """End with one line on stderr and exit status 2."""
    with contextlib.suppress(UserError):  # the environment may be what the message is about
        if launch().local_rank > 0:
            time.sleep(5)  # the machine's first rank says it, and torchrun ends this one meanwhile
    print(f"{Path(sys.argv[0]).name}: error: {UserError(message)}", file=sys.stderr)
    sys.exit(2)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Prints a script's docstring as it stands, and behind each flag its default."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = action.default is None or action.default is False
        if nothing or action.default == argparse.SUPPRESS or not action.help:
            return action.help
        return f"{action.help} [%(default)s]"


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, with a script's docstring and the flags' defaults in its help, errors in one
    line, and ~/ at the beginning of a value for the home folder, also where the shell leaves it."""

    def __init__(self, doc: str):
        super().__init__(description=doc, formatter_class=HelpFormatter)

    def error(self, message: str) -> NoReturn:
        stop(f"{message}; --help lists the flags")

    def parse_args(self, args: list[str] | None = None) -> argparse.Namespace:
        found = super().parse_args(args)
        for name, value in vars(found).items():
            if name != "text" and isinstance(value, str) and value.startswith("~/"):
                setattr(found, name, os.path.expanduser(value))
        return found


def flag_name(name: str) -> str:
    """micro_batch_size -> --micro-batch-size."""
    return "--" + name.replace("_", "-")


def at_least(least: float, args: argparse.Namespace, *names) -> None:
    """Raises UserError for a flag below `least`, or nan; None, a default to come, passes."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not value >= least:
            raise UserError(f"{flag_name(name)} {value}: must be at least {least}")


def within(end: float, args: argparse.Namespace, *names) -> None:
    """Raises UserError for a flag outside [0, end), the end not included, or nan."""
    for name in names:
        value = getattr(args, name)
        if not 0 <= value < end:
            raise UserError(f"{flag_name(name)} {value}: must lie in [0, {end})")


# --- progress ---------------------------------------------------------------------------------


class LinePerUpdate:
    """A file on which every update of a bar is a line."""

    def __init__(self, file: TextIO):
        self.file = file

    def write(self, text: str) -> None:
        self.file.write(text.replace("\r", "\n"))

    def flush(self) -> None:
        self.file.flush()


def progress(things: Iterable | None = None, rank: int = 0, **settings: Any) -> tqdm:
    """tqdm's bar, of rank 0 alone, on stderr; where that is no terminal, a line per minute."""
    if rank > 0:
        settings["disable"] = True
    if not sys.stderr.isatty():
        settings.update(file=LinePerUpdate(sys.stderr), delay=60, mininterval=60, miniters=1)
    return tqdm(things, **settings)


# --- files ------------------------------------------------------------------------------------


def of_the_system(error: BaseException) -> str | None:
    """The system's refusal (no space, no permission, ...) that a library's error hides, if any."""
    for code in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO):
        if f"os error {code})" in str(error):  # as Rust's libraries have it
            return os.strerror(code)
    while error is not None:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            return error.strerror  # EINVAL: a library read where a damaged file sent it
        error = error.__context__
    return None


@contextlib.contextmanager
def file_errors(path: str | Path, advice: str = "") -> Iterator[None]:
    """What any library raises inside about the file `path` becomes a UserError that names it.
    advice: what to do about a file that isn't what it should be."""
    try:
        yield
    except UserError:
        raise
    except UnicodeEncodeError:
        raise UserError(f"{str(path)!a}: a name that is not UTF-8") from None
    except Exception as error:  # of torch, safetensors, json, ...
        if is_out_of_memory(error):  # the file is not to blame
            raise
        refusal = of_the_system(error)
        if refusal is None:
            refusal = reason(error) + (f"; {advice}" if advice else "")
        raise UserError(f"{path}: {refusal}") from None


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file to write inside; it becomes `path` when all went well, so that a reader, or
    a kill, finds the old file or the new, never half of it. Raises UserError."""
    temporary = Path(f"{path}.tmp")
    with file_errors(path):
        try:
            yield temporary
            umask = os.umask(0o022)  # which can't be read without being set
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)  # safetensors makes files that no one else can read
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_atomic(path: str | Path, text: str) -> None:
    """Write `text` as a whole or not at all. Raises UserError."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: dict) -> None:
    write_atomic(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, without its byte-order mark. Raises UserError."""
    with file_errors(path):
        data = Path(path).read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None


def read_lines(path: str | Path) -> list[str]:
    """Lines of a text file, split at \\n only: U+2028 or NEL inside a sentence is text."""
    lines = read_text(path).split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def read_json(path: str | Path) -> dict:
    """The JSON object in a file. Raises UserError."""
    try:
        content = json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content


def file_sha256(path: str | Path) -> str:
    """64 hex digits. Raises UserError, also for what can be read only once."""
    if Path(path).exists() and not Path(path).is_file():
        raise UserError(f"{path}: no regular file, so it has no identity; write it to one first")
    with file_errors(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def all_there(folder: Path, files: Iterable[str]) -> bool:
    """Whether a folder has all of these: what ended long ago may have lost some since."""
    return all((folder / file).exists() for file in files)


def check_output(path: str | Path) -> None:
    """Raises UserError unless `path` is a new file in a folder that exists."""
    if Path(path).exists():
        raise UserError(f"{path}: exists already; choose another --output or remove it")
    if not Path(path).parent.is_dir():
        raise UserError(f"{path}: its folder does not exist")


# --- run folders ------------------------------------------------------------------------------


def open_locked(path: str | Path, work: str | Path) -> BinaryIO:
    """`path` open for appending, and locked until it is closed. Raises UserError, about the file
    or folder `work`, if another process holds the lock."""
    with file_errors(work):
        file = open(path, "ab")  # noqa: SIM115 - it stays open as long as the lock is to hold
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{work}: another process is at work in it "
                "(workers outlive a killed torchrun; end them first)"
            ) from None
    return file


def lock_folder(folder: str | Path) -> BinaryIO:
    """Make `folder` if needed and lock it until the returned file is closed. Raises UserError."""
    with file_errors(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
    return open_locked(Path(folder) / ".lock", folder)


def check_claim(folder: str | Path, config: dict) -> None:
    """Raises UserError unless `folder` is new, empty, or holds a run with this very `config`."""
    folder = Path(folder)
    path = folder / "config.json"
    if folder.is_symlink() and not folder.exists():
        raise UserError(f"{folder}: a link that leads nowhere; --out takes a folder")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; --out takes a folder")
    if path.exists():
        check_same_config(folder, read_json(path), config)
    elif folder.exists():
        for file in folder.iterdir():
            if not file.name.startswith(".") and file.suffix != ".tmp":
                raise UserError(
                    f"{folder}: holds {file.name}, so it is no run's folder; choose another --out"
                )


def check_same_config(folder: str | Path, old: dict, new: dict) -> None:
    """Raises UserError that names what differs between two runs' settings. One that is nothing
    (null, 0, false) is as good as absent, so that a new flag doesn't lock old runs."""
    if 2 * len(old.keys() & new.keys()) < len(new):
        raise UserError(f"{folder}: holds the run of another script; choose another --out")
    differ = []
    for key in sorted({*old, *new}):
        if (old.get(key) or new.get(key)) and old.get(key) != new.get(key):
            differ.append(f"{key} was {old.get(key)!r}, now {new.get(key)!r}")
    if differ:
        more = f"; and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise UserError(
            f"{folder}: holds a run with other settings ({'; '.join(differ[:3])}{more}); "
            "choose another --out or remove it"
        )


def claim(folder: str | Path, config: dict) -> BinaryIO:
    """Make `folder` the home of a run with `config`, and lock it until the returned file is closed.

    Raises UserError if a run with other settings lives there or another process works there, so
    that the same command resumes and a different one never overwrites.
    """
    check_claim(folder, config)
    lock = lock_folder(folder)
    check_claim(folder, config)  # again, now that nobody else can write
    path = Path(folder) / "config.json"
    if not path.exists():
        write_json(path, config)
    return lock


# --- the hub ----------------------------------------------------------------------------------


def hub_snapshot(name: str, patterns: list[str], repo_type: str = "model") -> tuple[Path, str]:
    """(folder, commit) of the files of a hub repository that match `patterns`, downloaded where
    they are not in the hub's cache yet. `name` is owner/name or owner/name@revision;
    HF_HUB_OFFLINE=1 takes the cache alone. Raises UserError when the hub does not give them."""
    from huggingface_hub import snapshot_download  # slow to import; local files need none of it

    repository, _, revision = name.partition("@")
    try:
        folder = snapshot_download(
            repository,
            repo_type=repo_type,
            revision=revision or None,
            allow_patterns=patterns,
        )
    except Exception as error:  # many libraries' errors, one meaning for the user
        todo = hub_advice(error, repository, repo_type)
        raise UserError(f"{name}: the hub did not give it ({reason(error)}); {todo}") from None
    return Path(folder), Path(folder).name  # the cache names a snapshot's folder by its commit


def hub_advice(error: Exception, repository: str, repo_type: str) -> str:
    """What the user can do about an error of the hub."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    page = f"https://huggingface.co/{'datasets/' if repo_type == 'dataset' else ''}{repository}"
    if isinstance(error, GatedRepoError):
        return f"accept its licence at {page}, then `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "check the name; a private repository needs `hf auth login`"
    if isinstance(error, LocalEntryNotFoundError):
        return (
            "no network (or HF_HUB_OFFLINE is set) and not in the hub's cache; "
            "fetch it elsewhere and pass the local folder"
        )
    return f"check the name, the revision and {page}, or pass a local folder"


def resolve(name: str | Path, files: list[str] = CHECKPOINT) -> tuple[Path, str]:
    """(folder of a checkpoint, its pinned name).

    `name` is a folder, or a hub repository as `owner/name` or `owner/name@revision`, which is
    downloaded. The pinned name is the absolute folder, or the repository at the commit that was
    got, so that what was made with it can be found again. `files` are the patterns to download.
    Raises UserError if there is neither.
    """
    if Path(name).is_dir():
        return Path(name), str(Path(name).resolve())
    repository = name.partition("@")[0]
    is_path = Path(name).exists() or name.startswith((".", "/", "~"))
    if is_path or repository.count("/") != 1:
        raise UserError(
            f"{name}: no such folder; --model takes a checkpoint folder "
            "or a hub name such as Qwen/Qwen2.5-7B-Instruct"
        )
    folder, commit = hub_snapshot(name, files)
    return folder, f"{repository}@{commit}"


# --- processes and devices ----------------------------------------------------------------------


class Launch(NamedTuple):
    """What torchrun's environment says of this process."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    restart: int | None = None  # number of torchrun's restarts so far, where all share its store,
    store: tuple[str, int] | None = None  # and that store's address


def launch() -> Launch:
    """Read torchrun's environment, the only place that does. One process alone is rank 0, whatever
    a scheduler has set. Raises UserError where the variables don't fit together."""
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    names += ("GROUP_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")
    values, advice = {}, "start several processes by torchrun, or unset these variables"
    for name in names:
        text = os.environ.get(name, "").strip()
        if text and not text.isdecimal():
            raise UserError(f"{name}={text} in the environment is no number; {advice}")
        values[name] = int(text) if text else None
    world = values["WORLD_SIZE"] or 1
    if world == 1:
        return Launch(0, 1, 0, 1)
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name, "").strip():
            raise UserError(f"WORLD_SIZE={world} in the environment, but no {name}; {advice}")
    local_world = values["LOCAL_WORLD_SIZE"] or world
    if values["RANK"] >= world or values["LOCAL_RANK"] >= local_world:
        wrong = f"RANK={values['RANK']}, LOCAL_RANK={values['LOCAL_RANK']}"
        raise UserError(f"{wrong} in the environment, but WORLD_SIZE={world}; {advice}")
    restart, store = None, None
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shared and values["GROUP_WORLD_SIZE"] == 1:
        restart = values["TORCHELASTIC_RESTART_COUNT"]
        store = os.environ["MASTER_ADDR"], values["MASTER_PORT"]
    return Launch(values["RANK"], world, values["LOCAL_RANK"], local_world, restart, store)


class Ranks(NamedTuple):
    """This process among those that torchrun started; (0, 1) under plain python."""

    rank: int
    world: int

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def broadcast_from_rank0(self, ask: Callable[[], Any]) -> Any:
        """What ask() gives rank 0, on every rank: of a folder that machines share, each may see
        another state."""
        found = [ask() if self.rank == 0 else None]
        if self.world > 1:
            dist.broadcast_object_list(found)
        return found[0]

    def sum(self, values: Tensor, device: torch.device) -> Tensor:
        """The sum of every rank's `values`, a CPU tensor; NCCL needs them on `device` meanwhile."""
        if self.world == 1:
            return values
        values = values.to(device)
        dist.all_reduce(values)
        return values.cpu()


def init_distributed(device: str, minutes: float = 360) -> Ranks:
    """Join the process group that torchrun's environment describes, if any: NCCL on GPUs, gloo on
    CPUs. `device` is the flag: auto, cpu or cuda. minutes: how long a process waits for another
    before it gives up. Raises UserError for more processes than GPUs."""
    here = launch()
    if here.world > 1:
        use_cuda = device != "cpu" and torch.cuda.is_available()
        if use_cuda:
            gpus = torch.cuda.device_count()
            if here.local_world > gpus:
                raise UserError(
                    f"{here.local_world} processes but {gpus} GPUs here; "
                    "start as many as there are, or pass --device cpu"
                )
            torch.cuda.set_device(here.local_rank)
        # Before there is a group: imported later, it holds on to the group, and gloo's threads,
        # which destroy_process_group should end, abort Python's exit at times (pytorch#190489).
        importlib.import_module("torch._dynamo")
        patience = datetime.timedelta(minutes=minutes)
        where = {}
        if here.restart is not None:  # all on this machine
            if sys.platform == "linux":
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nothing listens to others
            where = {"store": store_of(here, patience), "rank": here.rank, "world_size": here.world}
        dist.init_process_group("nccl" if use_cuda else "gloo", timeout=patience, **where)
        atexit.register(dist.destroy_process_group)
    return Ranks(here.rank, here.world)


def store_of(here: Launch, patience: datetime.timedelta) -> dist.Store:
    """Where the processes of one machine find each other: a part of torchrun's store for each of
    its restarts, or --max-restarts would lead to the addresses of those that have died
    (pytorch#135712). Machines count restarts each for itself; several need
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, by which torchrun makes a store per restart."""
    store = dist.TCPStore(*here.store, is_master=False, timeout=patience)
    return dist.PrefixStore(f"restart {here.restart}", store)


TERMINATED = 128 + signal.SIGTERM  # the exit status that schedulers expect


class Termination:
    """SIGTERM, which schedulers send a while before they kill: inside `with` it is noted, and all
    ranks learn of it at the same step."""

    def __init__(self, ranks: Ranks, minutes: float):
        """minutes: how long a rank waits for another."""
        self.asked, self.leaves_at_once, self.group = False, False, None
        if ranks.world > 1:
            patience = datetime.timedelta(minutes=minutes)
            self.group = dist.new_group(backend="gloo", timeout=patience)

    def __enter__(self) -> "Termination":
        self.before = signal.signal(signal.SIGTERM, self.note)
        return self

    def __exit__(self, *_: Any) -> None:
        signal.signal(signal.SIGTERM, self.before)

    def note(self, *_: Any) -> None:
        self.asked = True
        if self.leaves_at_once:
            raise SystemExit(TERMINATED)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """For long work between two steps that a resumed run does anew: this rank does not wait
        for the next step."""
        self.leaves_at_once = True
        try:
            if self.asked:
                raise SystemExit(TERMINATED)
            yield
        finally:
            self.leaves_at_once = False

    def agreed(self) -> bool:
        """Whether any rank was asked to end, the same answer on all."""
        if self.group is None:
            return self.asked
        asked = torch.tensor(int(self.asked))
        dist.all_reduce(asked, group=self.group)
        return asked.item() > 0


def claim_run(folder: str | Path, config: dict, ranks: Ranks) -> BinaryIO | None:
    """`claim` by rank 0, and its refusal on every rank. Returns the lock, None on the others."""
    lock, refusal = None, None
    if ranks.rank == 0:
        try:
            lock = claim(folder, config)
        except UserError as error:
            refusal = str(error)
    refusal = ranks.broadcast_from_rank0(lambda: refusal)
    if refusal:
        raise UserError(refusal)
    return lock


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    where = "auto: a GPU if there is one"
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help=where)
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "bfloat16", "float32"],
        help="of the backbone; auto: bfloat16 on a GPU, float32 on a CPU",
    )
    # In translation whoever is done with its share waits for the slowest.
    patience = "minutes to wait for another process under torchrun before giving up"
    parser.add_argument("--timeout", type=some_minutes, default=360, help=patience)


def some_minutes(text: str) -> float:
    """A flag's value: at least half a second and at most a year."""
    number = float(text)
    if not 0.01 <= number < 366 * 24 * 60:
        raise argparse.ArgumentTypeError(f"{text} minutes can't be")
    return number


def device_and_dtype(device: str, dtype: str = "auto") -> tuple[torch.device, torch.dtype]:
    """Where and how precisely the backbone computes: bf16 on a GPU and fp32 on a CPU unless `dtype`
    says otherwise. Adapter parameters, optimizer and loss are fp32 everywhere. `device` is auto,
    cpu or cuda. Raises UserError."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU is visible to torch")
    if device == "cpu" or not torch.cuda.is_available():
        where, precision = torch.device("cpu"), torch.float32
    else:
        where = torch.device("cuda", launch().local_rank)
        precision = torch.bfloat16
    return where, precision if dtype == "auto" else getattr(torch, dtype)


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


# --- fast or plain ------------------------------------------------------------------------------


def add_plain_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plain",
        action="store_true",
        help="compute by the plain code of these scripts instead of fast/, which gives the same",
    )


def load_fast(plain: bool, ranks: Ranks) -> ModuleType | None:
    """The package fast/, or None where --plain is given or this checkout lacks the folder, which is
    said once on stderr."""
    if plain:
        return None
    if not (Path(__file__).resolve().parents[1] / "fast").is_dir():
        if ranks.rank == 0:
            print("no fast/ in this checkout: running the plain scripts", file=sys.stderr)
        return None
    return importlib.import_module("fast")


def engine_name(fast: ModuleType | None) -> str:
    """What a run remembers of load_fast's answer, so that it is resumed by the same code."""
    return "plain" if fast is None else "fast"
