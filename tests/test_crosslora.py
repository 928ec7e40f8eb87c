"""Invariants 1, 2 and 4: the start is the backbone, a row is a plain LoRA of its two experts, the
others are frozen."""

import copy
import json
import shutil

import pytest
import torch
from conftest import ROOT, made_for, make_checkpoint, randomise, refuses
from safetensors.torch import load_file, save_file

import model as backbone
from crosslora import TARGET_MODULES, CrossLoRA, load_adapter, save_adapter
from data import LANGUAGES, Tokenizer
from support.export import export_peft
from support.runs import UserError

pytestmark = pytest.mark.once

SRC, TGT = ["de", "en", "zh", "de"], ["zh", "is", "en", "is"]


@pytest.fixture
def adapter(lm):
    return randomise(CrossLoRA(lm.cfg, list(LANGUAGES), rank=4, alpha=8, dropout=0.1))


@pytest.fixture
def tokens(lm):
    torch.manual_seed(5)
    return torch.randint(0, lm.cfg.vocab_size, (4, 12))


def test_fresh_adapter_is_the_backbone_bit_for_bit(lm, tokens):
    fresh = CrossLoRA(lm.cfg, list(LANGUAGES))
    with torch.no_grad():
        assert torch.equal(
            lm.lm_head(lm(tokens, fresh(SRC, TGT, dropout=True))), lm.lm_head(lm(tokens))
        )


def merged(lm, adapter, src_lang, tgt_lang):
    """Naive oracle: the backbone's own weights plus alpha / r * B_tgt A_src (eqs. 1 and 4), no
    adapter code."""
    lm = copy.deepcopy(lm)
    for layer, banks in zip(lm.model.layers, adapter.layers):
        for name in TARGET_MODULES:
            update = (
                banks[name].lora_B[tgt_lang]
                @ banks[name].lora_A[src_lang]
                * adapter.alpha
                / adapter.rank
            )
            weight = getattr(layer.mlp, name).weight
            weight.data.copy_(weight + update)
    return lm


def test_each_row_of_a_mixed_batch_is_its_own_merged_model(lm, adapter, tokens):
    with torch.no_grad():
        mixed = lm(tokens, adapter(SRC, TGT))
        for row, (s, t) in enumerate(zip(SRC, TGT)):
            alone = merged(lm, adapter, s, t)(tokens[row : row + 1])[0]
            assert torch.allclose(mixed[row], alone, atol=1e-4), (s, t)
        swapped = merged(lm, adapter, TGT[0], SRC[0])(tokens[:1])[0]
        # A is the source's and B the target's, not the reverse
        assert not torch.allclose(mixed[0], swapped, atol=1e-2)


def test_gradients_equal_a_loop_over_rows(lm, adapter, tokens):
    lm(tokens, adapter(SRC, TGT)).pow(2).sum().backward()
    got = {name: p.grad.clone() for name, p in adapter.named_parameters() if p.grad is not None}
    adapter.zero_grad(set_to_none=True)
    for row in range(4):
        lm(tokens[row : row + 1], adapter(SRC[row : row + 1], TGT[row : row + 1])).pow(
            2
        ).sum().backward()
    expected = {name: p.grad for name, p in adapter.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys()
    for name in got:
        assert torch.allclose(got[name], expected[name], rtol=1e-4, atol=1e-3), name


def test_unused_experts_come_out_of_a_step_as_they_went_in(lm, adapter, tokens):
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1, weight_decay=0.5, fused=True)

    def step(src, tgt):
        optimizer.zero_grad(set_to_none=True)
        lm(tokens, adapter(src, tgt)).pow(2).sum().backward()
        optimizer.step()

    everyone = list(LANGUAGES)
    for start in (0, 2):  # first every expert takes part, so that all have moments
        step((everyone * 2)[start : start + 4], (everyone * 2)[start + 1 : start + 5])
    before = {n: p.detach().clone() for n, p in adapter.named_parameters()}
    moments = {
        n: {k: v.clone() for k, v in optimizer.state[p].items()}
        for n, p in adapter.named_parameters()
    }
    step(["de"] * 4, ["zh", "en", "zh", "en"])
    for name, p in adapter.named_parameters():
        side, expert = name.split(".")[-2:]
        used = expert == "de" if side == "lora_A" else expert in ("zh", "en")
        assert torch.equal(p, before[name]) != used, name
        assert (
            all(torch.equal(v, moments[name][k]) for k, v in optimizer.state[p].items()) != used
        ), name


def test_dropout_follows_its_argument(lm, adapter, tokens):
    with torch.no_grad():
        assert torch.equal(lm(tokens, adapter(SRC, TGT)), lm(tokens, adapter(SRC, TGT)))
        assert not torch.equal(
            lm(tokens, adapter(SRC, TGT, dropout=True)), lm(tokens, adapter(SRC, TGT, dropout=True))
        )


def test_parameter_count_of_the_paper():
    """Llama-3-8B: 6 experts, 169,869,312 parameters (computed from the shapes)."""
    cfg = backbone.Config(
        "llama", 128256, 4096, 14336, 32, 32, 8, 128, 1e-5, 5e5, None, False, 8192, None, ()
    )
    with torch.device("meta"):
        assert sum(p.numel() for p in CrossLoRA(cfg, list(LANGUAGES)).parameters()) == 169_869_312


def test_save_and_load(lm, tokenizer, adapter, tokens, tmp_path):
    here = made_for(lm, tokenizer, seed=7)
    save_adapter(adapter, tmp_path, here, 11)
    again, description = load_adapter(tmp_path, lm.cfg, here)
    assert (description["seed"], description["steps"]) == (7, 11)
    assert description["languages"] == list(LANGUAGES)
    assert description["prompt"].endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert torch.equal(lm(tokens, adapter(SRC, TGT)), lm(tokens, again(SRC, TGT)))


def test_loading_is_strict(lm, tokenizer, checkpoint, adapter_folder, tmp_path):
    here = made_for(lm, tokenizer)
    other = backbone.load(make_checkpoint(tmp_path / "other", seed=1))
    with pytest.raises(UserError, match="made for another backbone"):
        load_adapter(adapter_folder, other.cfg, made_for(other, tokenizer))
    with pytest.raises(UserError, match="another tokenizer"):
        load_adapter(adapter_folder, lm.cfg, {**here, "tokenizer_sha256": "another"})
    plain = Tokenizer(checkpoint, lm.cfg, "plain")
    with pytest.raises(UserError, match=r"trained with another prompt, .*eot_id.* here it would"):
        load_adapter(adapter_folder, lm.cfg, made_for(lm, plain))
    with pytest.raises(UserError, match="no adapter.json"):
        load_adapter(tmp_path, lm.cfg, here)
    changed = tmp_path / "changed"
    shutil.copytree(adapter_folder, changed)
    description = json.loads((changed / "adapter.json").read_text())
    (changed / "adapter.json").write_text(json.dumps({**description, "languages": ["en", "de"]}))
    with pytest.raises(UserError, match="lora_A.is is not expected"):
        load_adapter(changed, lm.cfg, here)
    (changed / "adapter.json").write_text(json.dumps({**description, "rank": 8}))
    with pytest.raises(UserError, match=r"is \(4, 32\), not \(8, 32\)"):
        load_adapter(changed, lm.cfg, here)


def test_peft_agrees_after_export(lm, tokenizer, checkpoint, adapter_folder, tokens, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from transformers import AutoModelForCausalLM

    adapter, _ = load_adapter(adapter_folder, lm.cfg, made_for(lm, tokenizer))
    export_peft(adapter_folder, "de", "zh", tmp_path)
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        ours = lm.lm_head(lm(tokens, adapter(["de"] * 4, ["zh"] * 4)))
        assert (theirs(tokens).logits - ours).abs().max() <= 1e-4
        assert (ours - lm.lm_head(lm(tokens))).abs().max() > 1e-2


def test_low_rank_update_is_eq_4(lm, adapter):
    x = torch.randn(2, 3, lm.cfg.hidden_size)
    update = adapter(["de", "cs"], ["zh", "en"])[1]["gate_proj"]
    bank = adapter.layers[1]["gate_proj"]
    for row, (s, t) in enumerate((("de", "zh"), ("cs", "en"))):
        for token in range(3):
            total = torch.zeros(lm.cfg.intermediate_size)
            for i in LANGUAGES:
                for j in LANGUAGES:
                    gate = float(i == s and j == t)  # eq. 5
                    total += gate * bank.lora_B[j] @ (bank.lora_A[i] @ x[row, token]) * 2
            assert torch.allclose(update(x)[row, token], total, atol=1e-5)


def test_export_command_refuses(adapter_folder, tmp_path):
    def export(adapter, src_lang, out):
        command = ROOT / "support/export.py", "--adapter", adapter, "--src", src_lang
        return *command, "--tgt", "de", "--out", out

    refuses(*export(adapter_folder, "xx", tmp_path), says="no expert for 'xx'")
    is_file = ROOT / "README.md/x"
    refuses(*export(adapter_folder, "en", is_file), says="README.md/x: Not a directory")
    refuses(*export(adapter_folder, "de", tmp_path), says="both de")
    refuses(*export(tmp_path, "en", tmp_path), says="no adapter.json")
    (tmp_path / "mine").write_text("")
    refuses(*export(adapter_folder, "en", tmp_path), says="choose another --out")


def test_an_adapter_that_lacks_an_expert_is_not_exported(adapter_folder, tmp_path):
    """peft would load what is there and run the backbone for the rest."""
    for lacks in ("layers.1.up_proj.lora_B.zh", "lora_A.de", "layers"):
        folder = tmp_path / lacks
        shutil.copytree(adapter_folder, folder)
        some = {
            name: x
            for name, x in load_file(folder / "adapter.safetensors").items()
            if lacks not in name
        }
        save_file(some or {"x": torch.ones(1)}, folder / "adapter.safetensors")
        with pytest.raises(
            UserError,
            match="lacks A's of de or B's of zh" if some else "holds x, which is no expert",
        ):
            export_peft(folder, "de", "zh", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_export_of_a_hub_backbone_names_repository_and_commit(adapter_folder, tmp_path):
    """peft takes the two apart; a local folder has no revision."""
    hub = tmp_path / "hub"
    shutil.copytree(adapter_folder, hub)
    description = json.loads((hub / "adapter.json").read_text())
    (hub / "adapter.json").write_text(json.dumps({**description, "backbone": "owner/name@0123abc"}))
    for folder, expected in (
        (hub, ("owner/name", "0123abc")),
        (adapter_folder, (description["backbone"], None)),
    ):
        out = tmp_path / f"out-{expected[1]}"
        export_peft(folder, "de", "zh", out)
        config = json.loads((out / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == expected
