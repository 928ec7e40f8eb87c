"""Shared fixtures: a small random backbone with a real tokenizer, made by the same code as the
embedded default."""

import contextlib
import io
import json
import os
import random
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples"), str(ROOT / "examples/tiny")]

from pretrain import config_of, random_model, save_tokenizer, train_tokenizer
from world import meanings, sentence

import model as backbone
from crosslora import CrossLoRA, save_adapter
from data import LANGUAGES, Tokenizer
from generate import load_engine
from support.export import save_backbone
from support.runs import Ranks, load_fast, write_json, write_jsonl

torch.set_num_threads(1)  # sums in one order, and no quarrel with the subprocesses
# The real tokenizers and text beside the checkout, or beside one in which this copy lies.
SHARED = next(
    (p / "shared" for p in ROOT.parents if (p / "shared/tokenizers").is_dir()), ROOT / "-"
)
FAST = load_fast(not (ROOT / "fast").is_dir(), Ranks(0, 1))  # None where the folder is absent
NO_FAST = "no fast/ in this checkout: running the plain scripts"
collect_ignore_glob = [] if FAST else ["test_fast_*", "test_gpu.py", "test_benches.py"]


# A minute and more each. They begin first, or one of pytest's processes would wait for the other.
SLOWEST = ("test_the_defaults_chain", "test_real_text_through", "test_kill_and_resume_command")
SLOWEST += ("test_decoding_agrees", "test_training_agrees", "test_evaluate_command")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.name.startswith(SLOWEST))


@pytest.fixture(scope="session")
def shared():
    """The folder with real tokenizers and text, where there is one."""
    if not (SHARED / "tokenizers").is_dir():
        pytest.skip("no ../shared with real tokenizers and text beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def sentences():
    """Rows of mixed directions and lengths, toy sentences."""
    stream, rng, rows = meanings(random.Random(3)), random.Random(4), []
    for _ in range(64):
        meaning, (src_lang, tgt_lang) = next(stream), rng.sample(list(LANGUAGES), 2)
        rows.append(
            {
                "src_lang": src_lang,
                "tgt_lang": tgt_lang,
                "src": sentence(meaning, src_lang),
                "tgt": sentence(meaning, tgt_lang),
            }
        )
    return rows


@pytest.fixture(scope="session")
def data(sentences, tmp_path_factory):
    """A prepared data folder and a pseudo folder, as data.py and pivot.py leave them."""
    folder = tmp_path_factory.mktemp("data")
    english = [s for s in sentences if "en" in (s["src_lang"], s["tgt_lang"])]
    others = [s for s in sentences if "en" not in (s["src_lang"], s["tgt_lang"])]
    write_jsonl(folder / "stage1.train.jsonl", english)
    write_jsonl(folder / "stage1.dev.jsonl", english[:4])
    write_jsonl(folder / "stage2.flores.jsonl", others[:3])
    write_json(folder / "config.json", {"languages": ",".join(LANGUAGES)})
    (folder / "manifest.json").write_text("{}")
    pseudo = folder / "pseudo"
    pseudo.mkdir()
    write_jsonl(pseudo / "pseudo.train.jsonl", others[3:])
    write_jsonl(pseudo / "pseudo.dev.jsonl", others[:2])
    return folder


def make_checkpoint(folder, seed=0, **changes):
    """A random checkpoint folder; the wide initialisation makes logits differ enough for greedy
    decoding to wander."""
    stream = meanings(random.Random(0))
    tokenizer = train_tokenizer(
        [sentence(next(stream), lang) for _ in range(300) for lang in LANGUAGES], 700
    )
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, folder)
    config = {**config_of(tokenizer, 32, 2), "initializer_range": 0.3, **changes}
    torch.manual_seed(seed)
    save_backbone(random_model(config, folder), config, folder)
    return folder


def randomise(adapter, seed=1):
    """Give every A and B a value that depends on the seed alone, so that experts differ."""
    torch.manual_seed(seed)
    for name, parameter in adapter.named_parameters():
        # In the order of its rows, however it lies in memory.
        parameter.data.copy_((0.1 if "lora_B" in name else 0.2) * torch.randn(parameter.shape))
    return adapter


def made_for(lm, tokenizer, backbone_name="somewhere", seed=0):
    """What save_adapter and load_adapter are told of a backbone and its prompt."""
    here = {"backbone": str(backbone_name), "backbone_fingerprint": lm.fingerprint()}
    return {**here, **tokenizer.describe(), "seed": seed}


class CalledAnew:
    """In place of fast.decoding.Recorded: inputs and output in the same memory every time, as
    there, but the function is called."""

    made = 0

    def __init__(self, before, function, *inputs):
        type(self).made += 1
        self.function, self.inputs = function, [x.clone() for x in inputs]
        self.first = self.output = function(*self.inputs).clone()

    def __call__(self, *inputs):
        for own, new in zip(self.inputs, inputs, strict=True):
            assert own.shape == new.shape
            own.copy_(new)
        return self.output.copy_(self.function(*self.inputs))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def lm(checkpoint):
    return backbone.load(checkpoint)


@pytest.fixture
def tokenizer(checkpoint, lm):
    return Tokenizer(checkpoint, lm.cfg)


def make_adapter(checkpoint, folder):
    """A saved adapter whose experts all differ."""
    lm = backbone.load(checkpoint)
    adapter = randomise(CrossLoRA(lm.cfg, list(LANGUAGES), rank=4, alpha=8, dropout=0.1))
    tokenizer = Tokenizer(checkpoint, lm.cfg)
    save_adapter(adapter, folder, made_for(lm, tokenizer, checkpoint), 1)
    return folder


@pytest.fixture(scope="session")
def adapter_folder(checkpoint, tmp_path_factory):
    return make_adapter(checkpoint, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="session")
def eager_folder(tmp_path_factory):
    """An adapter for a backbone that stops: random weights hardly ever say so, but a longer row of
    that token makes some sentences end early."""
    folder = make_checkpoint(tmp_path_factory.mktemp("eager"))
    lm = backbone.load(folder)
    lm.model.embed_tokens.weight[Tokenizer(folder, lm.cfg).stop_ids[0]] *= 3.0
    save_backbone(lm, json.loads((folder / "config.json").read_text()), folder)
    return make_adapter(folder, tmp_path_factory.mktemp("eager-adapter"))


def translate_batch(engine, rows, max_new_tokens):
    """[(text, "stop" or "length"), ...] of `rows`, all decoded together."""
    each = engine.translate_each(rows, max_new_tokens, max(1, len(rows)))
    done = {i: (text, finish) for i, text, finish in each}
    return [done[i] for i in range(len(rows))]


def naive(engine, row, max_new_tokens):
    """One sentence by a plain engine, no batch, no cache, no padding: the whole prefix again for
    every token."""
    ids = engine.tokenizer.prompt(row["src_lang"], row["tgt_lang"], row["src"])
    out = []
    with torch.no_grad():
        while len(out) < max_new_tokens:
            lora = engine.adapter([row["src_lang"]], [row["tgt_lang"]])
            hidden = engine.model(torch.tensor([ids + out]), lora)
            token = int(engine.model.lm_head(hidden)[0, -1].argmax())
            if token in engine.tokenizer.stop_ids:
                return engine.tokenizer.decode(out), "stop"
            out.append(token)
    return engine.tokenizer.decode(out), "length"


@pytest.fixture
def plain_engine(adapter_folder):
    return load_engine(None, adapter_folder, device="cpu")


@pytest.fixture(params=["plain", "fast"] if FAST else ["plain"])
def fast_or_none(request):
    """fast/, then None: for tests that hold for both."""
    return FAST if request.param == "fast" else None


@pytest.fixture
def engine(adapter_folder, fast_or_none):
    """Plain, then by fast/."""
    return load_engine(None, adapter_folder, device="cpu", fast=fast_or_none)


@pytest.fixture(scope="session")
def comet_folder(tmp_path_factory):
    """A COMET checkpoint as unbabel-comet publishes them, around a tiny random XLM-R and its
    tokenizer."""
    comet_models = pytest.importorskip("comet.models")
    import sentencepiece
    import yaml
    from transformers import XLMRobertaConfig, XLMRobertaModel, XLMRobertaTokenizer

    folder, stream = tmp_path_factory.mktemp("comet"), meanings(random.Random(0))
    (folder / "text").write_text(
        "\n".join([sentence(next(stream), lang) for _ in range(50) for lang in LANGUAGES]),
        encoding="utf-8",
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "sp"),
        vocab_size=300,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = XLMRobertaTokenizer(vocab_file=str(folder / "sp.model"))
    tokenizer.save_pretrained(folder / "encoder")
    torch.manual_seed(0)
    XLMRobertaModel(
        XLMRobertaConfig(
            vocab_size=len(tokenizer) + 5,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=514,
        )
    ).save_pretrained(folder / "encoder")
    metric = comet_models.RegressionMetric(
        encoder_model="XLM-RoBERTa",
        pretrained_model=str(folder / "encoder"),
        layer="mix",
        hidden_sizes=[8],
    )
    (folder / "model/checkpoints").mkdir(parents=True)
    state = {
        "state_dict": metric.state_dict(),
        "hyper_parameters": dict(metric.hparams),
        "pytorch-lightning_version": "2.0.0",
    }
    torch.save(state, folder / "model/checkpoints/model.ckpt")
    (folder / "model/hparams.yaml").write_text(
        yaml.dump({**dict(metric.hparams), "class_identifier": "regression_metric"})
    )
    return folder / "model"


def run(*command, check=True, env_add=(), cwd=ROOT, **kwargs):
    """A shipped command as a user types it, on one thread."""
    env = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
    env = {**os.environ, **env, **dict(env_add)}
    flags = [sys.executable, *map(str, command)]
    done = subprocess.run(
        flags, cwd=cwd, env=env, capture_output=True, text=True, timeout=600, **kwargs
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def start(*command, cwd=ROOT, **pipes):
    """A shipped command in the background, on one thread. pipes: stdout and stderr, not shown
    unless they are given."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **pipes}
    flags = [sys.executable, *map(str, command)]
    return subprocess.Popen(flags, cwd=cwd, env=env, text=True, **pipes)


def two_machines(*command, cwd=ROOT):
    """A command under two torchrun agents of one process each that meet through c10d, as on two
    machines that share their folders. Returns what each printed on stdout."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    agent = "-m torch.distributed.run --nnodes=2 --nproc_per_node=1 --rdzv_backend=c10d"
    where = f"--rdzv_endpoint=127.0.0.1:{port} --rdzv_id=tests --local_addr=127.0.0.1"
    flags = *agent.split(), *where.split(), *command
    agents = [start(*flags, cwd=cwd, stdout=subprocess.PIPE) for _ in range(2)]
    outputs = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    return outputs


def inside(*command):
    """A script run as __main__ inside this process, which spares starting Python and importing
    torch each time. Returns what it printed."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", list(map(str, command)))
        runpy.run_path(str(command[0]), run_name="__main__")
    return printed.getvalue()


def refuses(*command, says):
    """The command ends with exit status 2 and one line on stderr that contains each of `says`."""
    errors, status = io.StringIO(), 0
    with contextlib.redirect_stderr(errors):
        try:
            inside(*command)
        except SystemExit as stop:  # pytest.raises would keep its frames, and their locks, alive
            status = stop.code
    assert status == 2, (status, errors.getvalue())
    lines = [line for line in errors.getvalue().strip().splitlines() if line != NO_FAST]
    assert len(lines) == 1, lines
    for part in says if isinstance(says, (list, tuple)) else [says]:
        assert str(part) in lines[0], lines[0]


def read_rows(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]
