"""What the benches share: sizes, random weights that ours and the peers load, sentences, repeats,
another checkout to compare with, the report."""

import contextlib
import ctypes
import json
import os
import platform
import random
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
import model as backbone
from crosslora import TARGET_MODULES, CrossLoRA
from data import LANGUAGES, PIVOT, Tokenizer, read_flores, read_opus
from fast.kernels import frozen_matmul, packed
from support.runs import ArgumentParser

SIZES = {  # XS is for the tests; S; M: Qwen2.5-0.5B's shape; L: Llama-3-8B's
    "XS": {
        "kind": "qwen2",
        "tokenizer": "none",
        "vocab_size": 4000,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "S": {
        "kind": "llama",
        "tokenizer": "llama2",
        "vocab_size": 32000,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "M": {
        "kind": "qwen2",
        "tokenizer": "qwen2.5",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "L": {
        "kind": "llama",
        "tokenizer": "llama3",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}
PEERS = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
}
OURS = ("ours", "plain")  # by fast/, and by the seven scripts alone


def bench_parser(doc):
    """The flags of every bench."""
    parser = ArgumentParser(doc)
    add = parser.add_argument
    add("--size", default="S", choices=list(SIZES))
    real = "folder with real tokenizers and text; the toy world without it"
    add("--shared", default=str(ROOT.parent / "shared"), help=real)
    add("--repeats", type=int, default=7)
    add("--threads", type=int, default=2)
    work = str(Path(tempfile.gettempdir()) / "crosslora-bench")
    add("--work", default=work, help="folder for the random checkpoint")
    add("--out", help="also write the JSON here")
    return parser


def add_side_arguments(parser, sides):
    """The flags of benches whose sides run in processes of their own."""
    other = "another checkout of this project, whose bench runs as one more side: before and after"
    parser.add_argument("--against", metavar="CHECKOUT", help=other)
    parser.add_argument("--side", choices=sides, help="be one side's process")


def report(result, out):
    """Print the one JSON line, and write it to the file `out` if there is one."""
    print(json.dumps(result))
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(result, indent=1) + "\n")


# --- checkpoints ----------------------------------------------------------------------------------


def real_tokenizer(size, shared):
    """Folder of the published tokenizer of a size's family, or None where `shared` has none."""
    folder = Path(shared) / "tokenizers" / SIZES[size]["tokenizer"]
    return folder if (folder / "tokenizer.json").exists() else None


def checkpoint_folder(args):
    """Where make_checkpoint's checkpoint is, one with a real tokenizer and one with the toy world's
    apart."""
    return Path(args.work) / (
        args.size + ("" if real_tokenizer(args.size, args.shared) else "-toy")
    )


def write_tokenizer(size, folder, shared):
    """Tokenizer and chat template into `folder`; returns config.json's special tokens."""
    real = real_tokenizer(size, shared)
    if real is None:
        from pretrain import config_of, save_tokenizer, train_tokenizer

        toy = train_tokenizer([text for pair in toy_pairs(2000) for text in pair[2:]], 4000)
        save_tokenizer(toy, folder)
        return {key: config_of(toy, 32, 1)[key] for key in ("bos_token_id", "eos_token_id")}
    raw = json.loads((real / "tokenizer.json").read_text(encoding="utf-8"))
    most = SIZES[size]["vocab_size"]
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["id"] < most]
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        if (real / name).exists():
            (folder / name).write_bytes((real / name).read_bytes())
    ids = json.loads((real / "config.json").read_text())
    return {key: ids.get(key) for key in ("bos_token_id", "eos_token_id")}


def make_checkpoint(size, folder, shared, device):
    """config.json of a size in `folder`, with the real tokenizer of its family, or the toy world's
    where `shared` has none, and on a CPU random weights, saved by transformers. Returns the peer's
    model class and configuration."""
    shape = dict(SIZES[size])
    config_class, model_class = PEERS[shape.pop("kind")]
    del shape["tokenizer"]
    on_gpu = device.type == "cuda"
    if not (folder / ("config.json" if on_gpu else "model.safetensors")).exists():
        folder.mkdir(parents=True, exist_ok=True)
        special = write_tokenizer(size, folder, shared)
        torch.manual_seed(0)
        config = config_class(
            **shape,
            **special,
            max_position_embeddings=2048,
            rope_theta=500000.0,
            initializer_range=0.02,
        )
        if on_gpu:
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
        if "lora_B" in name:  # at B = 0 R-Drop's two passes are equal, and so is the KL to nothing
            p.data.copy_(0.01 * torch.randn(p.shape, device=device))
    return adapter


def training_settings(micro_batch_size=4):
    """What train.backward and micro_batches read of train.py's arguments, at the paper's values."""
    return SimpleNamespace(micro_batch_size=micro_batch_size, max_length=512, rdrop_alpha=0.1)


def load_both(size, folder, shared, device, side=None):
    """(our model, our adapter, the peer), fp32: the same random weights, and peft's LoRA of rank 16
    with the experts of de and zh. For one `side`, one of ours or a peer's name, the other's model
    is None. On a GPU both sides share the weights' memory."""
    model_class, config = make_checkpoint(size, folder, shared, device)
    cfg = backbone.Config.load(folder)
    adapter = random_adapter(cfg, LANGUAGES, device)
    lm = peer = None
    if device.type == "cuda":
        torch.manual_seed(0)
        with device:
            peer = model_class(config)
        lm = share_weights(cfg, peer.state_dict(), device)
    else:
        if side is None or side in OURS:
            lm = backbone.load(folder)
        if side not in OURS:
            peer = model_class.from_pretrained(folder, dtype=torch.float32)
    if side in OURS:
        return lm, adapter, None
    modules = list(TARGET_MODULES)
    lora = peft.LoraConfig(r=16, lora_alpha=64, lora_dropout=0.1, target_modules=modules)
    peer = peft.get_peft_model(peer, lora)
    with torch.no_grad():
        for i, layer in enumerate(peer.base_model.model.model.layers):
            for name in TARGET_MODULES:
                bank, theirs = adapter.layers[i][name], getattr(layer.mlp, name)
                theirs.lora_A["default"].weight.copy_(bank.lora_A["de"])
                theirs.lora_B["default"].weight.copy_(bank.lora_B["zh"])
    return lm, adapter, peer


def share_weights(cfg, weights, device):
    """Our model in the memory of a peer's state_dict."""
    lm = backbone.build(cfg)
    lm.load_state_dict({name: weights[name] for name in lm.state_dict()}, assign=True)
    lm.tie_weights()
    lm.inv_freq = lm.inv_freq.to(device)
    return lm.requires_grad_(False).eval()


def lower(parameters, dtype):
    """These in `dtype` from here on; what they shared they still share."""
    lowered = {}
    for p in parameters:
        p.data = lowered.setdefault(p.data_ptr(), p.data.to(dtype))


# --- sentences ------------------------------------------------------------------------------------


def toy_pairs(count):
    from world import meanings, sentence

    stream, rng, pairs = meanings(random.Random(0)), random.Random(1), []
    for _ in range(count):
        meaning, (s, t) = next(stream), rng.sample(list(LANGUAGES), 2)
        pairs.append((s, t, sentence(meaning, s), sentence(meaning, t)))
    return pairs


def real_pairs(root, count):
    """(src_lang, tgt_lang, src, tgt) of real text, in all 30 directions."""
    languages, rng, pairs = list(LANGUAGES), random.Random(0), []
    for lang in languages[1:]:
        for en, x in read_opus(root, lang, "test"):
            pairs += [(PIVOT, lang, en, x), (lang, PIVOT, x, en)]
    for row in read_flores(root, languages, "devtest"):
        s, t = rng.sample(range(1, 6), 2)
        pairs.append((languages[s], languages[t], row[s], row[t]))
    pairs = [pair for pair in pairs if pair[2].strip() and pair[3].strip()]
    return rng.sample(pairs, count)


def sentence_rows(shared, count):
    """(rows as in a JSONL file, where they come from): real text where it is at hand, else the toy
    world."""
    root, source = Path(shared) / "data", "OPUS-100 layout and FLORES-200, real sentences"
    if root.is_dir():
        pairs = real_pairs(root, count)
    else:
        pairs, source = toy_pairs(count), "toy world"
    return [dict(zip(("src_lang", "tgt_lang", "src", "tgt"), pair)) for pair in pairs], source


def prompts_and_limits(tokenizer, rows):
    """What there is to decode: token ids of every prompt, and how many new tokens its reference
    has, end of turn included."""
    prompts, limits = [], []
    for row in rows:
        prompts.append(tokenizer.prompt(row["src_lang"], row["tgt_lang"], row["src"]))
        limits.append(len(tokenizer.ids(row["tgt"].strip())) + 1)
    return prompts, limits


# --- measuring ------------------------------------------------------------------------------------


def matmul_rate(device, dtype):
    """Peak matmul throughput here and now, FLOP/s: the faster of torch's own large product and, on
    a CPU, that by a packed weight."""
    n = 4096 if device.type == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in "ab")
    best, by = 0.0, packed(b)
    for multiply in (lambda: a @ b, lambda: frozen_matmul(a, by)) * 4:
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
    """Seconds of each named function, run in turn `repeats` times after one warm-up each: {name:
    [seconds, ...]}. Every turn is begun by another, since what ran before leaves its caches and
    heap; `each` is called after every turn."""
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
    """Median and range of the named side's time over ours, by turns."""
    return spread([theirs / mine for theirs, mine in zip(times[name], times[ours])], 3)


def spread(values, digits):
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
        "n": len(values),
    }


def commit_of(folder):
    described = subprocess.run(
        ["git", "-C", folder, "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    return described.stdout.strip() or None  # None of a copy without its history


def machine(device):
    name = platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if "model name" in line:
                name = line.split(":")[1].strip()
    tuning = "LD_PRELOAD MALLOC_TRIM_THRESHOLD_ MALLOC_MMAP_THRESHOLD_ MALLOC_TOP_PAD_ "
    tuning += "GLIBC_TUNABLES PYTORCH_CUDA_ALLOC_CONF"
    allocator = {key: os.environ[key] for key in tuning.split() if key in os.environ}
    return {
        "device": name,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "commit": commit_of(ROOT),
        "allocator": allocator or "default",
        "date": time.strftime("%Y-%m-%d"),
    }


def resident_bytes(device, key="VmRSS"):
    """Bytes of this process in memory; on a GPU of its tensors, whatever the key of
    /proc/self/status (Linux)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated()
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in status if line.startswith(key))) * 1024


def trim():
    """Give freed memory back to the system, which glibc keeps."""
    ctypes.CDLL(None).malloc_trim(0)


def peak_bytes(function, device, since):
    """Memory at the peak of one call of `function`, less `since` bytes. On a CPU it is the whole
    process's, so that what earlier calls left counts too."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - since
    trim()  # else what loading has freed would count (the next lines are Linux's)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    function()
    return resident_bytes(device, "VmHWM") - since


# --- sides in processes of their own --------------------------------------------------------------


class Side:
    """The run `name` of this very command in a process of its own, as its users have it: neither
    speed nor peak memory depends on the heap that another side leaves. Calling it runs it once;
    `told` is what its process tells first. checkout: another one, whose bench of this name runs on
    the same checkpoint and sentences."""

    def __init__(self, name, args, checkout=None):
        script, flags = Path(sys.argv[0]), sys.argv[1:]
        if "--against" in flags:
            at = flags.index("--against")
            del flags[at : at + 2]
        if checkout:
            script = Path(checkout).resolve() / "bench" / script.name
            flags += ["--peers", ""]  # it may know other peers
        same = "--shared", args.shared, "--work", args.work
        command = [sys.executable, str(script), *flags, *same, "--side", name]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, **pipes)
        self.told = json.loads(self.answer())

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            command = " ".join(map(str, self.process.args))
            sys.exit(f"{command}: ended with status {self.process.wait()}")
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


def start_sides(names, args):
    """{name: Side}, and that of another checkout as "against"."""
    sides = {name: Side(name, args) for name in names}
    if args.against:
        sides["against"] = Side("ours", args, args.against)
    return sides
