"""The tables of speed in bench/README.md, from bench/results/*.json:  python bench/tables.py"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from support.report import markdown


def ratio(value):
    if value is None:
        return "-"
    return f"{value['median']:.2f} ({value['min']:.2f}-{value['max']:.2f}, {value['n']})"


def smallest_first(path):
    return "SML".find(path.stem.split("_")[1]), path.stem


def read(kind):
    """The result files of a kind, the smallest size first."""
    files = sorted((ROOT / "bench/results").glob(f"{kind}_*.json"), key=smallest_first)
    return [json.loads(file.read_text()) for file in files]


def size(result):
    """Size, device, its instructions where they are old, allocator: the first column."""
    machine = result["machine"]
    device = machine["device"].replace("(R)", "").removesuffix(" Processor")
    tuned = "" if machine["allocator"] == "default" else ", tuned allocator"
    narrow = ", AVX2" if machine["instructions"] == "AVX2" else ""
    return f"{result['size']}, {device}{narrow}{tuned}"


def training():
    header = ["size", "ours, tokens/s", "over plain", "over the usual peer", "over the tuned peer"]
    header += [
        "% of peak matmul throughput",
        "peak MiB with model, ours",
        "usual",
        "tuned",
        "pairs",
    ]
    lines = []
    for result in read("train"):
        cells = [size(result), str(result["tokens_per_s"]["ours"])]
        cells += [ratio(result.get(f"ratio_{name}")) for name in ("plain", "usual", "tuned")]
        cells.append(f"{result['utilisation']:.0%}")
        for name in ("ours", "usual", "tuned"):
            peak = result["peak_mib"].get(name)
            cells.append("-" if peak is None else f"{peak:,}")
        lines.append([*cells, str(result["pairs"])])
    return markdown(header, lines)


def decoding():
    header = ["size", "ours, sentences/s", "new tokens/s", "over plain", "over the usual peer"]
    header += ["over the sorted peer", "% of peak matmul throughput", "sentences"]
    lines = []
    for result in read("generate"):
        compared = result["peer_seconds"] or "ratio_plain" in result
        name = size(result) + ("" if compared else ", ours alone")
        cells = [name, str(result["sentences_per_s"]["ours"])]
        cells.append(str(result["output_tokens_per_s"]["ours"]))
        cells += [ratio(result.get(f"ratio_{name}")) for name in ("plain", "usual", "sorted")]
        lines.append([*cells, f"{result['utilisation']:.0%}", str(result["count"])])
        alone = result.get("alone")
        if alone:
            rate = alone["output_tokens_per_s"]["median"]
            sentences = f"{rate * alone['count'] / alone['output_tokens']:.2f}"
            cells = [f"{size(result)}, ours alone", sentences, str(rate), "-", "-", "-", "-"]
            lines.append([*cells, str(alone["count"])])
    return markdown(header, lines)


def more(value):
    """A ratio as what it is above 1."""
    low, high = value["min"] - 1, value["max"] - 1
    return f"{value['median'] - 1:+.1%} ({low:+.1%} to {high:+.1%}, {value['n']})"


def cost():
    lines = []
    for result in read("cost"):
        partly = "" if result.get("optimizer") else " without the optimizer"
        work = {
            "training": f"{result['pairs']} pairs{partly}",
            "decoding": f"{result['count']} sentences, batches of {result['batch_size']}",
        }
        for what, how_much in work.items():
            ratios = [more(value) for value in result[what].values()]
            lines.append([f"{what}, {size(result)}, {how_much}", *ratios])
    header = ["CrossLoRA's cost over a plain LoRA", "6 languages", "100 languages"]
    return markdown(header, lines)


if __name__ == "__main__":
    print(training(), decoding(), cost(), sep="\n", end="")
