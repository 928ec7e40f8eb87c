"""The backbone against `transformers` on checkpoints that transformers itself saved, and its
loader."""

import json
import os
import shutil

import pytest
import torch
from conftest import SHARED, run
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import model as backbone
from support.runs import UserError, resolve

pytestmark = pytest.mark.once

SIZES = dict(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.1,
    attn_implementation="eager",
)
LLAMA31 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
FORMS = {
    "llama-3": LlamaConfig(**SIZES, num_key_value_heads=2, rope_theta=500000.0, rms_norm_eps=1e-5),
    "llama-3.1": LlamaConfig(
        **SIZES, num_key_value_heads=2, rope_theta=500000.0, rope_scaling=LLAMA31
    ),
    "llama-3.2": LlamaConfig(
        **SIZES,
        num_key_value_heads=2,
        rope_theta=500000.0,
        rope_scaling=LLAMA31,
        tie_word_embeddings=True,
        head_dim=32,
    ),
    "llama-2": LlamaConfig(**SIZES, num_key_value_heads=4, rope_theta=10000.0),
    "qwen2.5": Qwen2Config(
        **SIZES, num_key_value_heads=2, rope_theta=1000000.0, tie_word_embeddings=False
    ),
    "qwen2.5-tied": Qwen2Config(
        **SIZES, num_key_value_heads=2, rope_theta=1000000.0, tie_word_embeddings=True
    ),
}


def peer(name, folder, **save):
    torch.manual_seed(0)
    config = FORMS[name]
    model = (Qwen2ForCausalLM if config.model_type == "qwen2" else LlamaForCausalLM)(config).eval()
    # biases and norms start at 0 and 1: make them count
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in parameter_name), std=0.2)
    model.save_pretrained(folder, **save)
    return model


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "100KB"}], ids=["single", "sharded"])
@pytest.mark.parametrize("name", FORMS)
def test_logits_equal_transformers(name, shards, tmp_path):
    theirs, ours = peer(name, tmp_path, **shards), backbone.load(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists() == bool(shards)
    torch.manual_seed(1)
    tokens = torch.randint(0, 300, (3, 150))
    with torch.no_grad():
        assert (ours.lm_head(ours(tokens)) - theirs(tokens).logits).abs().max() <= 1e-4
        # Rows of unequal length, padded on the right, against each row alone.
        for row, length in enumerate((150, 90, 7)):
            alone = theirs(tokens[row : row + 1, :length]).logits[0]
            padded = tokens.clone()
            padded[row, length:] = 0
            assert (ours.lm_head(ours(padded))[row, :length] - alone).abs().max() <= 1e-4


def test_cache_equals_whole_pass(tmp_path):
    """Prompts of unequal length, padded on the left and read in two pieces, then token by token."""
    peer("llama-3.1", tmp_path)
    lm = backbone.load(tmp_path)
    torch.manual_seed(1)
    tokens, lengths = torch.randint(0, 300, (3, 40)), [20, 11, 3]
    pads = torch.tensor([20 - length for length in lengths])
    padded = torch.zeros(3, 40, dtype=torch.long)
    for row, pad in enumerate(pads):
        padded[row, pad:] = tokens[row, : 40 - pad]
    with torch.no_grad():
        whole = lm(tokens)
        cache = backbone.KVCache(lm.cfg, 3, 40, "cpu", torch.float32)
        pieces = [(0, 18), (18, 20), *((slot, slot + 1) for slot in range(20, 40))]
        hidden = torch.cat([lm(padded[:, a:b], None, cache, pads) for a, b in pieces], dim=1)
    assert cache.length == 40 and hidden.isfinite().all()
    for row, pad in enumerate(pads):
        assert torch.allclose(hidden[row, pad:], whole[row, : 40 - pad], atol=1e-5)


def test_cache_without_pads(lm):
    """Rows of one length, token by token, with the default of `pads`."""
    torch.manual_seed(2)
    tokens = torch.randint(0, lm.cfg.vocab_size, (2, 9))
    cache = backbone.KVCache(lm.cfg, 2, 9, "cpu", torch.float32)
    with torch.no_grad():
        steps = torch.cat([lm(tokens[:, t : t + 1], cache=cache) for t in range(9)], dim=1)
        assert torch.allclose(steps, lm(tokens), atol=1e-5)


def test_meta_construction_takes_no_memory_and_keeps_rope_real(checkpoint):
    lm = backbone.build(backbone.Config.load(checkpoint))
    assert all(p.is_meta for p in lm.parameters()) and not lm.inv_freq.is_meta


@pytest.mark.parametrize("form", ["llama3", "llama2", "qwen2.5-3b", "llama3.2-3b"])
def test_names_of_published_checkpoints(form, shared):
    folder = shared / "tokenizers" / form
    published = set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"])
    assert {
        name for name, _ in backbone.build(backbone.Config.load(folder)).named_parameters()
    } == published


# the two backbones' published config.json, as far as shapes go, and their number of tensors
PAPER = {
    "llama3": (
        LlamaConfig,
        LlamaForCausalLM,
        291,
        dict(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            rope_theta=500000.0,
            rms_norm_eps=1e-5,
            max_position_embeddings=8192,
            tie_word_embeddings=False,
        ),
    ),
    "qwen2.5": (
        Qwen2Config,
        Qwen2ForCausalLM,
        339,
        dict(
            vocab_size=152064,
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            rope_theta=1000000.0,
            rms_norm_eps=1e-6,
            max_position_embeddings=32768,
            tie_word_embeddings=False,
        ),
    ),
}


@pytest.mark.parametrize("form", PAPER)
def test_full_size_backbones_have_the_tensors_of_transformers(form, tmp_path):
    """Llama-3-8B and Qwen2.5-7B on the meta device: every name and shape."""
    make_config, make_model, count, shapes = PAPER[form]
    make_config(**shapes).save_pretrained(tmp_path)
    with torch.device("meta"):
        theirs = {
            name: tuple(t.shape)
            for name, t in make_model(make_config(**shapes)).state_dict().items()
        }
    ours = {
        name: tuple(t.shape)
        for name, t in backbone.build(backbone.Config.load(tmp_path)).state_dict().items()
    }
    assert ours == theirs and len(ours) == count
    published = SHARED / "tokenizers" / form / "config.json"
    if published.exists():
        real = json.loads(published.read_text())
        assert {k: real[k] for k in shapes} == shapes


LOAD = """
import re, sys, torch, model
status = lambda: open("/proc/self/status").read()
read = lambda key: int(re.search(key + r":\\s+(\\d+)", status()).group(1)) * 1024
# what torch imports on its first use is not the loader's
model.build(model.Config.load(sys.argv[1]))
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
before = read("VmRSS")
lm = model.load(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
for p in lm.parameters():
    p.max()  # a checkpoint in its own precision is mapped from its file; every page is to count
print(read("VmHWM") - before, sum(p.numel() * p.element_size() for p in lm.parameters()))
"""


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK),
    reason="the peak of a process can only be reset on Linux",
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_takes_the_model_and_one_shard(dtype, tmp_path):
    sizes = dict(
        vocab_size=8000,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=14,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path, max_shard_size="20MB")
    shards = [f.stat().st_size for f in tmp_path.glob("*.safetensors")]
    peak, weights = map(int, run("-c", LOAD, tmp_path, dtype).stdout.split())
    assert len(shards) > 8 and sum(shards) > 200e6
    # 12 MB: allocator, page tables
    assert weights <= peak <= weights + max(shards) + 12e6, (peak, weights, max(shards))


def broken(tmp_path, checkpoint, change):
    folder = tmp_path / "broken"
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    "change, says",
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            "model.layers.1.mlp.up_proj.weight is missing",
        ),
        (lambda t: t.update(surplus=torch.ones(1)), "surplus is not expected"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(5)}),
            "model.norm.weight is (5,), not (32,)",
        ),
    ],
)
def test_loading_is_strict(change, says, checkpoint, tmp_path):
    folder = broken(tmp_path, checkpoint, change)
    with pytest.raises(UserError) as error:
        backbone.load(folder)
    assert says in str(error.value)


def test_cut_off_file(checkpoint, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(checkpoint, folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        backbone.load(folder)


@pytest.mark.parametrize(
    "key, value",
    [
        ("model_type", "gpt2"),
        ("hidden_act", "gelu"),
        ("mlp_bias", True),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("rope_scaling", {"rope_type": "llama3", "factor": 4.0}),
    ],
)
def test_architectures_we_do_not_compute_are_refused(key, value, checkpoint, tmp_path):
    config = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(UserError, match=key):
        backbone.Config.load(tmp_path)


def test_fingerprint_tells_weights_apart_but_not_precisions(checkpoint, tmp_path):
    lm = backbone.load(checkpoint)
    assert lm.fingerprint() == backbone.load(checkpoint, dtype=torch.bfloat16).fingerprint()
    other = broken(tmp_path, checkpoint, lambda t: t["model.embed_tokens.weight"].add_(0.5))
    assert lm.fingerprint() != backbone.load(other).fingerprint()
    whole = lm.fingerprint()
    for name, p in lm.named_parameters():
        published, p.data = p.data, p.data + 0.5
        assert lm.fingerprint() != whole, name
        p.data = published
    assert lm.fingerprint() == whole


def test_a_hub_model_is_pinned_to_the_commit_it_was_got_at(monkeypatch, tmp_path, checkpoint):
    import huggingface_hub

    asked = []
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)

    def download(name, **kwargs):
        asked.append((name, kwargs["revision"]))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("a/b") == (snapshot, "a/b@0123abc")
    assert resolve("a/b@0123abc") == (snapshot, "a/b@0123abc")
    assert resolve("a/b@refs/pr/3")[0] == snapshot
    assert asked == [("a/b", None), ("a/b", "0123abc"), ("a/b", "refs/pr/3")]
    assert resolve(str(checkpoint)) == (checkpoint, str(checkpoint.resolve()))


def test_unknown_folder_and_unreachable_hub(monkeypatch):
    with pytest.raises(UserError, match="no such folder"):
        resolve("./nowhere")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="hub did not give it"):
        resolve("nobody/nothing-at-all")
