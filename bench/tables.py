"""The README's tables of speed, from bench/results/*.json:  python bench/tables.py"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from files import markdown  # noqa: E402


def ratio(r):
    return "-" if r is None else f"{r['median']:.2f} ({r['min']:.2f}-{r['max']:.2f}, {r['n']})"


def read(kind):
    """The result files of a kind, the smallest size first."""
    order = lambda path: ("SML".find(path.stem.split("_")[1]), path.stem)
    return [json.loads(path.read_text()) for path in sorted((ROOT / "bench/results").glob(f"{kind}_*.json"), key=order)]


def size(r):
    device = r["machine"]["device"].replace("(R)", "").removesuffix(" Processor")
    return f"{r['size']}, {device}" + ("" if r["machine"]["allocator"] == "default" else ", tuned allocator")


def tables():
    """Training, decoding and CrossLoRA's own cost as markdown, a row a result file."""
    train = []
    for r in read("train"):
        peaks = [f"{r['peak_mib'][name]:,}" if name in r["peak_mib"] else "-" for name in ("ours", "usual", "tuned")]
        train.append([size(r), str(r["tokens_per_s"]["ours"]), ratio(r.get("ratio_usual")), ratio(r.get("ratio_tuned")),
                      f"{r['utilisation']:.0%}", *peaks, str(r["pairs"])])
    decode = []
    for r in read("generate"):
        decode.append([size(r) + ("" if r["peer_seconds"] else ", ours alone"), str(r["sentences_per_s"]["ours"]),
                       str(r["output_tokens_per_s"]["ours"]), ratio(r.get("ratio_usual")), ratio(r.get("ratio_sorted")),
                       f"{r['utilisation']:.0%}", str(r["count"])])
        if alone := r.get("alone"):
            rate = alone["output_tokens_per_s"]["median"]
            decode.append([f"{size(r)}, ours alone", f"{rate * alone['count'] / alone['output_tokens']:.2f}", str(rate),
                           "-", "-", "-", str(alone["count"])])
    whole = lambda r: "" if r.get("optimizer") else " without the optimizer"
    where = lambda r, what: f"{r['pairs']} pairs{whole(r)}" if what == "training" else f"{r['count']} sentences in {r['batch_size']} places"
    more = lambda value: f"{value['median'] - 1:+.1%} ({value['min'] - 1:+.1%} to {value['max'] - 1:+.1%}, {value['n']})"
    cost = [[f"{what}, {size(r)}, {where(r, what)}", *map(more, r[what].values())]
            for r in read("cost") for what in ("training", "decoding")]
    return (markdown(["size", "ours, tokens/s", "over the usual peer", "over the tuned peer", "of the product's rate",
                      "peak MiB with model, ours", "usual", "tuned", "pairs"], train) + "\n"
            + markdown(["size", "ours, sentences/s", "new tokens/s", "over the usual peer", "over the sorted peer",
                        "of the product's rate", "sentences"], decode) + "\n"
            + markdown(["CrossLoRA's cost over a plain LoRA", "6 languages", "100 languages"], cost))


if __name__ == "__main__":
    print(tables(), end="")
