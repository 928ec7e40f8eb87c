"""Files of weights: which ones a checkpoint has, and whether their tensors are those expected."""

import hashlib
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from support.runs import UserError, file_errors, read_json, replacing

DAMAGED = "not a whole safetensors file: copy or download it again"
NUMBERS = ("F32", "BF16", "F16", "F64")  # as safetensors calls them


def check_values(path: str | Path, content: dict, kinds: dict[str, tuple]) -> None:
    """Raises UserError for the first value of a JSON object that is none of the types it may have.
    kinds: {key: types}; with None among them the key may be missing; numbers must be finite."""
    for key, types in kinds.items():
        value = content.get(key)
        if key not in content and type(None) not in types:
            raise UserError(f"{path}: no {key!r} in it; is it the right file?")
        good = isinstance(value, types) and (bool in types or not isinstance(value, bool))
        if isinstance(value, int | float) and not abs(value) < 2**53:
            good = False
        if not good:
            raise UserError(f"{path}: {key} = {str(value)[:60]!r} can't be")


def check_config(path: str | Path, raw: dict) -> None:
    """Raises UserError for values that no config.json of a decoder has."""
    size, perhaps, none = (int,), (int, type(None)), type(None)
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    sizes += ("num_attention_heads", "max_position_embeddings")
    kinds = {"model_type": (str,), **dict.fromkeys(sizes, size), "rms_norm_eps": (int, float)}
    kinds.update(dict.fromkeys(("num_key_value_heads", "head_dim", "bos_token_id"), perhaps))
    kinds.update(rope_theta=(int, float, none), eos_token_id=(int, list, none))
    kinds.update(rope_scaling=(dict, none), rope_parameters=(dict, none))
    kinds.update(tie_word_embeddings=(bool, none))
    check_values(path, raw, kinds)
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    scaling = rope.keys() - {"type", "rope_type"}
    check_values(path, rope, dict.fromkeys(scaling, (int, float, str, list, none)))
    if isinstance(raw.get("eos_token_id"), list):
        for token in raw["eos_token_id"]:
            check_values(path, {"eos_token_id": token}, {"eos_token_id": size})
    for key in (*sizes, "num_key_value_heads", "head_dim", "rope_theta", "rms_norm_eps"):
        if raw.get(key) is not None and not 0 < raw[key] < 2**31:
            raise UserError(f"{path}: {key} = {raw[key]!r} can't be")
    heads = raw["num_attention_heads"]
    groups = raw.get("num_key_value_heads") or heads
    head_dim = raw.get("head_dim") or raw["hidden_size"] // heads
    if heads % groups or head_dim % 2 or not head_dim:
        raise UserError(f"{path}: {heads} heads of {head_dim} in {groups} groups can't be")


def check_adapter(path: str | Path, description: dict) -> None:
    """Raises UserError for values that no adapter.json has, or that are missing."""
    names = ("variant", "backbone", "backbone_fingerprint")
    names += ("prompt_format", "prompt_sha256", "tokenizer_sha256")
    kinds = {**dict.fromkeys(names, (str,)), "rank": (int,), "languages": (list,)}
    kinds.update(alpha=(int, float), dropout=(int, float), target_modules=(list,))
    kinds.update(groups=(str, type(None)), top_k=(int, type(None)))
    check_values(path, description, kinds)
    languages = description["languages"]
    for lang in languages:
        if not isinstance(lang, str) or not re.fullmatch(r"[\w-]+", lang):
            raise UserError(f"{path}: languages = {str(languages)[:60]} can't be")
    if len(set(languages)) != len(languages) or len(languages) < 2:
        raise UserError(f"{path}: languages = {str(languages)[:60]}: two or more, each once")
    for key, least, end in (("rank", 1, 2**16), ("dropout", 0, 1)):
        if not least <= description[key] < end:
            raise UserError(f"{path}: {key} = {description[key]} can't be")


def shard_files(folder: Path) -> list[Path]:
    """The safetensors of a checkpoint: the only one, or those that its index names; beside a whole
    file an index is a leftover, as to transformers. Raises UserError where one is missing."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists() or not index.exists():
        names = {whole.name}
    else:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index}: no weight_map in it; copy or download it again")
        names = weight_map.values()
    files = []
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{index}: names {name!r}, which is no file in its folder")
        files.append(folder / name)
    files = sorted(set(files))
    for file in files:
        if not file.exists():
            raise UserError(f"{file}: no such file; {what_is_missing(folder)}")
    return files


def what_is_missing(folder: Path) -> str:
    """Why a checkpoint folder has no safetensors, and what to do."""
    if list(folder.glob("pytorch_model*.bin")):
        return (
            "weights are read from safetensors only; transformers converts pytorch_model.bin: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    return "the checkpoint is incomplete"


def read_shapes(file: Path) -> dict[str, tuple]:
    """{name: shape} of a file's tensors, from its header, without those of old checkpoints that are
    computed here. Raises UserError."""
    shapes = {}
    with file_errors(file, DAMAGED), open_weights(file) as shard:
        for name in shard.keys():  # noqa: SIM118 - not a dict
            tensor = shard.get_slice(name)
            if tensor.get_dtype() not in NUMBERS:
                raise UserError(
                    f"{file}: {name} is {tensor.get_dtype()}; of quantised checkpoints take the "
                    f"original, whose weights are {', '.join(NUMBERS)}"
                )
            if not name.endswith(".rotary_emb.inv_freq"):
                shapes[name] = tuple(tensor.get_shape())
    return shapes


def open_weights(file: Path, device: str | torch.device = "cpu") -> safe_open:
    """A safetensors file, opened; as the system has it where it can't be, since safetensors calls
    every refusal a missing file."""
    with open(file, "rb"):
        return safe_open(file, framework="pt", device=str(device))


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


def digest_of(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the names and the bytes of tensors on the CPU, 64 hex digits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def write_tensors(
    path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """A safetensors file with this metadata, or else with its tensors' hash. Raises UserError."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata or {"sha256": digest_of(tensors)})


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, held to the hash in its metadata, if it has one. Raises
    UserError."""
    path = Path(path)
    read_shapes(path)  # refuses what can't be weights
    with file_errors(path, DAMAGED), open_weights(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        expected = (file.metadata() or {}).get("sha256")
    if expected is not None and expected != digest_of(tensors):
        raise UserError(f"{path}: its numbers are not those that were written; copy it again")
    return tensors


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What torch.save wrote, on the CPU, without running code from it. Raises UserError for a file
    that is cut off or of which a bit has changed, which torch does not look at."""
    with file_errors(path, "cut off or damaged; remove it to start the run over"):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # by the CRC of each member
        if damaged:
            raise ValueError(f"{damaged} in it is not what was written")
        return torch.load(path, map_location="cpu", weights_only=True)
