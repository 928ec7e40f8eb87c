"""The frozen backbone: a Llama-3 / Qwen2.5 decoder that loads published checkpoints.

Shapes: B batch, T tokens, S cache slots, n rows, D hidden, F feed-forward, V vocabulary, H query heads,
G key/value heads, K head dimension. Parameter names are those of the published safetensors, so
loading is a strict match by name and shape. RoPE rotates split halves, as the published weights expect.
An adapter is passed in as an argument (`lora`); this file only knows that it adds to three projections.
"""

import dataclasses
import hashlib
import json
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from attention import attention, cached_attention, seen
from files import UserError, read_json, write_atomic
from kernels import Packed, linear, packed, rms_norm, rotate, shortlist, swiglu

ROPE_KEYS = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}  # Llama-3.1's


@dataclasses.dataclass(frozen=True)
class Config:
    """What `config.json` of a Llama-3 or Qwen2.5 checkpoint says about shapes; field names as published."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict | None
    tie_word_embeddings: bool
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @classmethod
    def load(cls, folder):
        """Read `folder/config.json`. Raises UserError for an architecture this file does not compute."""
        path = Path(folder) / "config.json"
        raw = read_json(path)
        rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        unsupported = {
            "model_type": raw.get("model_type") not in ("llama", "qwen2"),
            "hidden_act": raw.get("hidden_act", "silu") != "silu",
            "attention_bias": raw.get("attention_bias", False),
            "mlp_bias": raw.get("mlp_bias", False),
            "use_sliding_window": raw.get("use_sliding_window", False),
            "rope_scaling": kind not in ("default", "llama3") or kind == "llama3" and not ROPE_KEYS <= set(rope),
        }
        for key, bad in unsupported.items():
            if bad:
                raise UserError(f"{path}: {key} = {raw.get(key)!r} is not a Llama-3 or Qwen2.5 decoder that model.py computes")
        try:
            heads, eos = raw["num_attention_heads"], raw.get("eos_token_id")
            return cls(
                model_type=raw["model_type"],
                vocab_size=raw["vocab_size"],
                hidden_size=raw["hidden_size"],
                intermediate_size=raw["intermediate_size"],
                num_hidden_layers=raw["num_hidden_layers"],
                num_attention_heads=heads,
                num_key_value_heads=raw.get("num_key_value_heads") or heads,
                head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
                rms_norm_eps=raw["rms_norm_eps"],
                rope_theta=float(raw.get("rope_theta") or rope.get("rope_theta") or 10000.0),
                rope_scaling=dict(rope) if kind == "llama3" else None,
                tie_word_embeddings=raw.get("tie_word_embeddings", False),
                max_position_embeddings=raw["max_position_embeddings"],
                bos_token_id=raw.get("bos_token_id"),
                eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            )
        except KeyError as missing:
            raise UserError(f"{path}: no {missing} in it; is this the config.json of a Llama or Qwen2 checkpoint?") from None


def rope_inv_freq(cfg):
    """Angular step of each rotated pair, (K/2,) fp32, with the Llama-3.1 stretch of long wavelengths."""
    pairs = torch.arange(0, cfg.head_dim, 2, dtype=torch.float32, device="cpu")  # real even under torch.device("meta")
    inv_freq = 1.0 / cfg.rope_theta ** (pairs / cfg.head_dim)
    if cfg.rope_scaling is None:
        return inv_freq
    scaling = cfg.rope_scaling
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * inv_freq / (2 * math.pi)  # rotations over the old context
    smooth = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slow pair, stretched by `factor`; 1: fast pair, kept
    return (1 - smooth) * inv_freq / factor + smooth * inv_freq


def pick(x, wanted):
    """x (B, T, D) at positions `wanted` (B, W): (B, W, D); all of x where that is None."""
    if wanted is None:
        return x
    rows = torch.arange(len(x), device=x.device)[:, None] * x.shape[1] + wanted  # of (B*T, D)
    return x.flatten(0, 1).index_select(0, rows.flatten()).view(*wanted.shape, -1)  # (B, T, D) -> (B*T, D) -> (B*W, D) -> (B, W, D)


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(cfg.hidden_size))
        self.eps = cfg.rms_norm_eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


class KVCache:
    """Keys and values of rows, each at a place of its own of S slots: slot s holds the row's token at position s."""

    def __init__(self, cfg, places, slots, device, dtype):
        shape = (places, slots, cfg.num_key_value_heads, cfg.head_dim)
        self.k, self.v = ([torch.zeros(shape, device=device, dtype=dtype) for _ in range(cfg.num_hidden_layers)] for _ in "kv")

    def each(self, function):
        """Replace every layer's keys and values x (places, S, G, K) by function(x), one at a time: all at once would be twice the cache."""
        for side in (self.k, self.v):
            for layer, x in enumerate(side):
                side[layer] = function(x)

    def reserve(self, slots):
        """Make room for at least `slots` slots, and some more, since rows grow by one."""
        if slots > self.k[0].shape[1]:
            self.each(lambda x: F.pad(x, (0, 0, 0, 0, 0, slots + 63 - x.shape[1])))

    def where(self, rows, heads):
        """Of a pass over attention.Rows: each token's slot among those of all places (T,), and attention.seen for `heads` query heads."""
        places = torch.arange(len(self.k[0]), device=rows.starts.device) if rows.places is None else rows.places  # (n,)
        begins = places * self.k[0].shape[1]
        at = begins.repeat_interleave(rows.starts.diff(), output_size=rows.positions.numel()) + rows.positions[0]  # (n,) -> (T,)
        return at, seen(rows, begins, self.k[0], heads)

    def update(self, layer, k, v, at):
        """Write k, v (1, G, T, K) at slots `at`; return all of the layer's, (places, S, G, K)."""
        for side, x in ((self.k, k), (self.v, v)):
            # (places, S, G, K) -> (places*S, G, K); (G, T, K) -> (T, G, K)
            side[layer].view(-1, *side[layer].shape[2:]).index_copy_(0, at, x[0].transpose(0, 1))
        return self.k[layer], self.v[layer]

    def copy(self, source, target, slots=None):
        """The first `slots` slots, or all, of the places `target` become those of `source`, both (n,)."""
        for x in self.k + self.v:
            x[target, :slots] = x[source, :slots]  # (n, slots, G, K)


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        q_size, kv_size = cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim
        qkv_bias = cfg.model_type == "qwen2"
        self.q_proj = Linear(cfg.hidden_size, q_size, bias=qkv_bias)
        self.k_proj = Linear(cfg.hidden_size, kv_size, bias=qkv_bias)
        self.v_proj = Linear(cfg.hidden_size, kv_size, bias=qkv_bias)
        self.o_proj = Linear(q_size, cfg.hidden_size, bias=False)
        self.head_dim, self.heads, self.groups = cfg.head_dim, cfg.num_attention_heads, cfg.num_key_value_heads

    def join(self):
        """From here on q_proj, k_proj and v_proj are one product, in which a GPU is less idle where tokens are few."""
        parts = self.q_proj, self.k_proj, self.v_proj
        out_features = sum(part.out_features for part in parts)
        self.qkv_proj = Linear(parts[0].in_features, out_features, bias=parts[0].bias is not None, device="meta")
        for name, _ in parts[0].named_parameters():
            setattr(self.qkv_proj, name, nn.Parameter(torch.cat([getattr(part, name) for part in parts]), requires_grad=False))
        del self.q_proj, self.k_proj, self.v_proj

    def forward(self, x, cos, sin, attend, wanted):
        """x (B, T, D) -> (B, W, D), the positions `wanted`. attend(q, k, v): attention.attention, or over a cache."""
        heads = lambda x: x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, T, H*K) -> (B, T, H, K) -> (B, H, T, K)
        if hasattr(self, "qkv_proj"):
            qk, v = heads(self.qkv_proj(x)).split([self.heads + self.groups, self.groups], dim=1)  # (B, H+G, T, K), (B, G, T, K)
            q, k = rotate(qk, cos, sin).split([self.heads, self.groups], dim=1)  # (B, H, T, K), (B, G, T, K)
        else:
            q = rotate(heads(self.q_proj(x)), cos, sin)  # (B, H, T, K)
            k, v = rotate(heads(self.k_proj(x)), cos, sin), heads(self.v_proj(x))  # (B, G, T, K)
        y = attend(q, k, v).transpose(1, 2).flatten(2)  # (B, H, T, K) -> (B, T, H*K)
        return self.o_proj(pick(y, wanted))  # (B, T, H*K) -> (B, W, H*K) -> (B, W, D)


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.gate_proj = Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.up_proj = Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.down_proj = Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)

    def forward(self, x, lora):
        def project(name, x):
            projection = getattr(self, name)
            return projection(x) if lora is None else lora[name](projection, x)  # eq. 1: W_0 x and the update

        return project("down_proj", swiglu(project("gate_proj", x), project("up_proj", x)))


class Layer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.self_attn = Attention(cfg)
        self.mlp = MLP(cfg)
        self.input_layernorm = RMSNorm(cfg)
        self.post_attention_layernorm = RMSNorm(cfg)

    def forward(self, x, cos, sin, attend, lora, wanted):
        x = pick(x, wanted) + self.self_attn(self.input_layernorm(x), cos, sin, attend, wanted)
        return x + self.mlp(self.post_attention_layernorm(x), lora)


class Decoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.num_hidden_layers))
        self.norm = RMSNorm(cfg)


class CausalLM(nn.Module):
    """The decoder with its head. `forward` gives hidden states and `head` turns them into logits, so that the head
    (V columns) is applied where it is wanted only: to last positions in decoding, to targets in training."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.model = Decoder(cfg)
        if not cfg.tie_word_embeddings:
            self.lm_head = Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
        self.register_buffer("inv_freq", rope_inv_freq(cfg), persistent=False)
        self.shortlist = None  # once packed for decoding, where it pays

    def forward(self, tokens, lora=None, rows=None, cache=None, wanted=None):
        """Hidden states of `tokens` (B, T): all, (B, T, D), or those at `wanted` (B, W), indices into T, (B, W, D).

        lora: an iterable over layers of dicts of functions, (projection, x (B, T, D_in)) -> (B, T, D_out): eq. 1, what the Linear
        `projection` gives and the update of eq. 4 (see crosslora.CrossLoRA); None is the bare backbone.
        rows: with B = 1, attention.Rows that stand one after another in T, so that nothing is padded. Without it each of B is a row,
        padded on the right: under the causal mask no token sees what comes after it.
        cache: with rows, a KVCache with slots enough, which gets the tokens' keys and values; they see what it has of their rows.
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None] if rows is None else rows.positions  # (1, T)
        angles = positions[..., None].float() * self.inv_freq  # (1, T, K/2)
        x = self.model.embed_tokens(tokens)  # (B, T, D)
        cos, sin = (turn(angles).to(x.dtype)[:, None] for turn in (torch.cos, torch.sin))  # (1, 1, T, K/2)
        attend = lambda q, k, v: attention(q, k, v, rows)
        if cache is not None:
            at, slots = cache.where(rows, self.cfg.num_attention_heads)
        for i, (layer, updates) in enumerate(zip(self.model.layers, lora or [None] * len(self.model.layers), strict=True)):
            if cache is not None:
                attend = lambda q, k, v, i=i: cached_attention(q, *cache.update(i, k, v, at), rows, slots)
            at_end = wanted if layer is self.model.layers[-1] else None  # after the last attention no token needs another's states
            x = layer(x, cos, sin, attend, updates, at_end)
        return self.model.norm(x)

    @property
    def device(self):
        return self.inv_freq.device

    def head(self, hidden):
        """Logits (..., V) of hidden states (..., D)."""
        return linear(hidden, self.head_weight())

    def greedy(self, hidden):
        """The word with the greatest logit (n,) for each of hidden states (n, D)."""
        return self.shortlist.argmax(hidden, self.head_weight()) if self.shortlist else self.head(hidden).argmax(1)

    def head_weight(self):
        """(V, D), as it lies or Packed."""
        return self.lm_head.weight if hasattr(self, "lm_head") else self.model.embed_tokens.weight

    def pack(self, training=False):
        """Lay out all projections as this machine multiplies them fastest (kernels.packed), once: for decoding with q, k and v in one,
        for training with their transposes, in that much memory again. What was packed can't be saved or fingerprinted. A tied head is
        packed beside the embeddings, which are looked up. In decoding a head with a kernels.Shortlist stays as it lies."""
        self.shortlist = None if training else shortlist(self.head_weight())
        if self.cfg.tie_word_embeddings and not self.shortlist:
            self.lm_head = Linear(self.cfg.hidden_size, self.cfg.vocab_size, bias=False, device="meta")
            self.lm_head.weight = self.model.embed_tokens.weight
        for layer in self.model.layers:
            if not training and hasattr(layer.self_attn, "q_proj"):
                layer.self_attn.join()
        all_or_body = self.model if self.shortlist else self
        projections = [module for module in all_or_body.modules() if isinstance(module, Linear)]
        for projection in projections:
            weight = packed(projection.weight, training)
            del projection.weight  # a module takes nothing but a parameter under a parameter's name
            projection.weight = weight
        if isinstance(projections[0].weight, Packed):  # what is left are views of the checkpoint's file, and would keep it in memory
            for p in self.parameters():
                p.data = p.data.clone()

    def fingerprint(self):
        """16 hex digits that tell backbones apart: configuration and some thousand numbers of each weight, the same in fp32 and
        bf16. An adapter carries it, so that it is never put on another backbone silently."""
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(self.cfg), sort_keys=True).encode())
        for weight in self.parameters():
            sample = weight.flatten()[:: max(1, weight.numel() // 1000)].to("cpu", torch.bfloat16).contiguous()
            digest.update(sample.view(torch.int16).numpy().tobytes())
        return digest.hexdigest()[:16]


def build(cfg):
    """A CausalLM on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        return CausalLM(cfg)


def load(folder, device="cpu", dtype=torch.float32):
    """The frozen backbone of a published checkpoint folder, in `dtype` on `device`.

    Tensors are read one at a time (peak memory: the model plus one shard). Raises UserError that names every
    missing, extra or misshapen tensor.
    """
    folder = Path(folder)
    model = build(Config.load(folder))
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    index = folder / "model.safetensors.index.json"
    names = read_json(index).get("weight_map", {}).values() if index.exists() else ["model.safetensors"]
    tensors, wrong = {}, []
    for file in (folder / name for name in sorted(set(names))):
        if not file.exists():
            raise UserError(f"{file}: no such file; the checkpoint is incomplete")
        try:
            with safe_open(file, framework="pt", device=str(device)) as shard:
                for name in shard.keys():
                    shape = tuple(shard.get_slice(name).get_shape())
                    if name not in expected:
                        wrong.append(f"{name} is not in this architecture")
                    elif shape != expected[name]:
                        wrong.append(f"{name} is {shape}, config.json says {expected[name]}")
                    else:
                        tensors[name] = shard.get_tensor(name).to(dtype)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: not a readable safetensors file ({error}); download it again") from None
    wrong += [f"{name} is missing" for name in expected if name not in tensors and not any(w.startswith(name + " ") for w in wrong)]
    if wrong:
        raise UserError(f"{folder}: {len(wrong)} tensors do not fit: " + "; ".join(wrong[:8]) + ("; ..." if len(wrong) > 8 else ""))
    model.load_state_dict(tensors, assign=True)
    model.inv_freq = model.inv_freq.to(device)
    return model.requires_grad_(False).eval()


def save(model, config, folder):
    """Write a checkpoint as published ones are: `config` (dict) as config.json, weights as model.safetensors."""
    assert model.state_dict().keys() == build(model.cfg).state_dict().keys(), "packed: its projections are no longer as published"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "model.safetensors.tmp"
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, temporary, metadata={"format": "pt"})
    os.replace(temporary, folder / "model.safetensors")
    write_atomic(folder / "config.json", json.dumps(config, indent=2) + "\n")
