"""What the benches share: sizes, random weights that ours and the peer load, sentences, repeats, the report."""

import argparse
import contextlib
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import peft
import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples/tiny")]
import model as backbone  # noqa: E402
from crosslora import TARGET_MODULES, CrossLoRA  # noqa: E402
from data import LANGUAGES, PIVOT, Tokenizer, read_flores, read_opus  # noqa: E402
from kernels import packed, product  # noqa: E402
from plan import pass_tokens  # noqa: E402

SIZES = {  # XS is for the tests; S; M: Qwen2.5-0.5B's shape; L: Llama-3-8B's
    "XS": dict(kind="qwen2", tokenizer="none", vocab_size=4000, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
               num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True),
    "S": dict(kind="llama", tokenizer="llama2", vocab_size=32000, hidden_size=512, intermediate_size=1408, num_hidden_layers=8,
              num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=False),
    "M": dict(kind="qwen2", tokenizer="qwen2.5", vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
              num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True),
    "L": dict(kind="llama", tokenizer="llama3", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
              num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False),
}


def bench_parser(doc):
    """The flags of every bench."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S", choices=list(SIZES))
    parser.add_argument("--shared", default=str(ROOT.parent / "shared"),
                        help="folder with real tokenizers and text; the toy world without it")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", default=str(Path(tempfile.gettempdir()) / "crosslora-bench"), help="folder for the random checkpoint")
    parser.add_argument("--out", help="also write the JSON here")
    return parser


def report(result, out):
    """Print the one JSON line, and write it to the file `out` if there is one."""
    print(json.dumps(result))
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(result, indent=1) + "\n")


def real_tokenizer(size, shared):
    """Folder of the published tokenizer of a size's family, or None where `shared` has none."""
    folder = Path(shared) / "tokenizers" / SIZES[size]["tokenizer"]
    return folder if (folder / "tokenizer.json").exists() else None


def checkpoint_folder(args):
    """Where make_checkpoint's checkpoint is, one with a real tokenizer and one with the toy world's apart."""
    return Path(args.work) / (args.size + ("" if real_tokenizer(args.size, args.shared) else "-toy"))


def make_checkpoint(size, folder, shared, device):
    """config.json of a size in `folder`, with the real tokenizer of its family, or the toy world's where `shared` has none, and
    on a CPU random weights, saved by transformers. Returns the peer's model class and configuration."""
    shape = dict(SIZES[size])
    kind = shape.pop("kind")
    del shape["tokenizer"]
    classes = {"llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
               "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM)}
    config_class, model_class = classes[kind]
    done = folder / ("config.json" if device.type == "cuda" else "model.safetensors")
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        if real := real_tokenizer(size, shared):
            raw = json.loads((real / "tokenizer.json").read_text(encoding="utf-8"))
            raw["added_tokens"] = [token for token in raw["added_tokens"] if token["id"] < shape["vocab_size"]]
            (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
            ids = json.loads((real / "config.json").read_text())
            special = {k: ids.get(k) for k in ("bos_token_id", "eos_token_id")}
        else:
            from pretrain import config_of, train_tokenizer
            toy = train_tokenizer([t for pair in toy_pairs(2000) for t in pair[2:]], 4000)
            toy.save(str(folder / "tokenizer.json"))
            special = {k: config_of(toy, 32, 1)[k] for k in ("bos_token_id", "eos_token_id")}
        torch.manual_seed(0)
        config = config_class(**shape, **special, max_position_embeddings=2048, rope_theta=500000.0, initializer_range=0.02)
        if device.type == "cuda":
            config.save_pretrained(folder)
        else:
            model_class(config).save_pretrained(folder)
    return model_class, config_class.from_pretrained(folder)


def tokenizer_of(size, folder, cfg):
    """The tokenizer of make_checkpoint's folder, with the chat format of a real model or none."""
    return Tokenizer(folder, cfg, "auto" if size in "ML" else "plain")


def random_adapter(cfg, languages, device):
    adapter = CrossLoRA(cfg, list(languages)).to(device)
    for name, p in adapter.named_parameters():
        if "lora_B" in name:  # at B = 0 R-Drop's two passes are equal and the KL has nothing to compute
            p.data.copy_(0.01 * torch.randn(p.shape, device=device))
    return adapter


def training_settings(cfg, device, micro_batch_size=4):
    """What train.backward reads of its arguments, at the paper's values."""
    settings = SimpleNamespace(micro_batch_size=micro_batch_size, micro_batch_tokens=None, max_length=512, rdrop_alpha=0.1,
                               normalize="tokens")
    settings.micro_batch_tokens = pass_tokens(settings, cfg, device.type)
    return settings


def prompts_and_limits(tokenizer, rows):
    """What there is to decode: token ids of every prompt, and how many new tokens its reference has, end of turn included."""
    prompts = [tokenizer.prompt(row["src_lang"], row["tgt_lang"], row["src"]) for row in rows]
    return prompts, [len(tokenizer.ids(row["tgt"].strip())) + 1 for row in rows]


def load_both(size, folder, shared, device, side=None):
    """(our model, our adapter, the peer), fp32: the same random weights, and peft's LoRA of rank 16 with the experts of de and zh.
    For one `side`, ours or a peer's name, the other's model is None. On a GPU both sides share the weights' memory."""
    model_class, config = make_checkpoint(size, folder, shared, device)
    cfg = backbone.Config.load(folder)
    adapter = random_adapter(cfg, LANGUAGES, device)
    if device.type == "cuda":
        torch.manual_seed(0)
        with device:
            peer = model_class(config)
        lm, weights = backbone.build(cfg), peer.state_dict()
        lm.load_state_dict({name: weights[name] for name, _ in lm.named_parameters()}, assign=True)
        lm.inv_freq = lm.inv_freq.to(device)
        lm.requires_grad_(False).eval()
    else:
        lm = backbone.load(folder) if side in (None, "ours") else None
        peer = model_class.from_pretrained(folder, dtype=torch.float32) if side != "ours" else None
    if side == "ours":
        return lm, adapter, None
    peer = peft.get_peft_model(peer, peft.LoraConfig(r=16, lora_alpha=64, lora_dropout=0.1, target_modules=list(TARGET_MODULES)))
    with torch.no_grad():
        for i, layer in enumerate(peer.base_model.model.model.layers):
            for name in TARGET_MODULES:
                getattr(layer.mlp, name).lora_A["default"].weight.copy_(adapter.layers[i][name].lora_A["de"])
                getattr(layer.mlp, name).lora_B["default"].weight.copy_(adapter.layers[i][name].lora_B["zh"])
    return lm, adapter, peer


def lower(parameters, dtype):
    """These in `dtype` from here on; what they shared they still share."""
    lowered = {}
    for p in parameters:
        p.data = lowered.setdefault(p.data_ptr(), p.data.to(dtype))


def toy_pairs(count):
    import random

    from world import meanings, sentence
    stream, rng, pairs = meanings(random.Random(0)), random.Random(1), []
    for _ in range(count):
        meaning, (s, t) = next(stream), rng.sample(list(LANGUAGES), 2)
        pairs.append((s, t, sentence(meaning, s), sentence(meaning, t)))
    return pairs


def sentence_rows(shared, count):
    """(rows as in a JSONL file, in all 30 directions, and where they come from): real text where it is at hand, else the toy world."""
    pairs, source = sentence_pairs(shared, count)
    return [dict(zip(("src_lang", "tgt_lang", "src", "tgt"), pair)) for pair in pairs], source


def sentence_pairs(shared, count):
    """(src_lang, tgt_lang, src, tgt) of sentence_rows."""
    import random

    root, rng = Path(shared) / "data", random.Random(0)
    if not root.is_dir():
        return toy_pairs(count), "toy world"
    pairs = []
    for lang in list(LANGUAGES)[1:]:
        for en, x in read_opus(root, lang, "test"):
            pairs += [(PIVOT, lang, en, x), (lang, PIVOT, x, en)]
    for row in read_flores(root, list(LANGUAGES), "devtest"):
        s, t = rng.sample(range(1, 6), 2)
        pairs.append((list(LANGUAGES)[s], list(LANGUAGES)[t], row[s], row[t]))
    pairs = [pair for pair in pairs if pair[2].strip() and pair[3].strip()]
    return rng.sample(pairs, count), "OPUS-100 layout and FLORES-200, real sentences"


def matmul_rate(device, dtype):
    """FLOP/s of a large matrix product here and now: the faster of torch's own and, on a CPU, that by a packed weight."""
    n = 4096 if device.type == "cuda" else 1536
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    best, by = 0.0, packed(b)
    for multiply in (lambda: a @ b, lambda: product(a, by)) * 4:
        started = now(device)
        for _ in range(3):
            multiply()
        best = max(best, 3 * 2 * n**3 / (now(device) - started))
    return best


def now(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def alternate(runs, repeats, device, each=None):
    """Seconds of each named function, run in turn `repeats` times after one warm-up each: {name: [seconds, ...]}. Every turn is begun by
    another, since what ran before leaves its caches and heap; `each` is called after every turn."""
    for run in runs.values():
        run()
    times = {name: [] for name in runs}
    for turn in range(repeats):
        first = turn % len(runs)
        for name in [*runs][first:] + [*runs][:first]:
            started = now(device)
            runs[name]()
            times[name].append(now(device) - started)
        if each:
            each()
    return times


def ratios(times, name, ours="ours"):
    """Median and range of peer / ours over the alternations."""
    return spread([peer / mine for peer, mine in zip(times[name], times[ours])], 3)


def spread(values, digits):
    return {"median": round(statistics.median(values), digits), "min": round(min(values), digits), "max": round(max(values), digits),
            "n": len(values)}


def machine(device):
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        processors = (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line)
        name = next(processors, platform.machine())
    described = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True)
    commit = described.stdout.strip() or None  # of a copy without its history
    tuning = ("LD_PRELOAD", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES",
              "PYTORCH_CUDA_ALLOC_CONF")
    return {"device": name, "instructions": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__, "commit": commit,
            "allocator": {k: os.environ[k] for k in tuning if k in os.environ} or "default",
            "date": time.strftime("%Y-%m-%d")}


def resident_bytes(device, key="VmRSS"):
    """Bytes of this process in memory; on a GPU of its tensors, whatever the key of /proc/self/status (Linux)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated()
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith(key))) * 1024


def trim():
    """Give freed memory back to the system, which glibc keeps."""
    ctypes.CDLL(None).malloc_trim(0)


def peak_bytes(function, device, since):
    """Memory at the peak of one call of `function`, less `since` bytes. On a CPU it is the whole process's, so that what
    earlier calls left counts too."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - since
    trim()  # else what loading has freed would count (the next lines are Linux's)
    open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
    function()
    return resident_bytes(device, "VmHWM") - since


class Side:
    """The run `name` of this very command in a process of its own, as its users have it: neither speed nor peak memory
    depends on the heap that another side leaves. Calling it runs it once; `told` is what its process tells first."""

    def __init__(self, name):
        self.process = subprocess.Popen([sys.executable, *sys.argv, "--side", name],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.told = json.loads(self.answer())

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{' '.join(map(str, self.process.args))}: ended with status {self.process.wait()}")
        return line

    def __call__(self):
        with contextlib.suppress(BrokenPipeError):  # answer() says what became of it
            print(file=self.process.stdin, flush=True)
        self.answer()


def serve(run, told):
    """The other end of a Side."""
    print(json.dumps(told), flush=True)
    for _ in sys.stdin:
        run()
        print("done", flush=True)
