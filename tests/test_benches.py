"""The benches run, and their peers compute what ours does."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

from data import Example
from fast.kernels import head_loss
from support.runs import read_json


@pytest.mark.parametrize("tuned", [False, True])
def test_the_training_peers_compute_eqs_7_to_9(tuned, monkeypatch):
    """On hidden states that differ between R-Drop's copies; in the bench's own comparison there is
    no dropout, and the KL is 0."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    from train_speed import peer_backward

    torch.manual_seed(0)
    rng, lengths, V, D = np.random.default_rng(0), (9, 6, 7, 12), 50, 8
    examples = [
        Example(rng.integers(0, V, n).astype(np.int32), n // 2, "de", "zh") for n in lengths
    ]
    # copies, rows, positions
    head, states = torch.randn(V, D), torch.randn(2, 4, max(lengths) - 1, D, requires_grad=True)
    order = sorted(range(4), key=lambda i: lengths[i]) if tuned else range(4)

    class Decoder:
        """transformers' model of a model, and peft's around it."""

        done = 0

        def __call__(self, input_ids, attention_mask, use_cache):
            rows = [order[i] for i in range(self.done, self.done + len(input_ids) // 2)]
            self.done += len(rows)
            hidden = states[:, rows, : input_ids.shape[1]].flatten(0, 1)
            assert (attention_mask.sum(1) == torch.tensor([lengths[i] - 1 for i in rows] * 2)).all()
            return SimpleNamespace(last_hidden_state=hidden, logits=hidden @ head.t())

    decoder = Decoder()
    if tuned:
        decoder.base_model = SimpleNamespace(
            model=SimpleNamespace(model=decoder, lm_head=lambda x: x @ head.t())
        )
    sums = peer_backward(decoder, examples, 3, tuned, 0.7, torch.device("cpu"), torch.float32)
    theirs, states.grad = states.grad, None
    at = [
        (i, t) for i, e in enumerate(examples) for t in range(e.prompt_length - 1, lengths[i] - 1)
    ]
    labels = torch.tensor([int(examples[i].ids[t + 1]) for i, t in at])
    hidden = torch.stack([states[:, i, t] for i, t in at])  # (N, 2, D)
    loss, nll, kl = head_loss(hidden, head, labels, 0.7)
    (loss / len(at)).backward()
    assert torch.allclose(sums, torch.stack((nll, kl)), rtol=1e-4) and kl > 10
    assert torch.allclose(theirs, states.grad, rtol=1e-3, atol=1e-6)


def bench(name, tmp_path, *flags):
    """A bench at its smallest size, on the toy world."""
    script = sys.executable, ROOT / "bench" / f"{name}.py", "--size", "XS", "--repeats", "2"
    where = "--shared", tmp_path, "--work", tmp_path, "--out", tmp_path / "x.json"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [*script, *where, *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == read_json(tmp_path / "x.json") and result["sentences"] == "toy world"
    assert (tmp_path / "XS-toy/model.safetensors").exists()
    return result


def test_training_agrees_with_its_peers_and_times_another_checkout(tmp_path):
    """Both sides are compared before anything is timed."""
    result = bench("train_speed", tmp_path, "--pairs", 6, "--against", ROOT)
    assert max(result["agreement"].values()) < 1e-4
    sides = {"ours", "plain", "usual", "tuned", "against"}
    assert set(result["peak_mib"]) == set(result["tokens_per_s"]) == sides
    assert result["ratio_usual"]["n"] == result["ratio_against"]["n"] == 2
    assert {"torch", "transformers", "peft", "commit", "date"} <= set(result["machine"])


def test_decoding_agrees_with_its_peers(tmp_path):
    small = ["--sentences", "12", "--trial", "4", "--peer-batches", "2,4", "--batch-size", "5"]
    result = bench("generate_speed", tmp_path, *small)
    settings = {f"batch {size}, {kind}" for size in (2, 4) for kind in ("merged", "unmerged")}
    assert result["ratio_sorted"]["n"] == result["ratio_plain"]["n"] == 2
    assert [set(tried) for tried in result["peer_seconds"].values()] == [settings] * 2
    assert "greedy outputs identical" in result["agreement"]


def test_cost_is_over_one_expert(tmp_path):
    result = bench("cost", tmp_path, *["--pairs", "4", "--sentences", "6", "--batch-size", "3"])
    for what, turns in (("training", 6), ("decoding", 2)):
        assert [ratio["n"] for ratio in result[what].values()] == [turns, turns]
