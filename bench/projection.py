"""How long the paper's whole run would take on one GPU: a projection from counts and rates, not a
measurement.

    python bench/projection.py [--tflops 451 --decode-tokens-per-s 11398]

Counts are Table 5's; lengths are means of 600 real OPUS-100 and FLORES-200 pairs with Llama-3's
tokenizer and prompt. Training takes 4 FLOPs per backbone weight, token and pass (two passes with
R-Drop), the head on targets only. Both rates were measured on one H200 (results/train_L.json,
generate_L_alone.json): of one batch of 32 pairs, and of 4,096 sentences with the reading of their
prompts.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support.report import markdown
from support.runs import ArgumentParser

LAYERS, HEAD = 32 * 218_103_808, 128_256 * 4096  # weights of Llama-3-8B: layers without norms, head


def main():
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--tflops", type=float, default=451, help="rate of training, bf16")
    with_prompts = "new tokens per second, prompts read as well"
    add("--decode-tokens-per-s", type=float, default=11398, help=with_prompts)
    add("--prompt-tokens", type=float, default=40.1, help="mean of a prompt with its sentence")
    add("--target-tokens", type=float, default=23.4, help="mean of a target with its end of turn")
    add("--out", help="also write the JSON here")
    args = parser.parse_args()
    rate = args.tflops * 1e12

    def training(pairs, epochs):
        tokens = pairs * epochs * (args.prompt_tokens + args.target_tokens - 1)
        targets = pairs * epochs * args.target_tokens
        return 2 * 4 * (tokens * LAYERS + targets * HEAD) / rate / 3600

    def translating(sentences):
        return sentences * args.target_tokens / args.decode_tokens_per_s / 3600

    hops = "pivot: 5 x 20,000 sentences into English, 20 x 20,000 out of it"
    both = "Stage 2: 10 x 20,997 and 20 x 18,997 pairs, 2 epochs"
    stages = {
        "Stage 1: 10 x 20,997 pairs, 3 epochs": training(10 * 20_997, 3),
        hops: translating(100_000 + 400_000),
        both: training(10 * 20_997 + 20 * 18_997, 2),
        "evaluation: 40,240 sentences": translating(40_240),
    }
    stages["all"] = sum(stages.values())
    rows = [[name, f"{hours:.2f}"] for name, hours in stages.items()]
    print("Projection, not measured:\n" + markdown(["part", "GPU-hours"], rows), end="")
    if args.out:
        said = "computed from the rates of short runs, not measured"
        rounded = {name: round(hours, 2) for name, hours in stages.items()}
        result = {"projection": said, **vars(args), "gpu_hours": rounded}
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
