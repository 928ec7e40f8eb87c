"""Exports: one direction of an adapter as a plain LoRA for peft and vLLM, a backbone, parameter
counts.

    python support/export.py --adapter runs/stage2/adapter --src de --tgt zh --out de-zh
    python support/export.py --counts                            # Table 3's last column
"""

import math
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this is a command, too
from crosslora import (
    ROUTES,
    TARGET_MODULES,
    CrossLoRA,
    adapter_from_description,
    read_description,
)
from data import LANGUAGES, Tokenizer, encode, read_stage_data
from model import CausalLM, Config, build
from support import runs
from support.runs import UserError
from support.weights import read_tensors, write_tensors

PAPER_BACKBONES = {  # hidden_size, intermediate_size, layers, query and key/value heads, parameters
    "Llama-3-8B": (4096, 14336, 32, 32, 8, 8_030_261_248),
    "Qwen2.5-7B": (3584, 18944, 28, 28, 4, 7_615_616_512),
}


# --- backbones ------------------------------------------------------------------------------------


def save_backbone(model: CausalLM, config: dict, folder: str | Path) -> None:
    """Write a checkpoint as backbones are published: `config` as config.json, and
    model.safetensors."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(model.named_parameters())
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    runs.write_json(folder / "config.json", config)


# --- peft and vLLM --------------------------------------------------------------------------------


def check_export(
    folder: str | Path, description: dict, src_lang: str, tgt_lang: str, out: Path
) -> None:
    """Raises UserError for a direction or an adapter that is no plain LoRA, or a folder in use."""
    for lang in (src_lang, tgt_lang):
        if lang not in description["languages"]:
            has = ", ".join(description["languages"])
            raise UserError(f"{folder}: no expert for {lang!r}; it has {has}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already; choose another --out or remove it")
    if src_lang == tgt_lang:
        raise UserError(f"--src and --tgt are both {src_lang}")
    if description["variant"] == "molora-topk":
        raise UserError(
            f"{folder}: a learned router is not one LoRA; "
            "only adapters with a static router can be exported"
        )


def peft_tensors(folder: str | Path, a: str, b: str) -> dict[str, Tensor]:
    """The experts `a` of A and `b` of B by peft's names. Raises UserError where one is missing,
    since peft would run the bare backbone there."""
    tensors, layers = {}, set()
    for name, tensor in read_tensors(Path(folder) / "adapter.safetensors").items():
        if name.count(".") != 4:
            raise UserError(f"{folder}: adapter.safetensors holds {name}, which is no expert")
        _, layer, module, side, expert = name.split(".")  # layers.0.gate_proj.lora_A.de
        if expert == (a if side == "lora_A" else b):
            block = "self_attn" if module[0] in "qkvo" else "mlp"  # of q_proj, k_proj, ...
            tensors[f"base_model.model.model.layers.{layer}.{block}.{module}.{side}.weight"] = (
                tensor
            )
            layers.add(layer)
    every_layer = {str(i) for i in range(len(layers))}
    complete = len(tensors) == 2 * len(TARGET_MODULES) * len(layers)
    if not layers or layers != every_layer or not complete:
        raise UserError(
            f"{folder}: adapter.safetensors lacks A's of {a} or B's of {b}, "
            "which adapter.json promises"
        )
    return tensors


def export_peft(folder: str | Path, src_lang: str, tgt_lang: str, out: str | Path) -> None:
    """One direction of an adapter folder as a plain LoRA adapter that `peft` and vLLM load. Raises
    UserError."""
    description, out = read_description(folder), Path(out)
    check_export(folder, description, src_lang, tgt_lang, out)
    # Its routes and ranks; no weights.
    shape = SimpleNamespace(hidden_size=1, intermediate_size=1, num_hidden_layers=0)
    adapter = adapter_from_description(description, shape)
    tensors = peft_tensors(folder, *adapter.route(src_lang, tgt_lang))
    pinned = description["backbone"]  # as runs.resolve names it
    repository, revision = pinned, None
    if "@" in pinned and not Path(pinned).is_absolute():
        repository, revision = pinned.split("@", 1)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": repository,
        "revision": revision,
        "r": adapter.expert_rank,
        "lora_alpha": description["alpha"] * adapter.expert_rank / description["rank"],
        "lora_dropout": description["dropout"],
        "target_modules": description["target_modules"],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_tensors(out / "adapter_model.safetensors", tensors, {"format": "pt"})
    runs.write_json(out / "adapter_config.json", config)


# --- counts ---------------------------------------------------------------------------------------


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def print_counts(rank: int) -> None:
    """Trainable parameters of every variant on the paper's two backbones, and their share of the
    backbone (Table 3)."""
    for name, (hidden, intermediate, layers, heads, groups, total) in PAPER_BACKBONES.items():
        print(f"{name}, {total:,} parameters:")
        shape = SimpleNamespace(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            head_dim=128,
        )
        for variant in ROUTES:
            with torch.device("meta"):
                adapter = CrossLoRA(shape, list(LANGUAGES), rank, variant=variant)
            count = count_parameters(adapter)
            print(f"  {variant:<14} {count:>13,}  {count / total:6.2%}")


def planned_examples(args: Namespace, folder: Path, cfg: Config) -> tuple[list[str], int, str, str]:
    """(languages, training pairs, where they are counted, a line about their tokens) of a run of
    train.py: from prepared data and tokenizer where they are, else Table 5's."""
    unknown = "unknown without prepared data and the checkpoint's tokenizer.json"
    prepared = (Path(args.data) / "manifest.json").exists()
    if args.stage == 2:
        prepared = prepared and (Path(args.pseudo) / "pseudo.train.jsonl").exists()
    only_pseudo = args.stage_2_data == "pseudo"
    if not prepared:
        pairs = 10 * 20997 + (20 * 18997 if args.stage == 2 else 0)
        if only_pseudo:
            pairs = 20 * 18000
        return list(LANGUAGES), pairs, "Table 5", unknown
    languages, rows, _, _ = read_stage_data(args.data, args.pseudo, only_pseudo)
    if not (folder / "tokenizer.json").exists():
        return languages, len(rows), args.data, unknown
    tokenizer = Tokenizer(folder, cfg, args.prompt_format)
    examples, dropped = encode(tokenizer, rows, args.max_length)
    if not examples:
        raise UserError(f"{args.data}: no training pair fits --max-length {args.max_length}")
    lengths = [len(example.ids) for example in examples]
    targets = sum(example.target_count for example in examples)
    tokens = (
        f"{sum(lengths):,} per epoch, {targets:,} of them targets; "
        f"{sum(lengths) / len(examples):.1f} per pair, longest {max(lengths)}; "
        f"{dropped} pairs dropped"
    )
    return languages, len(examples), args.data, tokens


def dry_run(args: Namespace) -> None:
    """train.py --dry-run: what a run would be, from config.json alone and, where they are,
    tokenizer and data. No weights are read."""
    small = [pattern for pattern in runs.CHECKPOINT if "safetensors" not in pattern]
    folder, _ = runs.resolve(args.model, small)
    cfg = Config.load(folder)
    languages, pairs, source, tokens = planned_examples(args, folder, cfg)
    with torch.device("meta"):
        kind = {"variant": args.adapter_type, "groups": args.groups, "top_k": args.top_k}
        trained = count_parameters(CrossLoRA(cfg, languages, args.rank, **kind))
    frozen = count_parameters(build(cfg))
    steps = math.ceil(pairs / args.batch_size)
    total = min(args.epochs * steps, args.max_steps or math.inf)
    print(f"backbone:   {frozen:,} parameters, frozen")
    print(
        f"adapter:    {trained:,} parameters, trained: {trained / frozen:.2%} of the backbone, "
        f"{trained / (frozen + trained):.2%} of the total"
    )
    print(
        f"steps:      {steps:,} per epoch, {total:,} in all; "
        f"{pairs:,} pairs ({source}) in batches of {args.batch_size}"
    )
    print(f"tokens:     {tokens}")


# --- the command ----------------------------------------------------------------------------------


def main() -> None:
    parser = runs.ArgumentParser(__doc__)
    add = parser.add_argument
    add("--counts", action="store_true", help="print every variant's parameters and stop")
    add("--rank", type=int, default=16, help="r of --counts (section 4.2)")
    add("--adapter", help="adapter folder that train.py wrote")
    add("--src", help="source language code: picks A")
    add("--tgt", help="target language code: picks B")
    add("--out", help="folder to write the plain LoRA adapter to")
    args = parser.parse_args()
    runs.at_least(1, args, "rank")
    if args.counts:
        print_counts(args.rank)
        return
    if not (args.adapter and args.src and args.tgt and args.out):
        raise UserError("--adapter, --src, --tgt and --out are needed, or --counts")
    export_peft(args.adapter, args.src, args.tgt, args.out)
    print(f"{args.src} -> {args.tgt}: {args.out}")


if __name__ == "__main__":
    runs.run_main(main)
