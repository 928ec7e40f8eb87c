"""Whether the directions that share an expert pull it the same way.

    python examples/tiny/interference.py --adapter runs/.../adapter --world runs/tiny/world

The gradient of the NLL (eq. 6, no dropout, no R-Drop) is taken for each direction alone, on
sentences of FLORES-200's devtest that no other direction has: one sentence in two directions would
pull alike by itself. For every expert's matrix that several directions use, the cosine between
their gradients says whether a step for one helps the others (1), leaves them alone (0) or undoes
them (-1). Prints a line of JSON.
"""

import itertools
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import LANGUAGES, all_directions, encode, flores_rows, read_flores
from generate import load_engine
from support.runs import ArgumentParser, UserError, progress, run_main
from train import forward_sums


def rows_of_directions(world):
    """The sentence pairs of each direction; no sentence is in two directions."""
    languages = list(LANGUAGES)
    sentences, directions = read_flores(world, languages, "devtest"), all_directions(languages)
    if len(sentences) < len(directions):
        few = f"{len(sentences)} devtest sentences for {len(directions)} directions"
        raise UserError(f"{world}: {few}; each needs its own")
    rows = []
    for i, direction in enumerate(directions):
        rows.append(flores_rows(sentences[i :: len(directions)], languages, *direction))
    return rows


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
    parser.add_argument("--world", required=True, help="folder that world.py wrote")
    args = parser.parse_args()
    engine = load_engine(None, args.adapter, device="cpu")
    engine.adapter.requires_grad_(True)
    by_name = {}
    for rows in progress(rows_of_directions(args.world), desc="gradients"):
        for name, gradient in gradients(engine, rows).items():
            by_name.setdefault(name, []).append(gradient)
    print(json.dumps(measure(by_name)))


if __name__ == "__main__":
    run_main(main)
