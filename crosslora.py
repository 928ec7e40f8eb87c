"""CrossLoRA: one LoRA expert a language, A picked by the source and B by the target (section 3.2).

    python crosslora.py --adapter runs/stage2/adapter --src de --tgt zh --peft exported    # one direction for peft, vLLM

Every adapted projection holds a bank of A matrices (R x D_in) and a bank of B matrices (D_out x R). A static router
turns a sequence's (source, target) into one expert of each bank. B batch rows, T tokens, R rank.
"""

import argparse
import json
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from files import UserError, read_json, run_main, write_atomic

TARGET_MODULES = ("gate_proj", "up_proj", "down_proj")  # section A.1


def crosslora_route(src_lang, tgt_lang):
    """The static router of eq. 5: f(x; i, j) = 1 only for i = x_src and j = x_tgt. Returns (expert of A, expert of B)."""
    return src_lang, tgt_lang


ROUTES = {"crosslora": crosslora_route}


class LowRank:
    """The update of one projection for the rows of a batch: x (B, T, D_in) -> (B, T, D_out)."""

    def __init__(self, A, B, scale, dropout):
        self.A, self.B, self.scale, self.dropout = A, B, scale, dropout  # A (B, R, D_in), B (B, D_out, R)

    def __call__(self, x):
        x = F.dropout(x, self.dropout, training=self.dropout > 0)
        h = torch.bmm(x, self.A.transpose(1, 2))  # A_src x: (B, T, D_in) x (B, D_in, R) -> (B, T, R)
        return torch.bmm(h * self.scale, self.B.transpose(1, 2))  # eq. 4: (B, T, R) x (B, R, D_out) -> (B, T, D_out)

    def select(self, rows):
        """The same update for `rows` (indices into B) only."""
        return LowRank(self.A[rows], self.B[rows], self.scale, self.dropout)


class Bank(nn.Module):
    """The experts of one projection, each its own Parameter: an expert that no sequence of a step uses has no
    gradient at all, so the optimizer passes it over, moments and weight decay included (section 3.2, "frozen")."""

    def __init__(self, d_in, d_out, rank, a_experts, b_experts):
        super().__init__()
        self.lora_A = nn.ParameterDict({name: nn.Parameter(torch.empty(rank, d_in)) for name in a_experts})
        self.lora_B = nn.ParameterDict({name: nn.Parameter(torch.zeros(d_out, rank)) for name in b_experts})
        for A in self.lora_A.values():
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))  # as LoRA's authors and peft do; B = 0, so the start is the backbone


def gather(experts, names, index, dtype):
    """One expert a row: ParameterDict of (M, N) -> (B, M, N). `names` are the experts present, `index` (B,) into them."""
    stacked = torch.stack([experts[name] for name in names]).to(dtype)  # (present, M, N)
    return stacked[index]


class CrossLoRA(nn.Module):
    """All experts of all layers. Calling it with the languages of a batch gives what model.CausalLM takes as `lora`."""

    def __init__(self, cfg, languages, rank=16, alpha=64, dropout=0.1, variant="crosslora"):
        """cfg: the backbone's model.Config. rank, alpha, dropout: section 4.2. Parameters are fp32 on the CPU."""
        super().__init__()
        self.languages, self.rank, self.alpha, self.dropout, self.variant = list(languages), rank, alpha, dropout, variant
        self.route = ROUTES[variant]
        pairs = [(s, t) for s in languages for t in languages if s != t]
        a_experts, b_experts = (list(dict.fromkeys(side)) for side in zip(*(self.route(s, t) for s, t in pairs)))
        sizes = {"gate_proj": (cfg.hidden_size, cfg.intermediate_size), "up_proj": (cfg.hidden_size, cfg.intermediate_size),
                 "down_proj": (cfg.intermediate_size, cfg.hidden_size)}
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: Bank(*sizes[name], rank, a_experts, b_experts) for name in TARGET_MODULES})
            for _ in range(cfg.num_hidden_layers)
        )

    def forward(self, src_langs, tgt_langs, dtype=torch.float32, dropout=False):
        """The experts of each row, gathered: a list over layers of {projection: LowRank}.

        src_langs, tgt_langs: B language codes. dtype: that of the backbone's activations. Gradients reach the
        experts present and no others.
        """
        routes = [self.route(s, t) for s, t in zip(src_langs, tgt_langs, strict=True)]
        (a_names, a_index), (b_names, b_index) = (self._index(side) for side in zip(*routes))
        scale, p = self.alpha / self.rank, self.dropout if dropout else 0.0
        return [
            {name: LowRank(gather(bank.lora_A, a_names, a_index, dtype), gather(bank.lora_B, b_names, b_index, dtype), scale, p)
             for name, bank in layer.items()}
            for layer in self.layers
        ]

    def _index(self, names):
        present = sorted(set(names))
        device = next(self.parameters()).device
        return present, torch.tensor([present.index(name) for name in names], device=device)

    def describe(self, backbone_name, fingerprint, prompt_format, tokenizer_sha256, seed, steps):
        """The content of adapter.json: all that is needed to rebuild the adapter and to refuse a wrong backbone."""
        return {
            "variant": self.variant, "languages": self.languages, "rank": self.rank, "alpha": self.alpha,
            "dropout": self.dropout, "target_modules": list(TARGET_MODULES), "backbone": str(backbone_name),
            "backbone_fingerprint": fingerprint, "prompt_format": prompt_format, "tokenizer_sha256": tokenizer_sha256,
            "seed": seed, "steps": steps,
        }


def save_adapter(adapter, description, folder):
    """Write adapter.safetensors, then adapter.json (see CrossLoRA.describe), each atomically."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "adapter.safetensors.tmp"
    save_file({k: v.detach().cpu().contiguous() for k, v in adapter.state_dict().items()}, temporary)
    os.replace(temporary, folder / "adapter.safetensors")
    write_atomic(folder / "adapter.json", json.dumps(description, indent=2) + "\n")


def read_description(folder):
    """The adapter.json of an adapter folder. Raises UserError if it is missing or says too little."""
    path = Path(folder) / "adapter.json"
    if not path.exists():
        raise UserError(f"{folder}: no adapter.json in it; --adapter takes the `adapter` folder that train.py writes")
    description = read_json(path)
    for key in ("variant", "languages", "rank", "alpha", "dropout", "target_modules", "backbone", "backbone_fingerprint",
                "prompt_format", "tokenizer_sha256"):
        if key not in description:
            raise UserError(f"{path}: no {key!r} in it")
    if description["variant"] not in ROUTES:
        raise UserError(f"{path}: adapter variant {description['variant']!r} is unknown; known: {', '.join(ROUTES)}")
    return description


def read_tensors(path):
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None


def load_adapter(folder, cfg, fingerprint, tokenizer_sha256=None):
    """(CrossLoRA, its adapter.json) from a folder. fingerprint: model.CausalLM.fingerprint() of the backbone it is to
    run on. Raises UserError for another backbone or tokenizer, and names every tensor missing, extra or misshapen."""
    description, path = read_description(folder), Path(folder) / "adapter.safetensors"
    if description["backbone_fingerprint"] != fingerprint:
        raise UserError(f"{folder}: made for another backbone ({description['backbone']}, fingerprint "
                        f"{description['backbone_fingerprint']}; this one has {fingerprint})")
    if tokenizer_sha256 not in (None, description["tokenizer_sha256"]):
        raise UserError(f"{folder}: made with another tokenizer.json than the one beside this backbone")
    adapter = CrossLoRA(cfg, description["languages"], description["rank"], description["alpha"], description["dropout"], description["variant"])
    tensors = read_tensors(path)
    expected = {name: tuple(p.shape) for name, p in adapter.state_dict().items()}
    wrong = [f"{n} is missing" for n in expected if n not in tensors] + [f"{n} is not in this adapter" for n in tensors if n not in expected]
    wrong += [f"{n} is {tuple(t.shape)}, not {expected[n]}" for n, t in tensors.items() if n in expected and tuple(t.shape) != expected[n]]
    if wrong:
        raise UserError(f"{path}: {len(wrong)} tensors do not fit: " + "; ".join(wrong[:8]))
    adapter.load_state_dict(tensors)
    return adapter, description


def export_peft(folder, src_lang, tgt_lang, out):
    """One direction of an adapter folder as a plain LoRA adapter that `peft` and vLLM load."""
    description, out = read_description(folder), Path(out)
    for lang in (src_lang, tgt_lang):
        if lang not in description["languages"]:
            raise UserError(f"{folder}: no expert for {lang!r}; it has {', '.join(description['languages'])}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already; choose another --peft or remove it")
    if src_lang == tgt_lang:
        raise UserError(f"--src and --tgt are both {src_lang}")
    a, b = ROUTES[description["variant"]](src_lang, tgt_lang)
    pinned = description["backbone"]  # as model.resolve names it
    repository, revision = pinned.split("@", 1) if "@" in pinned and not Path(pinned).is_absolute() else (pinned, None)
    tensors = {}
    for name, tensor in read_tensors(Path(folder) / "adapter.safetensors").items():
        _, layer, module, side, expert = name.split(".")  # layers.0.gate_proj.lora_A.de
        if expert == (a if side == "lora_A" else b):
            tensors[f"base_model.model.model.layers.{layer}.mlp.{module}.{side}.weight"] = tensor
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": repository, "revision": revision,
              "r": description["rank"], "lora_alpha": description["alpha"], "lora_dropout": description["dropout"],
              "target_modules": description["target_modules"], "bias": "none", "fan_in_fan_out": False, "inference_mode": True}
    write_atomic(out / "adapter_config.json", json.dumps(config, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True, help="adapter folder that train.py wrote")
    parser.add_argument("--src", required=True, help="source language code: picks A")
    parser.add_argument("--tgt", required=True, help="target language code: picks B")
    parser.add_argument("--peft", required=True, help="folder to write the plain LoRA adapter to")
    args = parser.parse_args()
    export_peft(args.adapter, args.src, args.tgt, args.peft)
    print(f"{args.src} -> {args.tgt}: {args.peft}")


if __name__ == "__main__":
    run_main(main)
