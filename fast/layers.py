"""model.CausalLM's forward pass for rows that stand one after another without pads, over a cache of
batch slots that are filled anew; and how weights are laid out for it.

T tokens of all rows, W of them wanted, n rows, D hidden, F feed-forward, V vocabulary, H query
heads, G key/value heads, K head dimension; a cache has places, one per row, of S slots.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosslora import TARGET_MODULES, CrossLoRA
from fast.attention import Rows, attention, cached_attention, seen
from fast.kernels import Packed, Shortlist, linear, packed, rms_norm, rotate, shortlist, swiglu
from model import Attention, CausalLM, Config
from support.runs import UserError

ADAPTED = {"gate_proj", "up_proj", "down_proj"}  # what the loop below has updates for


# --- weights, laid out once -----------------------------------------------------------------------


class PackedLinear(nn.Module):
    """An nn.Linear whose frozen weight may be kernels.Packed, for the plain forward pass, too."""

    def __init__(self, weight: Tensor | Packed, bias: Tensor | None):
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class JoinedAttention(nn.Module):
    """model.Attention with q_proj, k_proj and v_proj in one product, in which a GPU is less idle
    where tokens are few."""

    def __init__(self, plain: Attention):
        super().__init__()
        parts, bias = (plain.q_proj, plain.k_proj, plain.v_proj), None
        weight = torch.cat([part.weight for part in parts])  # (H*K + 2*G*K, D)
        if plain.q_proj.bias is not None:
            bias = torch.cat([part.bias for part in parts])
        self.qkv_proj = PackedLinear(packed(weight), bias)
        self.o_proj, self.head_dim = plain.o_proj, plain.head_dim


class ShortlistHead(nn.Module):
    """A head that finds its greatest logit by kernels.Shortlist."""

    def __init__(self, weight: Tensor, candidates: Shortlist):
        super().__init__()
        self.weight, self.candidates = weight, candidates

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def greedy(model: CausalLM, hidden: Tensor) -> Tensor:
    """The word with the greatest logit (n,) for each of hidden states (n, D)."""
    head = model.lm_head
    if isinstance(head, ShortlistHead):
        return head.candidates.argmax(hidden, head.weight)
    return head(hidden).argmax(1)


def prepare(model: CausalLM, adapter: CrossLoRA | None, training: bool) -> None:
    """Lay out all weights as this machine multiplies them fastest, once, in place.

    Projections are packed (kernels.packed): for decoding with q, k and v in one, for training with
    their transposes, in that much memory again. A tied head is packed beside the embeddings, which
    are looked up. In decoding a head with a shortlist stays as it lies, and experts are in the
    backbone's precision. Afterwards the model can't be saved or fingerprinted any more. Raises
    UserError for an adapter on projections that fast/ has no updates for.
    """
    if set(TARGET_MODULES) - ADAPTED:
        extra = ", ".join(sorted(set(TARGET_MODULES) - ADAPTED))
        raise UserError(
            f"fast/ knows no LoRA on {extra}; pass --plain, or add it to fast/layers.py"
        )
    candidates = None if training else shortlist(model.lm_head.weight)
    if candidates:
        model.lm_head = ShortlistHead(model.lm_head.weight, candidates)
    if not training:
        for layer in model.model.layers:
            layer.self_attn = JoinedAttention(layer.self_attn)
    pack_projections(model, training)
    if adapter is not None:
        lay_out_experts(adapter)
        if not training and not adapter.learned:  # a learned router stays fp32
            adapter.to(model.dtype)


def pack_projections(model: CausalLM, training: bool) -> None:
    """Put a PackedLinear in the place of every nn.Linear whose weight this machine packs."""
    packs = False
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            weight = None
            if isinstance(module, nn.Linear):
                weight = packed(module.weight, training)
            if isinstance(weight, Packed):
                setattr(parent, name, PackedLinear(weight, module.bias))
                packs = True
    if packs:  # what is left are views of the checkpoint's file, and would keep it in memory
        for p in model.parameters():
            p.data = p.data.clone()


def lay_out_experts(adapter: CrossLoRA) -> None:
    """B's lie in memory as their transposes, (R, D_out): products out of a rank take half the time,
    and gradients come so."""
    for layer in adapter.layers:
        for bank in layer.values():
            for B in bank.lora_B.values():
                B.data = B.data.t().contiguous().t()


# --- the cache ------------------------------------------------------------------------------------


class Cache:
    """Keys and values of rows, each at a place of its own of S slots: slot s holds the row's token
    at position s."""

    def __init__(
        self, cfg: Config, places: int, slots: int, device: torch.device, dtype: torch.dtype
    ):
        shape = (places, slots, cfg.num_key_value_heads, cfg.head_dim)
        self.k, self.v = [], []
        for _ in range(cfg.num_hidden_layers):
            self.k.append(torch.zeros(shape, device=device, dtype=dtype))
            self.v.append(torch.zeros(shape, device=device, dtype=dtype))

    def replace_each(self, function: Callable) -> None:
        """Replace every layer's keys and values x (places, S, G, K) by function(x), one at a time:
        all at once would be twice the cache."""
        for side in (self.k, self.v):
            for layer, x in enumerate(side):
                side[layer] = function(x)

    def reserve(self, slots: int) -> None:
        """Make room for at least `slots` slots, and some more, since rows grow by one."""
        more = slots + 63 - self.k[0].shape[1]
        if more >= 64:
            self.replace_each(lambda x: F.pad(x, (0, 0, 0, 0, 0, more)))

    def keep(self, places: int) -> None:
        """Give back all but the first `places` places."""
        self.replace_each(lambda x: x[:places])

    def where(self, rows: Rows, heads: int) -> tuple[Tensor, tuple | list]:
        """Of a pass over attention.Rows: each token's slot among those of all places (T,), and
        attention.seen for `heads` query heads."""
        places = rows.places  # (n,)
        if places is None:
            places = torch.arange(len(self.k[0]), device=rows.starts.device)
        begins = places * self.k[0].shape[1]
        total = rows.positions.numel()
        first = begins.repeat_interleave(rows.starts.diff(), output_size=total)  # (n,) -> (T,)
        return first + rows.positions[0], seen(rows, begins, self.k[0], heads)

    def update(self, layer: int, k: Tensor, v: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (1, G, T, K) at slots `at`; return all of the layer's, (places, S, G, K)."""
        for side, x in ((self.k, k), (self.v, v)):
            # (places, S, G, K) -> (places*S, G, K); (G, T, K) -> (T, G, K)
            every_slot = side[layer].view(-1, *side[layer].shape[2:])
            every_slot.index_copy_(0, at, x[0].transpose(0, 1))
        return self.k[layer], self.v[layer]

    def copy(self, source: Tensor, target: Tensor, slots: int | None = None) -> None:
        """The first `slots` slots, or all, of the places `target` become those of `source`, both
        (n,)."""
        for x in self.k + self.v:
            x[target, :slots] = x[source, :slots]  # (n, slots, G, K)


# --- the forward pass -----------------------------------------------------------------------------


def gather_positions(x: Tensor, index: Tensor | None) -> Tensor:
    """x (1, T, D) at the positions `index` (1, W): (1, W, D); all of x where that is None."""
    return x if index is None else x[0].index_select(0, index[0])[None]


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)  # (1, T, H*K) -> (1, H, T, K)


def queries_keys_values(
    attn: nn.Module, cfg: Config, x: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """q (1, H, T, K), k and v (1, G, T, K) of x (1, T, D), q and k turned by their positions."""
    heads, groups = cfg.num_attention_heads, cfg.num_key_value_heads
    if isinstance(attn, JoinedAttention):
        together = split_heads(attn.qkv_proj(x), cfg.head_dim)  # (1, H + 2G, T, K)
        qk, v = together.split([heads + groups, groups], dim=1)
        q, k = rotate(qk, cos, sin).split([heads, groups], dim=1)
        return q, k, v
    q = rotate(split_heads(attn.q_proj(x), cfg.head_dim), cos, sin)
    k = rotate(split_heads(attn.k_proj(x), cfg.head_dim), cos, sin)
    return q, k, split_heads(attn.v_proj(x), cfg.head_dim)


def mlp(module: nn.Module, x: Tensor, updates: dict | None) -> Tensor:
    """x (1, W, D) -> (1, W, D). updates: {projection: update of fast/experts.py} or None."""

    def project(name, x):
        projection = getattr(module, name)
        return projection(x) if updates is None else updates[name](projection, x)

    return project("down_proj", swiglu(project("gate_proj", x), project("up_proj", x)))


def hidden_states(model, tokens, lora, rows, cache=None, wanted=None) -> Tensor:
    """Hidden states of `tokens` (1, T) of `rows`: all, (1, T, D), or those at `wanted` (1, W),
    (1, W, D).

    lora: an iterable over layers of {projection: update of fast/experts.py}; None: no adapter.
    cache: a Cache with slots enough, which gets the tokens' keys and values; they see what it has
    of their rows.
    """
    cfg, layers = model.cfg, model.model.layers
    angles = rows.positions[..., None].float() * model.inv_freq  # (1, T, K/2)
    x = model.model.embed_tokens(tokens)  # (1, T, D)
    cos, sin = angles.cos().to(x.dtype)[:, None], angles.sin().to(x.dtype)[:, None]
    if cache is not None:
        at, slots = cache.where(rows, cfg.num_attention_heads)
    if lora is None:
        lora = [None] * len(layers)
    for i, (layer, updates) in enumerate(zip(layers, lora, strict=True)):
        norm, attn = layer.input_layernorm, layer.self_attn
        q, k, v = queries_keys_values(attn, cfg, rms_norm(x, norm.weight, norm.eps), cos, sin)
        if cache is None:
            y = attention(q, k, v, rows)  # (1, H, T, K)
        else:
            y = cached_attention(q, *cache.update(i, k, v, at), rows, slots)
        y = y.transpose(1, 2).flatten(2)  # (1, H, T, K) -> (1, T, H*K)
        # After the last attention no token needs another's states.
        index = wanted if layer is layers[-1] else None
        x = gather_positions(x, index) + attn.o_proj(gather_positions(y, index))
        norm = layer.post_attention_layernorm
        x = x + mlp(layer.mlp, rms_norm(x, norm.weight, norm.eps), updates)
    norm = model.model.norm
    return rms_norm(x, norm.weight, norm.eps)
