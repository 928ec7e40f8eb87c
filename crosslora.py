"""CrossLoRA: one LoRA expert per language, A by the source and B by the target (section 3.2).

Every adapted projection holds a bank of A matrices and a bank of B matrices. A router turns a
sequence's (source, target) into one expert of each bank; the adapters that the paper compares
differ in that table alone (plain LoRA in its rank, too), but for MoLoRA (top-k), which learns to
route each token.

    adapter = CrossLoRA(model.cfg, ["en", "de", "zh"])
    lora = adapter(["de", "en"], ["zh", "de"])      # A_de with B_zh, A_en with B_de
    hidden = model(tokens, lora)                    # (2, T) -> (2, T, D)

Shapes: B batch rows, T tokens, D_in and D_out of a projection, R rank, n experts of a bank or those
of them in a batch, k of a token. As matrices, A is (R, D_in) and B (D_out, R).
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Config
from support import runs
from support.runs import UserError
from support.weights import check_adapter, misfits, read_tensors, write_tensors

TARGET_MODULES = ("gate_proj", "up_proj", "down_proj")  # section A.1; others take --plain
GROUPS = "en,de,is/cs,ru/zh"  # Table 4


def projection_shape(cfg: Config, name: str) -> tuple[int, int]:
    """(D_in, D_out) of an adapted projection."""
    shapes = {
        "gate_proj": (cfg.hidden_size, cfg.intermediate_size),
        "up_proj": (cfg.hidden_size, cfg.intermediate_size),
        "down_proj": (cfg.intermediate_size, cfg.hidden_size),
    }
    return shapes[name]


# --- routers: (source, target) -> names of the experts of A and B ---------------------------------


def crosslora_route(src_lang: str, tgt_lang: str) -> tuple[str, str]:
    """Eq. 5: f(x; i, j) = 1 for i = x_src and j = x_tgt, else 0."""
    return src_lang, tgt_lang


def single_route(src_lang: str, tgt_lang: str) -> tuple[str, str]:
    """Plain LoRA, with rank and alpha scaled to as many parameters (section 4.3)."""
    return "all", "all"


def direction_route(src_lang: str, tgt_lang: str) -> tuple[str, str]:
    """MoLoRA (static): an expert per direction (section 4.3)."""
    direction = f"{src_lang}-{tgt_lang}"
    return direction, direction


def shared_source_route(src_lang: str, tgt_lang: str) -> tuple[str, str]:
    """Table 3: one A for all source languages."""
    return "all", tgt_lang


def shared_target_route(src_lang: str, tgt_lang: str) -> tuple[str, str]:
    """Table 3: one B for all target languages."""
    return src_lang, "all"


ROUTES = {
    "crosslora": crosslora_route,
    "lora": single_route,
    "molora-static": direction_route,
    "molora-topk": None,  # learned, see RoutedLowRank
    "shared-source": shared_source_route,
    "shared-target": shared_target_route,
    "groups": crosslora_route,  # between groups of languages (Table 3: 3 experts)
}


def parse_groups(text: str, languages: list[str]) -> dict[str, str]:
    """'en,de,is/cs,ru/zh' -> {language: its group's name}. Raises UserError unless each language
    is in one group."""
    group_of = {}
    named = 0
    for group in text.split("/"):
        codes = [code.strip() for code in group.split(",")]
        named += len(codes)
        for code in codes:
            group_of[code] = "+".join(codes)
    if sorted(group_of) != sorted(languages) or named != len(languages):
        raise UserError(f"--groups {text}: must name each of {', '.join(languages)} once")
    return group_of


# --- updates: what an adapter adds to a projection ------------------------------------------------


class LowRank:
    """Eq. 4 for a batch: each row by its own A_src and B_tgt."""

    def __init__(self, A: Tensor, B: Tensor, scale: float, dropout: float):
        self.A, self.B = A, B  # (B, R, D_in), (B, D_out, R)
        self.scale, self.dropout = scale, dropout

    def __call__(self, x: Tensor) -> Tensor:
        """x (B, T, D_in) -> (B, T, D_out)."""
        x = F.dropout(x, self.dropout, training=self.dropout > 0)
        h = torch.bmm(x, self.A.mT)  # A_src x: (B, T, D_in) x (B, D_in, R) -> (B, T, R)
        # Eq. 4, B_tgt A_src x: (B, T, R) x (B, R, D_out) -> (B, T, D_out)
        return torch.bmm(h * self.scale, self.B.mT)


class RoutedLowRank:
    """Eqs. 2 and 3, MoLoRA (top-k): a learned router picks the experts of each token."""

    def __init__(self, bank: "Bank", top_k: int, scale: float, dropout: float, dtype: torch.dtype):
        self.A = torch.stack(list(bank.lora_A.values())).to(dtype)  # (n, R, D_in)
        self.B = torch.stack(list(bank.lora_B.values())).to(dtype)  # (n, D_out, R)
        self.router = bank.router  # (n, D_in), fp32
        self.top_k, self.scale, self.dropout = top_k, scale, dropout
        self.gates = None  # (B, T, n) of the last call, for support/routing.py

    def __call__(self, x: Tensor) -> Tensor:
        """x (B, T, D_in) -> (B, T, D_out)."""
        scores = F.linear(x.float(), self.router).softmax(dim=-1)  # eq. 2: (B, T, n)
        weights, chosen = scores.topk(self.top_k, dim=-1)  # (B, T, k)
        self.gates = torch.zeros_like(scores).scatter(-1, chosen, weights)  # (B, T, n)
        x = F.dropout(x, self.dropout, training=self.dropout > 0)
        h = torch.einsum("btd,nrd->btnr", x, self.A)  # (B, T, D_in) -> (B, T, n, R)
        h = h * self.gates.to(x.dtype)[..., None] * self.scale  # (B, T, n, R) x (B, T, n, 1)
        return torch.einsum("btnr,nor->bto", h, self.B)  # eq. 3, sum over experts: (B, T, D_out)


def present_experts(names: list[str], device: torch.device) -> tuple[list[str], Tensor]:
    """The experts of a batch, each once, and the index (B,) of every row's among them."""
    present = sorted(set(names))
    index = torch.tensor([present.index(name) for name in names], device=device)
    return present, index


def gather(
    experts: nn.ParameterDict, present: list[str], index: Tensor, dtype: torch.dtype
) -> Tensor:
    """Every row's expert, (B, R, D_in) or (B, D_out, R). Only those present take part, so that
    others get no gradient at all."""
    stack = torch.stack([experts[name] for name in present]).to(
        dtype
    )  # (n, R, D_in) or (n, D_out, R)
    return stack.index_select(0, index)  # (n, ...) -> (B, ...)


# --- the adapter ----------------------------------------------------------------------------------


class Bank(nn.Module):
    """The experts of one projection, each a Parameter of its own: an expert that no sequence of a
    step uses has no gradient, so the optimizer passes it over, moments and weight decay included
    (section 3.2: "the remaining experts stay frozen"). With a learned router all experts see every
    batch, and those that no token chose get a gradient of zero."""

    def __init__(
        self, d_in: int, d_out: int, rank: int, a_experts: list, b_experts: list, learned: bool
    ):
        super().__init__()
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.router = None
        for name in a_experts:
            self.lora_A[name] = nn.Parameter(torch.empty(rank, d_in))
            # As LoRA's authors and peft do. B = 0, so that the start is the backbone.
            nn.init.kaiming_uniform_(self.lora_A[name], a=math.sqrt(5))
        for name in b_experts:
            self.lora_B[name] = nn.Parameter(torch.zeros(d_out, rank))
        if learned:
            self.router = nn.Parameter(torch.empty(len(a_experts), d_in))  # W^MoL of eq. 2
            # Not 0, since equal scores would send all tokens to one expert.
            nn.init.kaiming_uniform_(self.router, a=math.sqrt(5))


class CrossLoRA(nn.Module):
    """All experts of all layers. Called with a batch's languages it gives the updates that
    model.CausalLM takes as `lora`."""

    def __init__(
        self,
        cfg: Config,
        languages: list[str],
        rank: int = 16,
        alpha: float = 64,
        dropout: float = 0.1,
        variant: str = "crosslora",
        groups: str = GROUPS,
        top_k: int = 1,
    ):
        """rank, alpha, dropout: section 4.2. variant: a key of ROUTES; `groups` and `top_k` matter
        to `groups` and `molora-topk`. Parameters are fp32. Raises UserError for bad groups or
        top_k."""
        super().__init__()
        self.languages, self.variant = list(languages), variant
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.scale = alpha / rank  # of every update (section 4.2)
        self.learned = variant == "molora-topk"
        self.groups = groups if variant == "groups" else None
        self.top_k = top_k if self.learned else None
        self.language_groups = None
        if variant == "groups":
            self.language_groups = parse_groups(groups, self.languages)
        if self.learned and not 1 <= top_k <= len(languages):
            raise UserError(f"--top-k {top_k}: there are {len(languages)} experts")
        a_experts, b_experts = self.expert_names()
        self.layers = nn.ModuleList()
        for _ in range(cfg.num_hidden_layers):
            banks = nn.ModuleDict()
            for name in TARGET_MODULES:
                d_in, d_out = projection_shape(cfg, name)
                r = self.expert_rank
                banks[name] = Bank(d_in, d_out, r, a_experts, b_experts, self.learned)
            self.layers.append(banks)

    @property
    def expert_rank(self) -> int:
        """Rank of one expert. Plain LoRA's is scaled, and its alpha, to CrossLoRA's parameter count
        (section 4.3)."""
        return self.rank * len(self.languages) if self.variant == "lora" else self.rank

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def route(self, src_lang: str, tgt_lang: str) -> tuple[str, str]:
        """Names of the experts of A and B for a direction. Not defined where tokens are routed."""
        if self.language_groups is not None:
            src_lang = self.language_groups[src_lang]
            tgt_lang = self.language_groups[tgt_lang]
        return ROUTES[self.variant](src_lang, tgt_lang)

    def expert_names(self) -> tuple[list[str], list[str]]:
        """Names of all experts of A and of B."""
        if self.learned:
            names = [f"e{i}" for i in range(len(self.languages))]
            return names, names
        a_experts, b_experts = {}, {}  # dicts, which keep the order of the languages
        for src_lang in self.languages:
            for tgt_lang in self.languages:
                if src_lang != tgt_lang:
                    a, b = self.route(src_lang, tgt_lang)
                    a_experts[a] = b_experts[b] = True
        return list(a_experts), list(b_experts)

    def forward(
        self,
        src_langs: list[str],
        tgt_langs: list[str],
        dtype: torch.dtype = torch.float32,
        dropout: bool = False,
    ) -> list[dict]:
        """For each layer {projection: its update}, of a batch whose B rows translate from
        `src_langs` into `tgt_langs`. dtype: that of the backbone's activations. dropout: whether
        the adapter's is on, as in training."""
        p = self.dropout if dropout else 0.0
        if self.learned:
            return [self.routed_updates(banks, p, dtype) for banks in self.layers]
        routes = [self.route(s, t) for s, t in zip(src_langs, tgt_langs, strict=True)]
        a_present, a_index = present_experts([a for a, _ in routes], self.device)
        b_present, b_index = present_experts([b for _, b in routes], self.device)
        lora = []
        for banks in self.layers:
            updates = {}
            for name, bank in banks.items():
                A = gather(bank.lora_A, a_present, a_index, dtype)  # (B, R, D_in)
                B = gather(bank.lora_B, b_present, b_index, dtype)  # (B, D_out, R)
                updates[name] = LowRank(A, B, self.scale, p)
            lora.append(updates)
        return lora

    def routed_updates(self, banks: nn.ModuleDict, dropout: float, dtype: torch.dtype) -> dict:
        updates = {}
        for name, bank in banks.items():
            updates[name] = RoutedLowRank(bank, self.top_k, self.scale, dropout, dtype)
        return updates


# --- adapter folders: adapter.safetensors and adapter.json ----------------------------------------


def settings_of(adapter: CrossLoRA) -> dict:
    """What rebuilds an adapter, but for the backbone's shape."""
    return {
        "variant": adapter.variant,
        "languages": adapter.languages,
        "rank": adapter.rank,
        "alpha": adapter.alpha,
        "dropout": adapter.dropout,
        "groups": adapter.groups,
        "top_k": adapter.top_k,
        "target_modules": list(TARGET_MODULES),
    }


def save_adapter(adapter: CrossLoRA, folder: str | Path, made_for: dict, steps: int) -> None:
    """Write adapter.safetensors, then adapter.json, which rebuilds the adapter and refuses what it
    was not made for: `made_for` has the backbone's name and fingerprint, and what
    data.Tokenizer.describe() tells."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "adapter.safetensors", adapter.state_dict())
    runs.write_json(folder / "adapter.json", {**settings_of(adapter), **made_for, "steps": steps})


def read_description(folder: str | Path) -> dict:
    """The adapter.json of an adapter folder. Raises UserError if it is missing or says too
    little."""
    path = Path(folder) / "adapter.json"
    if not path.exists():
        raise UserError(
            f"{folder}: no adapter.json in it; an adapter is the `adapter` folder of a run of "
            "train.py (`train.py --stage 1` makes runs/stage1/adapter)"
        )
    description = runs.read_json(path)
    check_adapter(path, description)
    if description["variant"] not in ROUTES:
        known = ", ".join(ROUTES)
        raise UserError(f"{path}: variant {description['variant']!r} is unknown; known: {known}")
    return description


def adapter_from_description(description: dict, cfg: Config) -> CrossLoRA:
    """A fresh CrossLoRA as an adapter.json describes it, for a backbone of `cfg`'s shape."""
    settings = {key: description[key] for key in ("rank", "alpha", "dropout", "variant")}
    settings["groups"] = description.get("groups") or GROUPS
    settings["top_k"] = description.get("top_k") or 1
    return CrossLoRA(cfg, description["languages"], **settings)


def load_adapter(folder: str | Path, cfg: Config, here: dict) -> tuple[CrossLoRA, dict]:
    """(adapter, its adapter.json) from a folder. `here` has this backbone's "backbone_fingerprint"
    and what data.Tokenizer.describe() tells. Raises UserError for another backbone, tokenizer or
    prompt than the adapter was made for, and names every tensor missing, extra or misshapen."""
    description = read_description(folder)
    check_made_for(folder, description, here)
    with torch.device("meta"):
        adapter = adapter_from_description(description, cfg)
    tensors = read_tensors(Path(folder) / "adapter.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = {name: tuple(p.shape) for name, p in adapter.state_dict().items()}
    wrong = misfits(expected, shapes)
    if wrong:
        raise UserError(f"{Path(folder) / 'adapter.safetensors'}: {wrong}")
    adapter.load_state_dict({name: t.float() for name, t in tensors.items()}, assign=True)
    return adapter, description


def check_made_for(folder: str | Path, description: dict, here: dict) -> None:
    """Raises UserError unless an adapter was trained with this backbone, tokenizer and prompt."""
    backbone, was = description["backbone"], description["backbone_fingerprint"]
    now = here["backbone_fingerprint"]
    complaints = {
        "backbone_fingerprint": "made for another backbone "
        f"({backbone}, fingerprint {was}; this one has {now})",
        "tokenizer_sha256": "made with another tokenizer.json than the one beside this backbone",
        "prompt_sha256": f"trained with another prompt, {description.get('prompt')!r}; "
        f"here it would be {here.get('prompt')!r}",
    }
    for key, complaint in complaints.items():
        if description[key] != here[key]:
            raise UserError(f"{folder}: {complaint}")
