"""Whatever stands in a file: it is read, or refused in one line that names it. A bounded sample
runs with the suite; `CROSSLORA_FUZZ=500 pytest tests/test_fuzz.py` runs as many cases per kind."""

import contextlib
import functools
import gc
import io
import json
import os
import re
import shutil
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, inside, make_checkpoint
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_promises import help_of

import data as data_script
import evaluate
import generate
import model as backbone
import pivot
import train
from crosslora import CrossLoRA, load_adapter, read_description
from data import LANGUAGES, Tokenizer, prepare
from support.corpora import NOISE, read_jsonl
from support.runs import UserError, read_json, read_lines, run_main, write_json
from support.text import comparable, is_empty
from support.weights import open_weights, read_checkpoint, read_tensors, write_tensors

pytestmark = pytest.mark.once

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


COUNTS = {}  # test: [cases refused, cases read, seconds of the longest]; see bench/fuzz.py


@pytest.fixture(scope="module", autouse=True)
def counts_kept():
    """The counts of this run, where bench/fuzz.py asks for them."""
    yield
    if os.environ.get("CROSSLORA_FUZZ_COUNTS"):
        write_json(os.environ["CROSSLORA_FUZZ_COUNTS"], COUNTS)


def refused_or_read(read, path):
    """What read() gives, or None where it refuses in one line with the path or a flag. Any other
    error is the test's."""
    begin, found = time.monotonic(), None
    test = os.environ["PYTEST_CURRENT_TEST"].partition("::")[2].partition(" ")[0]
    count = COUNTS.setdefault(test.removeprefix("test_"), [0, 0, 0.0])
    try:
        found = read()
        count[1] += 1
    except UserError as error:
        line = str(error)
        assert "\n" not in line and "\r" not in line, line
        assert str(path) in line or "--" in line, line
        count[0] += 1
    seconds = time.monotonic() - begin
    count[2] = max(count[2], round(seconds, 1))
    assert seconds < 60
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("fuzz") / "checkpoint")


@pytest.fixture(scope="module")
def stage_1_data(data, tmp_path_factory):
    """A few pairs and no dev set."""
    folder = tmp_path_factory.mktemp("data") / "stage1"
    shutil.copytree(data, folder)
    rows = (data / "stage1.train.jsonl").read_text(encoding="utf-8").splitlines(True)
    (folder / "stage1.train.jsonl").write_text("".join(rows[:3]), encoding="utf-8")
    (folder / "stage1.dev.jsonl").write_text("")
    return folder


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
    fault = data.draw(st.sampled_from(["json", "weights", "absent"]))
    if fault == "absent":
        (copy / data.draw(st.sampled_from(["adapter.json", "adapter.safetensors"]))).unlink()
    elif fault == "json":
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
    state = {"step": 1, "adapter": {"a": torch.ones(300)}}
    torch.save(state, path)
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    read = refused_or_read(lambda: read_checkpoint(path), path)
    if read is not None:  # what was changed means nothing: a date, say
        assert read["step"] == 1 and torch.equal(read["adapter"]["a"], torch.ones(300))


@fuzz
@given(st.data())
def test_weights(folder, tmp_path, data):
    """A whole file, with the hash that adapters have: wrong numbers are never taken."""
    path = tmp_path / "some.safetensors"
    tensors = load_file(folder / "model.safetensors")
    write_tensors(path, tensors)
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    read = refused_or_read(lambda: read_tensors(path), path)
    if read is not None and "sha256" in open_weights(path).metadata():
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], tensors[name]) for name in read)


@fuzz
@given(st.data())
def test_shards(folder, tmp_path, data):
    """Two shards and their index: damaged, absent, of other types."""
    copy = tmp_path / "shards"
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    (copy / "model.safetensors").unlink(missing_ok=True)
    tensors = load_file(folder / "model.safetensors")
    names, where = sorted(tensors), {}
    for number, own in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in own}, copy / file)
        where.update(dict.fromkeys(own, file))
    index = copy / "model.safetensors.index.json"
    fault = data.draw(st.sampled_from(["none", "index", "absent", "damaged", "type", "shape"]))
    content = {"metadata": {}, "weight_map": where}
    if fault == "index":
        content = data.draw(altered(content))
    index.write_text(json.dumps(content))
    shard = copy / f"model-{data.draw(st.integers(0, 1))}.safetensors"
    some = load_file(shard)
    name = data.draw(st.sampled_from(sorted(some)))
    if fault == "absent":
        shard.unlink()
    elif fault == "damaged":
        shard.write_bytes(data.draw(damaged(shard.read_bytes())))
    elif fault == "type":
        types = [torch.int8, torch.bool, torch.float16, torch.float64, torch.complex64]
        save_file({**some, name: some[name].to(data.draw(st.sampled_from(types)))}, shard)
    elif fault == "shape":
        save_file({**some, name: some[name].flatten()[1:].clone()}, shard)
    read = refused_or_read(lambda: backbone.load(copy), copy)
    if fault in ("absent", "shape"):
        assert read is None
    if fault == "none":
        assert read is not None


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora") / "world"
    script = [ROOT / "examples/tiny/world.py", "--out", folder]
    inside(*script, "--train", 12, "--dev", 4, "--test", 3)
    return folder


def of_odd_lines(draw, data):
    """Lines of `data`, some of them replaced by odd ones, with other ends."""
    lines = data.decode().split("\n")
    for _ in range(draw(st.integers(1, 3))):
        odd = draw(TEXT.map(lambda text: text.replace("\ud800", "\ufffd")))
        lines[draw(st.integers(0, len(lines) - 1))] = odd
    return draw(st.sampled_from(["\n", "\r\n"])).join(lines).encode("utf-8", "replace")


@fuzz
@given(st.data())
def test_corpora(corpora, tmp_path, data):
    copy = tmp_path / "corpora"
    shutil.copytree(corpora, copy, dirs_exist_ok=True)
    files = sorted(path for path in copy.rglob("*.*") if "opus" in path.name or "dev" in path.name)
    file = data.draw(st.sampled_from(files))
    whole = file.read_bytes()
    odd = data.draw(st.booleans())
    file.write_bytes(of_odd_lines(data.draw, whole) if odd else data.draw(damaged(whole)))
    sizes = {"train_pairs": 5, "dev_pairs": 2, "test_pairs": 2, "pivot_pairs": 5}
    args = SimpleNamespace(**sizes, flores_test=False)
    args.flores_pairs, args.drop, args.max_ratio, args.seed = None, NOISE, 5.0, 0
    languages = list(LANGUAGES)
    found = refused_or_read(lambda: prepare(copy, languages, args), copy)
    if found is None:
        return
    rows = found[0]
    tested = {(row["tgt_lang"], comparable(row["tgt"])) for row in rows["test"]}
    for name, part in rows.items():
        for row in part:
            assert not is_empty(row["src"]) and not is_empty(row["tgt"]), (name, row)
            json.dumps(row, ensure_ascii=False).encode()
    for row in rows["stage1.train"]:
        assert (row["tgt_lang"], comparable(row["tgt"])) not in tested


SCRIPTS = {"data": data_script, "train": train, "pivot": pivot, "generate": generate}
SCRIPTS["evaluate"] = evaluate
ABSURD = ["0", "-1", "1e400", "nan", "-inf", "", " ", "x", "0x10", "1_000", "10" * 20, "\u0663"]
ABSURD += ["\0", "\n", "--", "-", "~", "../..", "de-de", "xx-yy", "x" * 100_000]


@functools.cache
def flags_of(script):
    """The flags that a script takes."""
    return sorted({*re.findall(r"--[a-z][\w-]+", help_of(f"{script}.py"))} - {"--help"})


@fuzz
@given(st.data())
def test_command_lines(tmp_path, data):
    """Flags alone: what can't be is refused before anything is read."""
    script = data.draw(st.sampled_from(sorted(SCRIPTS)))
    words = [script]
    for _ in range(data.draw(st.integers(0, 4))):
        words.append(data.draw(st.sampled_from(flags_of(script)) | st.sampled_from(ABSURD)))
        words.append(data.draw(st.sampled_from(ABSURD)))

    def read():
        errors = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(errors):
            patch.setattr(sys, "argv", words)
            try:
                return SCRIPTS[script].parse_args()
            except SystemExit as stop:
                assert stop.code == 2
                (line,) = errors.getvalue().splitlines()
                raise UserError(line) from None

    refused_or_read(read, tmp_path)


@fuzz
@given(st.data())
def test_training_with_absurd_flags(checkpoint, stage_1_data, tmp_path, data):
    """A flag or two that nobody means, through the whole of train.py."""
    out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
    where = ["--stage", "1", "--model", checkpoint, "--data", stage_1_data, "--out", out]
    words = ["train.py", *where, "--rank", "2", "--device", "cpu"]
    taken = ("--help", "--model", "--data", "--out", "--stage", "--max-steps", "--device")
    flags = [flag for flag in flags_of("train") if flag not in taken]
    for _ in range(data.draw(st.integers(1, 2))):
        words += [data.draw(st.sampled_from(flags)), data.draw(st.sampled_from(ABSURD))]
    words += ["--max-steps", "1"]

    def read():
        errors = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(errors):
            patch.setattr(sys, "argv", list(map(str, words)))
            with contextlib.redirect_stdout(io.StringIO()):
                try:
                    run_main(train.main)
                except SystemExit as stop:
                    assert stop.code == 2, words
                    lines = [x for x in errors.getvalue().splitlines() if "no fast/" not in x]
                    assert len(lines) == 1, lines
                    raise UserError(lines[0]) from None
        return True

    if refused_or_read(read, tmp_path):
        assert "--dry-run" in words or read_tensors(out / "adapter/adapter.safetensors")
    gc.collect()  # the folder's lock
