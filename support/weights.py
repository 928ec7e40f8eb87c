"""Files of weights: which ones a checkpoint has, and whether their tensors are those expected."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from support.runs import UserError, read_json


def shard_files(folder: Path) -> list[Path]:
    """The safetensors of a checkpoint: those that its index names, or the only one. Raises
    UserError where one is missing."""
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.exists():
        names = set(read_json(index).get("weight_map", {}).values())
    files = [folder / name for name in sorted(names)]
    for file in files:
        if not file.exists():
            raise UserError(f"{file}: no such file; the checkpoint is incomplete")
    return files


def read_shapes(file: Path) -> dict[str, tuple]:
    """{name: shape} of a file's tensors, from its header. Raises UserError."""
    try:
        with safe_open(file, framework="pt") as shard:
            names = shard.keys()
            return {name: tuple(shard.get_slice(name).get_shape()) for name in names}
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{file}: not a readable safetensors file ({error}); download it again"
        ) from None


def misfits(expected: dict[str, tuple], found: dict[str, tuple]) -> str:
    """What is wrong with tensors by their shapes, {name: shape}; "" where all fit."""
    wrong = []
    for name, shape in expected.items():
        if name not in found:
            wrong.append(f"{name} is missing")
        elif found[name] != shape:
            wrong.append(f"{name} is {found[name]}, not {shape}")
    for name in found:
        if name not in expected:
            wrong.append(f"{name} is not expected")
    more = "; ..." if len(wrong) > 8 else ""
    return f"{len(wrong)} tensors do not fit: {'; '.join(wrong[:8])}{more}" if wrong else ""


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises UserError."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None
