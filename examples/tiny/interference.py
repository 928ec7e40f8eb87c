"""Whether the directions that share an expert pull it the same way.

    python examples/tiny/interference.py --adapter runs/.../adapter --test data/test.jsonl

The gradient of the NLL (eq. 6, no dropout, no R-Drop) is taken for each direction alone. For every
expert's matrix that several directions use, the cosine between their gradients says whether a step
for one helps the others (1), leaves them alone (0) or undoes them (-1). Prints a line of JSON.
"""

import itertools
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import LANGUAGES, encode
from generate import load_engine
from support.corpora import read_jsonl
from support.report import by_direction
from support.runs import ArgumentParser, progress, run_main
from train import forward_sums


def gradients(engine, rows):
    """{parameter: its gradient, flat} for the mean NLL of `rows`."""
    examples, _ = encode(engine.tokenizer, rows)
    engine.adapter.zero_grad(set_to_none=True)
    loss, _, _ = forward_sums(engine.model, engine.adapter, examples, 0, False)
    (loss / sum(example.target_count for example in examples)).backward()
    found = {}
    for name, parameter in engine.adapter.named_parameters():
        if parameter.grad is not None and "router" not in name:
            found[name] = parameter.grad.flatten().clone()
    return found


def measure(by_name):
    """by_name: {parameter: [a direction's gradient, ...]}. Mean cosine over all pairs of directions
    within a parameter, and the share of pairs below 0, %; None where nothing is shared."""
    cosines = []
    for vectors in by_name.values():
        for a, b in itertools.combinations(vectors, 2):
            if a.any() and b.any():
                cosines.append(torch.cosine_similarity(a, b, dim=0).item())
    if not cosines:
        return {"cosine": None, "opposed": None, "pairs": 0}
    below = sum(cosine < 0 for cosine in cosines)
    mean = sum(cosines) / len(cosines)
    opposed = round(100 * below / len(cosines), 2)
    return {"cosine": round(mean, 4), "opposed": opposed, "pairs": len(cosines)}


def main():
    parser = ArgumentParser(__doc__)
    parser.add_argument("--adapter", required=True, help="adapter folder that train.py wrote")
    parser.add_argument("--test", required=True, help="sentence pairs of all directions")
    parser.add_argument("--rows", type=int, default=16, help="pairs per direction")
    args = parser.parse_args()
    engine = load_engine(None, args.adapter, device="cpu")
    engine.adapter.requires_grad_(True)
    by_name = {}
    directions = by_direction(read_jsonl(args.test, LANGUAGES))
    for rows in progress(directions.values(), desc="gradients"):
        for name, gradient in gradients(engine, rows[: args.rows]).items():
            by_name.setdefault(name, []).append(gradient)
    print(json.dumps(measure(by_name)))


if __name__ == "__main__":
    run_main(main)
