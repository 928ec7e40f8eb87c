"""What fast/ promises: the plain scripts' results, faster."""

import pytest
import torch
from conftest import ROOT, inside, make_checkpoint, randomise, refuses
from test_train import setup

import fast
import generate
import model as backbone
import train
from crosslora import ROUTES, CrossLoRA
from data import LANGUAGES, Tokenizer
from fast.attention import Rows
from fast.layers import Cache, hidden_states
from support.runs import UserError, write_json, write_jsonl
from support.translations import job_of


def adapter_of(lm, variant):
    settings = {"rank": 4, "alpha": 8, "dropout": 0.0, "variant": variant}
    return randomise(CrossLoRA(lm.cfg, list(LANGUAGES), **settings))


def loss_and_gradients(engine, lm, adapter, examples, alpha):
    losses = engine.forward_sums(lm, adapter, examples, alpha, True)
    grads = torch.autograd.grad(losses[0], list(adapter.parameters()), allow_unused=True)
    return torch.stack(losses).detach(), grads


@pytest.mark.parametrize("alpha", [0.1, 0])
@pytest.mark.parametrize("variant", ROUTES)
def test_same_loss_and_gradients(variant, alpha, checkpoint, sentences):
    """Within 1e-4, relative, in fp32 without dropout; no gradient for the same experts."""
    lm, _, examples = setup(checkpoint, sentences)
    adapter = adapter_of(lm, variant)
    loss, grads = loss_and_gradients(train, lm, adapter, examples[:9], alpha)
    fast.prepare(lm, adapter, training=True)
    faster, others = loss_and_gradients(fast, lm, adapter, examples[:9], alpha)
    assert torch.allclose(faster, loss, rtol=1e-4, atol=1e-4) and loss[1] > 1
    assert variant != "crosslora" or any(grad is None for grad in grads)
    for a, b in zip(grads, others, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).norm() <= 1e-4 * a.norm()


def test_one_layer_is_the_first_and_the_last_at_once(tmp_path, sentences):
    lm, _, examples = setup(make_checkpoint(tmp_path, num_hidden_layers=1), sentences)
    adapter = adapter_of(lm, "crosslora")
    loss, grads = loss_and_gradients(train, lm, adapter, examples[:7], 0.1)
    faster, others = loss_and_gradients(fast, lm, adapter, examples[:7], 0.1)
    assert torch.allclose(faster, loss, rtol=1e-4, atol=1e-4)
    for a, b in zip(grads, others):
        assert (a is None) == (b is None) and (a is None or (a - b).norm() <= 1e-4 * a.norm())


@pytest.mark.parametrize("variant", [*ROUTES, None])
def test_same_greedy_tokens(variant, checkpoint, sentences):
    """In mixed directions, with rows of unequal prompts and limits; None: the bare backbone."""
    lm = backbone.load(checkpoint)
    tokenizer, rows = Tokenizer(checkpoint, lm.cfg), []
    lm.model.embed_tokens.weight[tokenizer.stop_ids[0]] *= 3.0  # some sentences end early
    adapter = None if variant is None else adapter_of(lm, variant)
    for i, s in enumerate(sentences[:40]):
        prompt = tokenizer.prompt(s["src_lang"], s["tgt_lang"], s["src"])
        rows.append(generate.Row(i, prompt, s["src_lang"], s["tgt_lang"], 1 + (5 * i) % 23))
    plain = list(generate.decode(lm, adapter, rows, tokenizer.stop_ids, 16))
    fast.prepare(lm, adapter, training=False)
    faster = list(fast.decode(lm, adapter, rows, tokenizer.stop_ids, 16))
    assert sorted(faster) == sorted(plain) and [key for key, _, _ in plain] == list(range(40))
    assert {finish for _, _, finish in plain} == {"stop", "length"}


def test_the_plain_forward_pass_runs_on_a_model_prepared_for_training(lm):
    tokens = torch.randint(0, lm.cfg.vocab_size, (2, 9))
    adapter = adapter_of(lm, "crosslora")
    before = lm.lm_head(lm(tokens, adapter(["de", "en"], ["zh", "de"])))
    fast.prepare(lm, adapter, training=True)
    after = lm.lm_head(lm(tokens, adapter(["de", "en"], ["zh", "de"])))
    assert torch.allclose(before, after, rtol=1e-4, atol=1e-4)


def test_lora_where_fast_has_no_updates_is_refused(lm, monkeypatch):
    monkeypatch.setattr("fast.layers.TARGET_MODULES", ("gate_proj", "q_proj"))
    with pytest.raises(UserError, match="fast/ knows no LoRA on q_proj; pass --plain"):
        fast.prepare(lm, None, training=True)


@pytest.mark.parametrize("kind", ["llama3", "qwen2"])
def test_a_cache_filled_in_pieces_equals_the_plain_pass(kind, tmp_path):
    """Two of three prompts in two pieces, the second in other order than their places."""
    lm = backbone.load(
        make_checkpoint(tmp_path, model_type="qwen2" if kind == "qwen2" else "llama")
    )
    torch.manual_seed(1)
    tokens, lengths = torch.randint(0, 300, (3, 40)), torch.tensor([20, 11, 3])
    ends, cut = lengths.tolist(), [4, 1, 3]
    pieces = [([0, 0, 0], cut, [0, 1, 2]), (cut[:2][::-1], ends[:2][::-1], [1, 0])]
    with torch.no_grad():
        whole = lm(tokens)
        cache = Cache(lm.cfg, 3, 40, "cpu", torch.float32)
        for starts, stops, places in pieces:
            sizes = [b - a for a, b in zip(starts, stops)]
            rows = Rows.of(sizes, "cpu", starts, torch.tensor(places))
            spans = list(zip(places, starts, stops))
            part = torch.cat([tokens[place, a:b] for place, a, b in spans])[None]
            hidden = hidden_states(lm, part, None, rows, cache)
            wanted = torch.cat([whole[place, a:b] for place, a, b in spans])
            assert torch.allclose(hidden[0], wanted, atol=1e-4)
        for step in range(20):
            at = lengths + step
            rows = Rows([1] * 3, torch.arange(4, dtype=torch.int32), at[None])
            hidden = hidden_states(lm, tokens[torch.arange(3), at][None], None, rows, cache)
            assert torch.allclose(hidden[0], whole[torch.arange(3), at], atol=1e-4)


def test_wanted_positions_are_those_of_the_whole_pass(lm):
    """Values, and what their gradient does to every token before them; with a cache, what later
    tokens see too."""
    embeddings = lm.model.embed_tokens.weight.requires_grad_()
    torch.manual_seed(1)
    tokens, rows = torch.randint(0, 300, (1, 60)), Rows.of([20] * 3, "cpu")
    for wanted in ([19, 3, 27, 28, 40, 51], [19, 27, 40]):
        wanted = torch.tensor([wanted])
        weights = torch.randn(wanted.shape[1], lm.cfg.hidden_size)
        whole = hidden_states(lm, tokens, None, rows)[0, wanted[0]]
        part = hidden_states(lm, tokens, None, rows, wanted=wanted)[0]
        assert torch.allclose(part, whole, atol=1e-5)
        ours, theirs = (
            torch.autograd.grad((x * weights).sum(), embeddings)[0] for x in (part, whole)
        )
        assert torch.allclose(ours, theirs, atol=1e-4) and theirs.abs().max() > 0.1
    with torch.no_grad():
        caches = [Cache(lm.cfg, 3, 20, "cpu", torch.float32) for _ in range(2)]
        for start, end in ((0, 12), (12, 20)):  # the second time with more slots than tokens
            n = end - start
            part = tokens.view(3, 20)[:, start:end].reshape(1, -1)
            rows = Rows.of([n] * 3, "cpu", [start] * 3, torch.arange(3))
            wanted = torch.tensor([[n - 1, n + 2, 2 * n]])
            whole = hidden_states(lm, part, None, rows, caches[0])
            last = hidden_states(lm, part, None, rows, caches[1], wanted)
            assert torch.allclose(last, whole[:, wanted[0]], atol=1e-5)
        for one, other in zip(caches[0].k + caches[0].v, caches[1].k + caches[1].v):
            assert torch.equal(one, other)


def test_neither_kind_goes_on_with_what_the_other_began(adapter_folder, sentences, tmp_path):
    """A pivot and an evaluation are refused, a translation keeps parts of its own."""
    for name in ("test", "pivot.source"):
        write_jsonl(tmp_path / f"{name}.jsonl", sentences[:8])
    langs = ",".join(sorted({row["src_lang"] for row in sentences[:8]} | {"en"}))
    write_json(tmp_path / "config.json", {"languages": langs})
    pair = f"{sentences[0]['src_lang']}-{sentences[0]['tgt_lang']}"
    evaluate = "evaluate.py", "--test", tmp_path / "test.jsonl", "--directions", pair
    pivot = "pivot.py", "--data", tmp_path, "--pairs", 2, "--max-ratio", 50
    for script, *flags in (evaluate, pivot):
        where = "--adapter", adapter_folder, "--out", tmp_path / "out" / script
        command = ROOT / script, *where, *flags, "--max-new-tokens", 3
        inside(*command)
        refuses(*command, "--plain", says="engine was 'fast', now 'plain'")
    engines = []
    for kind in (None, fast):
        engines.append(generate.load_engine(None, adapter_folder, device="cpu", fast=kind))
    jobs = {job_of(engine, sentences[:8], 3) for engine in engines}
    assert len(jobs) == 2
