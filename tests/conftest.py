"""Shared fixtures: a small random backbone with a real tokenizer, made by the same code as the embedded default."""

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples/tiny")]

import random  # noqa: E402

import model as backbone  # noqa: E402
from crosslora import CrossLoRA, save_adapter  # noqa: E402
from data import LANGUAGES, Tokenizer  # noqa: E402
from files import write_jsonl  # noqa: E402
from generate import load_engine  # noqa: E402
from pretrain import config_of, random_model, train_tokenizer  # noqa: E402
from world import meanings, sentence  # noqa: E402

torch.set_num_threads(1)  # sums in one order, and no quarrel with the subprocesses
SHARED = ROOT.parent / "shared"


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
        rows.append({"src_lang": src_lang, "tgt_lang": tgt_lang, "src": sentence(meaning, src_lang), "tgt": sentence(meaning, tgt_lang)})
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
    (folder / "config.json").write_text(json.dumps({"languages": ",".join(LANGUAGES)}))
    (folder / "manifest.json").write_text("{}")
    pseudo = folder / "pseudo"
    pseudo.mkdir()
    write_jsonl(pseudo / "pseudo.train.jsonl", others[3:])
    write_jsonl(pseudo / "pseudo.dev.jsonl", others[:2])
    return folder


def make_checkpoint(folder, seed=0, **changes):
    """A random checkpoint folder; the wide initialisation makes logits differ enough for greedy decoding to wander."""
    stream = meanings(random.Random(0))
    tokenizer = train_tokenizer([sentence(next(stream), lang) for _ in range(300) for lang in LANGUAGES], 700)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {**config_of(tokenizer, 32, 2), "initializer_range": 0.3, **changes}
    torch.manual_seed(seed)
    backbone.save(random_model(config, folder), config, folder)
    return folder


def randomise(adapter, seed=1):
    """Give every A and B a value that depends on the seed alone, so that experts differ."""
    torch.manual_seed(seed)
    for name, parameter in adapter.named_parameters():
        # In the order of its rows, however it lies in memory.
        parameter.data.copy_((0.1 if "lora_B" in name else 0.2) * torch.randn(parameter.shape))
    return adapter


def update_alone(update, x, d_out):
    """What one of crosslora.CrossLoRA's updates adds to a projection to `d_out` features: that of zeros."""
    projection = backbone.Linear(x.shape[-1], d_out, bias=False).requires_grad_(False)
    torch.nn.init.zeros_(projection.weight)
    return update(projection, x)


class CalledAnew:
    """In place of devices.Recorded: inputs and output in the same memory every time, as there, but the function is called."""

    made = 0

    def __init__(self, before, function, *inputs):
        type(self).made += 1
        self.function, self.inputs = function, [x.clone() for x in inputs]
        self.first = self.output = function(*self.inputs).clone()

    def __call__(self, *inputs):
        for mine, new in zip(self.inputs, inputs, strict=True):
            assert mine.shape == new.shape
            mine.copy_(new)
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


@pytest.fixture(scope="session")
def adapter_folder(checkpoint, tmp_path_factory):
    """A saved adapter whose experts all differ."""
    lm = backbone.load(checkpoint)
    tokenizer = Tokenizer(checkpoint, lm.cfg)
    adapter = randomise(CrossLoRA(lm.cfg, list(LANGUAGES), rank=4, alpha=8, dropout=0.1))
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(adapter, adapter.describe(checkpoint, lm.fingerprint(), tokenizer.format, tokenizer.sha256, 0, 1), folder)
    return folder


def translate_batch(engine, rows, max_new_tokens):
    """[(text, "stop" | "length"), ...] of `rows`, all decoded together; see Engine.translate_each."""
    done = {i: (text, finish) for i, text, finish in engine.translate_each(rows, max_new_tokens, max(1, len(rows)))}
    return [done[i] for i in range(len(rows))]


@pytest.fixture
def engine(adapter_folder):
    return load_engine(None, adapter_folder, device="cpu")


@pytest.fixture(scope="session")
def comet_folder(tmp_path_factory):
    """A COMET checkpoint as unbabel-comet publishes them, around a tiny random XLM-R and its tokenizer."""
    comet_models = pytest.importorskip("comet.models")
    import sentencepiece
    import yaml
    from transformers import XLMRobertaConfig, XLMRobertaModel, XLMRobertaTokenizer

    folder, stream = tmp_path_factory.mktemp("comet"), meanings(random.Random(0))
    (folder / "text").write_text("\n".join([sentence(next(stream), lang) for _ in range(50) for lang in LANGUAGES]), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(input=str(folder / "text"), model_prefix=str(folder / "sp"), vocab_size=300,
                                             hard_vocab_limit=False, minloglevel=2)
    tokenizer = XLMRobertaTokenizer(vocab_file=str(folder / "sp.model"))
    tokenizer.save_pretrained(folder / "encoder")
    torch.manual_seed(0)
    XLMRobertaModel(XLMRobertaConfig(vocab_size=len(tokenizer) + 5, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                     intermediate_size=32, max_position_embeddings=514)).save_pretrained(folder / "encoder")
    metric = comet_models.RegressionMetric(encoder_model="XLM-RoBERTa", pretrained_model=str(folder / "encoder"), layer="mix",
                                           hidden_sizes=[8])
    (folder / "model/checkpoints").mkdir(parents=True)
    state = {"state_dict": metric.state_dict(), "hyper_parameters": dict(metric.hparams), "pytorch-lightning_version": "2.0.0"}
    torch.save(state, folder / "model/checkpoints/model.ckpt")
    (folder / "model/hparams.yaml").write_text(yaml.dump({**dict(metric.hparams), "class_identifier": "regression_metric"}))
    return folder / "model"


def run(*command, check=True, env_add=(), **kwargs):
    """A shipped command as a user types it, from the project's root, on one thread."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1", **dict(env_add)}
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, **kwargs)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def inside(*command):
    """A script run as __main__ inside this process, which spares starting Python and importing torch each time.
    Returns what it printed."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", list(map(str, command)))
        runpy.run_path(str(command[0]), run_name="__main__")
    return printed.getvalue()


def refuses(*command, says):
    """The command ends with exit status 2 and one line on stderr that contains each of `says`."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as stop:
        inside(*command)
    assert stop.value.code == 2, (stop.value.code, errors.getvalue())
    lines = errors.getvalue().strip().splitlines()
    assert len(lines) == 1, lines
    for part in says if isinstance(says, (list, tuple)) else [says]:
        assert str(part) in lines[0], lines[0]


def read_rows(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]
