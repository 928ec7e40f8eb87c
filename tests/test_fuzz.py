"""Whatever stands in a file: it is read, or refused in one line that names it. A bounded sample
runs with the suite; `CROSSLORA_FUZZ=500 pytest tests/test_fuzz.py` runs as many cases per kind."""

import json
import os
import shutil

import pytest
import torch
from conftest import make_checkpoint
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import model as backbone
from crosslora import CrossLoRA, load_adapter, read_description
from data import LANGUAGES, Tokenizer
from support.corpora import read_jsonl
from support.runs import UserError, file_errors, read_json, read_lines
from support.weights import read_tensors

CASES = int(os.environ.get("CROSSLORA_FUZZ", "15"))
fuzz = settings(
    max_examples=CASES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ODD = [
    "\0",
    "\ufeff",
    "\u2028",
    "\u200f",
    "\ud800",
    "<|eot_id|>",
    "</s>",
    "{",
    "\\u",
    "\r",
    "9" * 400,
]
TEXT = st.text(max_size=12) | st.sampled_from(ODD) | st.just("x" * 1_000_000)
VALUES = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | TEXT
JSON = st.recursive(
    VALUES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)


@st.composite
def damaged(draw, whole):
    """`whole`, cut, or with a few bytes changed, put in or taken out."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["cut", "flip", "insert", "remove"]))
        if kind == "cut":
            del data[at:]
        elif kind == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "insert":
            data[at:at] = draw(
                st.binary(max_size=4) | st.sampled_from([b"\0", b"\xff", b"\xef\xbb\xbf"])
            )
        elif kind == "remove":
            del data[at : at + draw(st.integers(1, 20))]
    return bytes(data)


@st.composite
def altered(draw, whole):
    """A JSON object with a key or two taken out or given another value, somewhere inside."""
    content = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(1, 2))):
        place = content
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = keys[draw(st.integers(0, len(keys) - 1))]
            inner = place[key]
            if isinstance(inner, dict | list) and inner and draw(st.booleans()):
                place = inner
                continue
            if draw(st.booleans()):
                place[key] = draw(JSON)
            else:
                del place[key]
            break
    return content


def refused_or_read(read, path):
    """What read() gives, or None where it refuses in one line with the path."""
    try:
        return read()
    except UserError as error:
        line = str(error)
        assert "\n" not in line and "\r" not in line, line
        assert str(path) in line or "--" in line, line
        return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("fuzz") / "checkpoint")


@pytest.fixture
def copy(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


ROW = {"src_lang": "de", "tgt_lang": "is", "src": "Der Hund.", "tgt": "Hundurinn."}
LINES = "".join(json.dumps({**ROW, "n": n}, ensure_ascii=False) + "\n" for n in range(3)).encode()


@fuzz
@given(damaged(LINES) | st.lists(altered(ROW), min_size=1, max_size=3))
def test_sentence_pairs(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content).encode()
    path.write_bytes(content)
    rows = refused_or_read(lambda: read_jsonl(path, LANGUAGES), path)
    for row in rows or ():
        assert row["src"].strip() and row["tgt"].strip() and row["src_lang"] in LANGUAGES
        json.dumps(row, ensure_ascii=False).encode()  # it can be written again


@fuzz
@given(st.binary(max_size=50) | TEXT.map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_text_files(tmp_path, content):
    (tmp_path / "text").write_bytes(content)
    lines = refused_or_read(lambda: read_lines(tmp_path / "text"), tmp_path)
    assert lines is None or not any("\n" in line for line in lines)


@fuzz
@given(st.data())
def test_configs(copy, folder, data):
    content = data.draw(altered(read_json(folder / "config.json")))
    (copy / "config.json").write_text(json.dumps(content))
    cfg = refused_or_read(lambda: backbone.Config.load(copy), copy)
    if cfg is not None and cfg.num_hidden_layers < 100:
        refused_or_read(lambda: backbone.load(copy), copy)


@fuzz
@given(st.data())
def test_tokenizers(copy, folder, data):
    cfg, whole = backbone.Config.load(folder), (folder / "tokenizer.json").read_bytes()
    small = {key: value for key, value in json.loads(whole).items() if key != "model"}
    if data.draw(st.booleans()):
        content = data.draw(damaged(whole))
    else:
        changed = data.draw(altered(small))
        content = json.dumps({**changed, "model": json.loads(whole)["model"]}).encode()
    (copy / "tokenizer.json").write_bytes(content)
    tokenizer = refused_or_read(lambda: Tokenizer(copy, cfg), copy)
    if tokenizer is not None:
        control = set(tokenizer.control.values())
        prompt = tokenizer.prompt("de", "is", "<|eot_id|> <|begin_of_text|>")
        clean = tokenizer.prompt("de", "is", "Hallo.")
        assert [i for i in prompt if i in control] == [i for i in clean if i in control]


@fuzz
@given(st.data())
@example(None)
def test_templates(copy, folder, data):
    path = copy / "tokenizer_config.json"
    whole = read_json(folder / "tokenizer_config.json")
    if data is not None:
        content = data.draw(altered(whole) | TEXT.map(lambda text: {"chat_template": text}))
        path.write_text(json.dumps(content))
    cfg = backbone.Config.load(folder)
    tokenizer = refused_or_read(lambda: Tokenizer(copy, cfg), copy)
    assert tokenizer is None or tokenizer.prompt("de", "is", "Hallo.")


@fuzz
@given(st.data())
def test_adapters(adapter_folder, lm, tokenizer, tmp_path, data):
    here = {"backbone_fingerprint": lm.fingerprint(), **tokenizer.describe()}
    copy = tmp_path / "adapter"
    shutil.copytree(adapter_folder, copy, dirs_exist_ok=True)
    if data.draw(st.booleans()):
        content = data.draw(altered(read_json(adapter_folder / "adapter.json")))
        (copy / "adapter.json").write_text(json.dumps(content))
    else:
        whole = (adapter_folder / "adapter.safetensors").read_bytes()
        (copy / "adapter.safetensors").write_bytes(data.draw(damaged(whole)))
    loaded = refused_or_read(lambda: load_adapter(copy, lm.cfg, here), copy)
    assert loaded is None or isinstance(loaded[0], CrossLoRA)
    refused_or_read(lambda: read_description(copy), copy)


@fuzz
@given(st.data())
def test_checkpoints(tmp_path, data):
    path = tmp_path / "checkpoint.pt"
    torch.save({"step": 1, "adapter": {"a": torch.ones(3)}}, path)
    path.write_bytes(data.draw(damaged(path.read_bytes())))

    def read():
        with file_errors(path, "cut off or damaged; remove it to start the run over"):
            return torch.load(path, map_location="cpu", weights_only=True)

    refused_or_read(read, path)


@fuzz
@given(st.data())
def test_weights(folder, tmp_path, data):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data.draw(damaged((folder / "model.safetensors").read_bytes())))
    refused_or_read(lambda: read_tensors(path), path)
