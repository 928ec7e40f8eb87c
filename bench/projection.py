"""How long the paper's whole run would take on one GPU: a projection from counts and rates, not a measurement.

    python bench/projection.py [--tflops 451 --decode-tokens-per-s 11398] [--out bench/results/projection.json]

Counts are Table 5's; lengths are means of 600 real OPUS-100 and FLORES-200 pairs with Llama-3's tokenizer and prompt. Training
takes 4 FLOPs a backbone weight, token and pass (two passes with R-Drop), the head on targets only. Both rates were measured on one
H200 (results/train_L.json, generate_L_alone.json): of one batch of 32 pairs, and of 4,096 sentences with the reading of their prompts.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from files import markdown  # noqa: E402

LAYERS, HEAD = 32 * 218_103_808, 128_256 * 4096  # weights of Llama-3-8B: 32 layers without norms, head


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tflops", type=float, default=451, help="rate of training, bf16")
    parser.add_argument("--decode-tokens-per-s", type=float, default=11398, help="new tokens a second, prompts read as well")
    parser.add_argument("--prompt-tokens", type=float, default=40.1, help="mean tokens of a prompt with its sentence")
    parser.add_argument("--target-tokens", type=float, default=23.4, help="mean tokens of a translation with its end of turn")
    parser.add_argument("--out", help="also write the JSON here")
    args = parser.parse_args()
    rate = args.tflops * 1e12

    def training(pairs, epochs):
        tokens = pairs * epochs * (args.prompt_tokens + args.target_tokens - 1)
        return 2 * 4 * (tokens * LAYERS + pairs * epochs * args.target_tokens * HEAD) / rate / 3600

    def translating(sentences):
        return sentences * args.target_tokens / args.decode_tokens_per_s / 3600

    stages = {
        "Stage 1: 10 x 20,997 pairs, 3 epochs": training(10 * 20_997, 3),
        "pivot: 5 x 20,000 sentences into English, 20 x 20,000 out of it": translating(100_000 + 400_000),
        "Stage 2: 10 x 20,997 and 20 x 18,997 pairs, 2 epochs": training(10 * 20_997 + 20 * 18_997, 2),
        "evaluation: 40,240 sentences": translating(40_240),
    }
    stages["all"] = sum(stages.values())
    rows = [[name, f"{hours:.2f}"] for name, hours in stages.items()]
    print("Projection, not measured:\n" + markdown(["part", "GPU-hours"], rows), end="")
    if args.out:
        result = {"projection": "computed from the rates of short runs, not measured", **vars(args),
                  "gpu_hours": {name: round(hours, 2) for name, hours in stages.items()}}
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
