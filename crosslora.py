"""CrossLoRA: one LoRA expert a language, A picked by the source and B by the target (section 3.2), and its rivals.

    python crosslora.py --adapter runs/stage2/adapter --src de --tgt zh --peft exported    # one direction for peft, vLLM
    python crosslora.py --counts                                                           # Table 3's last column

Every adapted projection holds a bank of A matrices (R x D_in) and a bank of B matrices (D_out x R). A router turns a
sequence's (source, target) into one expert of each bank; only MoLoRA (top-k) learns it, from each token. How the chosen ones
meet their tokens is in experts.py. B batch rows, N tokens of all rows, R rank, n experts of A and m of B present.
"""

import argparse
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from experts import EveryExpert, LowRank, PerRow, RoutedLowRank, StackedTransposes, blocks, runs
from files import UserError, at_least, read_json, run_main, write_atomic

TARGET_MODULES = ("gate_proj", "up_proj", "down_proj")  # section A.1
GROUPS = "en,de,is/cs,ru/zh"  # Table 4


def crosslora_route(src_lang, tgt_lang):
    """The static router of eq. 5: f(x; i, j) = 1 only for i = x_src and j = x_tgt. Returns (expert of A, expert of B)."""
    return src_lang, tgt_lang


ROUTES = {  # sections 4.3 and 5.2: (source, target) -> names of the experts of A and B
    "crosslora": crosslora_route,
    "lora": lambda src_lang, tgt_lang: ("all", "all"),  # rank and alpha times the number of languages: as many parameters
    "molora-static": lambda src_lang, tgt_lang: (f"{src_lang}-{tgt_lang}",) * 2,
    "molora-topk": None,  # learned, see experts.RoutedLowRank
    "shared-source": lambda src_lang, tgt_lang: ("all", tgt_lang),
    "shared-target": lambda src_lang, tgt_lang: (src_lang, "all"),
    "groups": crosslora_route,  # between groups of languages
}


def parse_groups(text, languages):
    """'en,de,is/cs,ru/zh' -> {language: its group's name}. Raises UserError unless each language is in one group."""
    groups = [[code.strip() for code in group.split(",")] for group in text.split("/")]
    if sorted(code for group in groups for code in group) != sorted(languages):
        raise UserError(f"--groups {text}: must name each of {', '.join(languages)} once")
    return {code: "+".join(group) for group in groups for code in group}


class Bank(nn.Module):
    """The experts of one projection, each its own Parameter: an expert that no sequence of a step uses has no
    gradient at all, so the optimizer passes it over, moments and weight decay included (section 3.2, "frozen").
    With a learned router all experts see every batch, and those that no token chose get a gradient of zero."""

    def __init__(self, d_in, d_out, rank, a_experts, b_experts, learned):
        super().__init__()
        self.lora_A = nn.ParameterDict({name: nn.Parameter(torch.empty(rank, d_in)) for name in a_experts})
        # In memory (R, D_out): products out of a rank take half the time, and gradients come so.
        self.lora_B = nn.ParameterDict({name: nn.Parameter(torch.zeros(rank, d_out).t()) for name in b_experts})
        for A in self.lora_A.values():
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))  # as LoRA's authors and peft do; B = 0, so the start is the backbone
        self.router = nn.Parameter(torch.empty(len(a_experts), d_in)) if learned else None  # W^MoL of eq. 2
        if learned:
            nn.init.kaiming_uniform_(self.router, a=math.sqrt(5))  # not 0: equal scores would send all tokens to one expert


class CrossLoRA(nn.Module):
    """All experts of all layers. Calling it with the languages of a batch gives what model.CausalLM takes as `lora`."""

    def __init__(self, cfg, languages, rank=16, alpha=64, dropout=0.1, variant="crosslora", groups=GROUPS, top_k=1):
        """cfg: the backbone's model.Config. rank, alpha, dropout: section 4.2. variant: a key of ROUTES; groups and
        top_k matter to `groups` and `molora-topk`. Parameters are fp32 on the CPU."""
        super().__init__()
        self.languages, self.rank, self.alpha, self.dropout, self.variant = list(languages), rank, alpha, dropout, variant
        self.scale = alpha / rank  # of every update (section 4.2)
        self.learned = variant == "molora-topk"
        self.groups, self.top_k = groups if variant == "groups" else None, top_k if self.learned else None
        self.group = parse_groups(groups, languages) if variant == "groups" else {code: code for code in languages}
        if self.learned:
            if not 1 <= top_k <= len(languages):
                raise UserError(f"--top-k {top_k}: there are {len(languages)} experts")
            a_experts = b_experts = [f"e{i}" for i in range(len(languages))]
        else:
            pairs = [(s, t) for s in languages for t in languages if s != t]
            a_experts, b_experts = (list(dict.fromkeys(side)) for side in zip(*(self.route(s, t) for s, t in pairs)))
        self.experts = a_experts, b_experts
        sizes = {"gate_proj": (cfg.hidden_size, cfg.intermediate_size), "up_proj": (cfg.hidden_size, cfg.intermediate_size),
                 "down_proj": (cfg.intermediate_size, cfg.hidden_size)}
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: Bank(*sizes[name], self.expert_rank, a_experts, b_experts, self.learned) for name in TARGET_MODULES})
            for _ in range(cfg.num_hidden_layers)
        )

    @property
    def expert_rank(self):
        """Rank of one expert. Plain LoRA's is scaled, and alpha with it, to CrossLoRA's parameter count (section 4.3)."""
        return self.rank * (len(self.languages) if self.variant == "lora" else 1)

    @property
    def device(self):
        return next(self.parameters()).device

    def route(self, src_lang, tgt_lang):
        """Names of the experts of A and B for a direction. Not defined where tokens are routed."""
        return ROUTES[self.variant](self.group[src_lang], self.group[tgt_lang])

    def forward(self, src_langs, tgt_langs, dtype=torch.float32, dropout=False, counts=None, last=None, together=None, stacked=None):
        """The experts of each row: over layers {projection: PerRow, EveryExpert or RoutedLowRank}, a list, or of EveryExpert a generator,
        good for one pass. Gradients reach the experts present and no others.

        src_langs, tgt_langs: B language codes. dtype: that of the backbone's activations. counts: how many tokens of each row stand one
        after another, default: equally many, and last: how many of them in the last layer, if not all. together: EveryExpert, which
        needs counts; default: on a GPU, with counts. stacked: stacked(dtype), if that is at hand.
        """
        scale, p, last = self.scale, self.dropout if dropout else 0.0, last or counts
        if self.learned:
            every_A = lambda bank: torch.stack([*bank.lora_A.values()]).to(dtype)  # (n, R, D_in)
            every_B = lambda bank: StackedTransposes.apply(*bank.lora_B.values()).to(dtype)  # (n*R, D_out)
            return [*self._each_bank(lambda bank: RoutedLowRank(every_A(bank), every_B(bank), bank.router, self.top_k, scale, p))]
        routes = [self.route(s, t) for s, t in zip(src_langs, tgt_langs, strict=True)]
        if together or together is None and counts is not None and self.device.type == "cuda":
            present = None if stacked else [sorted(set(side)) for side in zip(*routes)]
            most, at_end = (self.columns(src_langs, tgt_langs, n, present) for n in (counts, last))
            return self.by_token(stacked or self.stacked(dtype, present), [most] * (len(self.layers) - 1) + [at_end], dropout)
        most, at_end = ([runs(names, n or [1] * len(routes)) for names in zip(*routes)] for n in (counts, last))
        *others, end = self.layers
        return [*self._each_bank(lambda bank: PerRow(bank, *most, scale, p, dtype), others),
                *self._each_bank(lambda bank: PerRow(bank, *at_end, scale, p, dtype), [end])]

    def grouped(self, src_langs, tgt_langs, dtype=torch.float32, before=None):
        """As forward, for decoding, without dropout and derivatives: a list over layers of {projection: LowRank}. before: the list it
        gave for other rows. It is emptied: its memory is used again, and an expert that is at its place already is not copied again."""
        routes = [self.route(s, t) for s, t in zip(src_langs, tgt_langs, strict=True)]
        (a_names, a_rows, a_places), (b_names, b_rows, b_places) = map(blocks, zip(*routes))
        as_they_stand = list(range(len(routes)))
        moves = a_rows, [a_places[row] for row in b_rows], b_places
        moves = [None if rows == as_they_stand else torch.tensor(rows, device=self.device) for rows in moves]
        update = lambda bank, old: LowRank(bank, (a_names, b_names), moves, self.scale, dtype, old)
        return [{name: update(bank, before and before[i].pop(name)) for name, bank in layer.items()} for i, layer in enumerate(self.layers)]

    def stacked(self, dtype, experts=None):
        """Experts as EveryExpert takes them, `experts` of A and B or all: for every layer {projection: (A, B)}, a generator, so that
        a GPU has the layers before to compute."""
        a, b = experts or self.experts
        zeros = lambda bank: torch.zeros_like(bank.lora_A[a[0]])
        every_A = lambda bank: torch.cat([*(bank.lora_A[name] for name in a), zeros(bank)]).to(dtype)  # (n*R + R, D_in)
        every_B = lambda bank: StackedTransposes.apply(*(bank.lora_B[name] for name in b)).to(dtype)  # (m*R, D_out)
        return self._each_bank(lambda bank: (every_A(bank), every_B(bank)))

    def columns(self, src_langs, tgt_langs, counts, experts=None):
        """EveryExpert's `columns` for rows of `counts` tokens one after another, among `experts` or all."""
        R, (a, b) = self.expert_rank, experts or self.experts
        routes = [self.route(s, t) for s, t in zip(src_langs, tgt_langs, strict=True)]
        which = torch.tensor([(a.index(A), b.index(B)) for A, B in routes])  # (B, 2)
        src, tgt = which.repeat_interleave(torch.tensor(counts), dim=0).split(1, dim=1)  # (B, 2) -> (N, 2) -> (N, 1) each
        column = torch.arange(len(b) * R)
        return torch.where(column // R == tgt, src * R, len(a) * R).add_(column % R).to(self.device)

    def by_token(self, stacked, columns, dropout=False):
        """As forward, a generator, from what stacked() gives and what columns() gives for each layer."""
        p = self.dropout if dropout else 0.0
        update = lambda experts, mine: EveryExpert(*experts, mine, self.scale, p)
        return ({name: update(experts, mine) for name, experts in layer.items()} for layer, mine in zip(stacked, columns))

    def _each_bank(self, update, layers=None):
        return ({name: update(bank) for name, bank in layer.items()} for layer in (self.layers if layers is None else layers))

    def describe(self, backbone_name, fingerprint, prompt_format, tokenizer_sha256, seed, steps):
        """The content of adapter.json: all that is needed to rebuild the adapter and to refuse a wrong backbone."""
        return {
            "variant": self.variant, "languages": self.languages, "rank": self.rank, "alpha": self.alpha,
            "groups": self.groups, "top_k": self.top_k, "dropout": self.dropout,
            "target_modules": list(TARGET_MODULES), "backbone": str(backbone_name), "backbone_fingerprint": fingerprint,
            "prompt_format": prompt_format, "tokenizer_sha256": tokenizer_sha256, "seed": seed, "steps": steps,
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
    for key in ("variant", "languages", "rank", "alpha", "groups", "top_k", "dropout", "target_modules", "backbone",
                "backbone_fingerprint", "prompt_format", "tokenizer_sha256"):
        if key not in description:
            raise UserError(f"{path}: no {key!r} in it")
    if description["variant"] not in ROUTES:
        raise UserError(f"{path}: adapter variant {description['variant']!r} is unknown; known: {', '.join(ROUTES)}")
    return description


def described(description, cfg):
    """A fresh CrossLoRA as an adapter.json describes it, for a backbone of `cfg`'s shape."""
    return CrossLoRA(cfg, *(description[k] for k in ("languages", "rank", "alpha", "dropout", "variant")),
                     description["groups"] or GROUPS, description["top_k"] or 1)


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
    adapter = described(description, cfg)
    tensors = read_tensors(path)
    expected = {name: tuple(p.shape) for name, p in adapter.state_dict().items()}
    wrong = [f"{n} is missing" for n in expected if n not in tensors]
    wrong += [f"{n} is not in this adapter" for n in tensors if n not in expected]
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
    if description["variant"] == "molora-topk":
        raise UserError(f"{folder}: a learned router is not one LoRA; only adapters with a static router can be exported")
    adapter = described(description, SimpleNamespace(hidden_size=1, intermediate_size=1, num_hidden_layers=0))  # its routes and ranks
    a, b = adapter.route(src_lang, tgt_lang)
    pinned = description["backbone"]  # as files.resolve names it
    repository, revision = pinned.split("@", 1) if "@" in pinned and not Path(pinned).is_absolute() else (pinned, None)
    tensors, layers = {}, set()
    for name, tensor in read_tensors(Path(folder) / "adapter.safetensors").items():
        if name.count(".") != 4:
            raise UserError(f"{folder}: adapter.safetensors holds {name}, which is no expert")
        _, layer, module, side, expert = name.split(".")  # layers.0.gate_proj.lora_A.de
        if expert == (a if side == "lora_A" else b):
            tensors[f"base_model.model.model.layers.{layer}.mlp.{module}.{side}.weight"] = tensor
            layers.add(layer)
    whole = {str(i) for i in range(len(layers))}  # no layer is left out
    if not layers or layers != whole or len(tensors) != len(layers) * len(TARGET_MODULES) * 2:  # peft would run without what is missing
        raise UserError(f"{folder}: adapter.safetensors lacks A's of {a} or B's of {b}, which adapter.json promises")
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": repository, "revision": revision,
              "r": adapter.expert_rank, "lora_alpha": description["alpha"] * adapter.expert_rank / description["rank"],
              "lora_dropout": description["dropout"], "target_modules": description["target_modules"], "bias": "none",
              "fan_in_fan_out": False, "inference_mode": True}
    write_atomic(out / "adapter_config.json", json.dumps(config, indent=2) + "\n")


def router_load(lora, lengths):
    """How often a learned router chose each expert in the last pass, for rows of `lengths` tokens one after another: (rows, n) counts,
    means over layers and projections."""
    chosen = torch.stack([update.gates[0] > 0 for layer in lora for update in layer.values()]).float().mean(0)  # (T, n)
    return torch.stack([row.sum(0) for row in chosen.split(lengths)])


def print_counts(rank):
    """Trainable parameters of every variant on the paper's two backbones, and their share of the backbone (Table 3)."""
    languages = ["en", "de", "is", "cs", "ru", "zh"]
    for name, D, F_, layers, total in (("Llama-3-8B", 4096, 14336, 32, 8_030_261_248), ("Qwen2.5-7B", 3584, 18944, 28, 7_615_616_512)):
        print(f"{name}, {total:,} parameters:")
        for variant in ROUTES:
            with torch.device("meta"):
                shape = SimpleNamespace(hidden_size=D, intermediate_size=F_, num_hidden_layers=layers)
                count = sum(p.numel() for p in CrossLoRA(shape, languages, rank, variant=variant).parameters())
            print(f"  {variant:<14} {count:>13,}  {count / total:6.2%}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", action="store_true", help="print the trainable parameters of every variant and stop")
    parser.add_argument("--rank", type=int, default=16, help="r of --counts (section 4.2)")
    parser.add_argument("--adapter", help="adapter folder that train.py wrote")
    parser.add_argument("--src", help="source language code: picks A")
    parser.add_argument("--tgt", help="target language code: picks B")
    parser.add_argument("--peft", help="folder to write the plain LoRA adapter to")
    args = parser.parse_args()
    at_least(1, args, "rank")
    if args.counts:
        return print_counts(args.rank)
    if not (args.adapter and args.src and args.tgt and args.peft):
        raise UserError("--adapter, --src, --tgt and --peft are needed, or --counts")
    export_peft(args.adapter, args.src, args.tgt, args.peft)
    print(f"{args.src} -> {args.tgt}: {args.peft}")


if __name__ == "__main__":
    run_main(main)
