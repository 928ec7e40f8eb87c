"""The frozen backbone: a Llama-3 / Qwen2.5 decoder in plain PyTorch, loaded as it is published.

    model = load("path/to/Meta-Llama-3-8B-Instruct")
    logits = model.lm_head(model(tokens))       # (B, T) -> (B, T, D) -> (B, T, V)

Shapes: B batch rows, T tokens, S cache slots, D hidden, F feed-forward, V vocabulary,
H query heads, G key/value heads, K head dimension. Parameters have the names of the published
safetensors, so loading is a strict match by name and shape. RoPE rotates split halves, as the
published weights expect. The adapter is an argument (`lora`): this file only knows that it adds
something to three projections.
"""

import dataclasses
import hashlib
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.runs import UserError, read_json
from support.weights import check_config, misfits, open_weights, read_shapes, shard_files

ROPE_KEYS = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}


@dataclasses.dataclass(frozen=True)
class Config:
    """What `config.json` of a Llama-3 or Qwen2.5 checkpoint says of shapes, by its own names."""

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
    def load(cls, folder: str | Path) -> "Config":
        """Read `folder/config.json`. Raises UserError for what this file does not compute."""
        path = Path(folder) / "config.json"
        raw = read_json(path)
        check_config(path, raw)
        rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        check_architecture(path, raw, rope, rope_type)
        heads = raw["num_attention_heads"]
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
            rope_scaling=dict(rope) if rope_type == "llama3" else None,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings")),
            max_position_embeddings=raw["max_position_embeddings"],
            bos_token_id=raw.get("bos_token_id"),
            eos_token_ids=token_ids(raw.get("eos_token_id")),
        )


def check_architecture(path: Path, raw: dict, rope: dict, rope_type: str) -> None:
    """Raises UserError that names the first key of config.json that this file can't follow."""
    llama31 = rope_type == "llama3" and set(rope) >= ROPE_KEYS
    needs = {  # key: (what config.json says, whether this file computes it)
        "model_type": (raw.get("model_type"), raw.get("model_type") in ("llama", "qwen2")),
        "hidden_act": (raw.get("hidden_act"), raw.get("hidden_act", "silu") == "silu"),
        "rope_parameters" if "rope_parameters" in raw else "rope_scaling": (
            rope,
            rope_type == "default" or llama31,
        ),
    }
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        needs[key] = raw.get(key), not raw.get(key, False)
    for key, (value, good) in needs.items():
        if not good:
            what = "model.py computes Llama-3 and Qwen2.5 decoders"
            raise UserError(f"{path}: {key} = {value!r} is not supported; {what}")


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """A published eos_token_id, one or several or none, as a tuple."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


# --- the decoder ----------------------------------------------------------------------------------


def rope_inv_freq(cfg: Config) -> Tensor:
    """Angle per position of each rotated pair, (K/2,) fp32; Llama-3.1 stretches long waves."""
    pairs = torch.arange(0, cfg.head_dim, 2, dtype=torch.float32, device="cpu")  # even under "meta"
    inv_freq = 1.0 / cfg.rope_theta ** (pairs / cfg.head_dim)
    if cfg.rope_scaling is None:
        return inv_freq
    scaling = cfg.rope_scaling
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    # How often each pair turns over the context that the model was first trained on.
    turns = scaling["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slow, by factor; 1: fast, kept
    return (1 - smooth) * inv_freq / scaling["factor"] + smooth * inv_freq


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on split halves: x (B, heads, T, K); cos and sin (B or 1, 1, T, K/2)."""
    x1, x2 = x.chunk(2, dim=-1)  # (B, heads, T, K/2) each
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


class KVCache:
    """Keys and values of a batch, of which the first `length` of S slots are filled."""

    def __init__(
        self, cfg: Config, batch_size: int, slots: int, device: torch.device, dtype: torch.dtype
    ):
        heads, layers = cfg.num_key_value_heads, cfg.num_hidden_layers
        shape = (layers, batch_size, heads, slots, cfg.head_dim)  # (layers, B, G, S, K)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B, G, T, K) behind the filled slots; return all, (B, G, length + T, K).
        `length` grows in CausalLM.forward, after the last layer."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


def left_padding_mask(pads: Tensor, start: int, end: int) -> Tensor:
    """Which slots the tokens at slots start .. end - 1 attend to, (B, 1, T, S) bool, where the
    first `pads` (B,) slots of each row hold nothing."""
    slots = torch.arange(end, device=pads.device)  # (S,)
    queries = slots[start:, None]  # (T, 1)
    causal = slots <= queries  # (T, S)
    filled = slots >= pads[:, None, None]  # (B, 1, S)
    itself = slots == queries  # a pad sees itself, since a softmax over nothing is NaN
    return (causal & filled | itself)[:, None]  # (B, T, S) -> (B, 1, T, S)


class Attention(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        q_size = cfg.num_attention_heads * cfg.head_dim
        kv_size = cfg.num_key_value_heads * cfg.head_dim
        qkv_bias = cfg.model_type == "qwen2"
        self.q_proj = nn.Linear(cfg.hidden_size, q_size, bias=qkv_bias)
        self.k_proj = nn.Linear(cfg.hidden_size, kv_size, bias=qkv_bias)
        self.v_proj = nn.Linear(cfg.hidden_size, kv_size, bias=qkv_bias)
        self.o_proj = nn.Linear(q_size, cfg.hidden_size, bias=False)
        self.head_dim = cfg.head_dim

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        cache: KVCache | None,
        i: int,
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D). mask: left_padding_mask, or None: causal. i: the layer."""
        q = rotate(self.split_heads(self.q_proj(x)), cos, sin)  # (B, H, T, K)
        k = rotate(self.split_heads(self.k_proj(x)), cos, sin)  # (B, G, T, K)
        v = self.split_heads(self.v_proj(x))  # (B, G, T, K)
        if cache is not None:
            k, v = cache.append(i, k, v)  # (B, G, S, K)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )  # (B, H, T, K)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, T, H, K) -> (B, T, H*K) -> (B, T, D)

    def split_heads(self, x: Tensor) -> Tensor:
        # (B, T, H*K) -> (B, T, H, K) -> (B, H, T, K), or G for H
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def adapted(projection: nn.Linear, x: Tensor, lora: dict | None, name: str) -> Tensor:
    """Eq. 1: y = W_0 x + B A x, the second term from the adapter, if there is one."""
    y = projection(x)  # (B, T, D_in) -> (B, T, D_out)
    return y if lora is None else y + lora[name](x)


class MLP(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)

    def forward(self, x: Tensor, lora: dict | None = None) -> Tensor:
        """x (B, T, D) -> (B, T, D). lora: this layer's updates by projection, see crosslora.py."""
        gate = adapted(self.gate_proj, x, lora, "gate_proj")  # (B, T, F)
        up = adapted(self.up_proj, x, lora, "up_proj")  # (B, T, F)
        return adapted(self.down_proj, F.silu(gate) * up, lora, "down_proj")


class Layer(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.self_attn = Attention(cfg)
        self.mlp = MLP(cfg)
        self.input_layernorm = nn.RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        cache: KVCache | None,
        i: int,
        lora: dict | None,
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D), the arguments as Attention's and MLP's."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, i)
        return x + self.mlp(self.post_attention_layernorm(x), lora)


class Decoder(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.num_hidden_layers))
        self.norm = nn.RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps)


class CausalLM(nn.Module):
    """The decoder with its head. `forward` gives hidden states, and `lm_head` turns those that are
    wanted into logits: the last one in decoding, the targets' in training."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.model = Decoder(cfg)
        self.lm_head = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
        self.tie_weights()
        self.register_buffer("inv_freq", rope_inv_freq(cfg), persistent=False)

    def tie_weights(self) -> None:
        """Small models have one matrix for embeddings and head, and publish it once."""
        if self.cfg.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        return self.inv_freq.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    def forward(
        self,
        tokens: Tensor,
        lora: list[dict] | None = None,
        cache: KVCache | None = None,
        pads: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, T, D) of `tokens` (B, T).

        lora: for each layer, the update of each projection (crosslora.CrossLoRA); None: no adapter.
        cache: keys and values of earlier tokens; those of `tokens` are appended.
        pads (B,): with a cache, how many slots at the beginning of each row are empty; default 0.
        Without a cache rows are padded on the right.
        """
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        positions = torch.arange(start, end, device=tokens.device)[None]  # (1, T)
        mask = None  # causal, under which no token sees pads on the right
        if cache is not None:
            pads = positions.new_zeros(len(tokens)) if pads is None else pads  # (B,)
            positions = (positions - pads[:, None]).clamp(min=0)  # (B, T)
            mask = left_padding_mask(pads, start, end)  # (B, 1, T, S)
        angles = positions[:, None, :, None].float() * self.inv_freq  # (B or 1, 1, T, K/2)
        x = self.model.embed_tokens(tokens)  # (B, T, D)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for i, layer in enumerate(self.model.layers):
            x = layer(x, cos, sin, mask, cache, i, None if lora is None else lora[i])
        if cache is not None:
            cache.length = end
        return self.model.norm(x)

    def fingerprint(self) -> str:
        """16 hex digits that tell backbones apart: configuration and about a thousand numbers of
        each weight, the same in fp32 and bf16. An adapter carries it, so that it is never put on
        another backbone silently."""
        config = json.dumps(dataclasses.asdict(self.cfg), sort_keys=True)
        digest = hashlib.sha256(config.encode())
        for weight in self.parameters():
            step = max(1, weight.numel() // 1000)
            sample = weight.flatten()[::step].to("cpu", torch.bfloat16).contiguous()
            digest.update(sample.view(torch.int16).numpy().tobytes())
        return digest.hexdigest()[:16]


# --- loading --------------------------------------------------------------------------------------


def build(cfg: Config) -> CausalLM:
    """A CausalLM on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        return CausalLM(cfg)


def load(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> CausalLM:
    """The frozen backbone of a published checkpoint folder, in `dtype` on `device`.

    Tensors are read one at a time (peak memory: the model plus one shard). Raises UserError that
    names missing, extra and misshapen tensors.
    """
    folder = Path(folder)
    model = build(Config.load(folder))
    files = shard_files(folder)
    shapes = {}
    for file in files:
        shapes.update(read_shapes(file))
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    tied = model.cfg.tie_word_embeddings
    if tied and "lm_head.weight" in shapes:  # some publish it all the same
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    wrong = misfits(expected, shapes)
    if wrong:
        raise UserError(f"{folder}: {wrong}")
    tensors = {}
    for file in files:
        with open_weights(file, device) as shard:
            for name in shapes.keys() & shard.keys():
                tensors[name] = shard.get_tensor(name).to(dtype)
    if tied:
        embeddings = tensors["model.embed_tokens.weight"]
        if not torch.equal(tensors.get("lm_head.weight", embeddings), embeddings):
            why = "config.json ties lm_head.weight to the embeddings, but it is another matrix"
            raise UserError(f"{folder}: {why}")
        tensors["lm_head.weight"] = embeddings
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    model.inv_freq = model.inv_freq.to(device)
    return model.requires_grad_(False).eval()
