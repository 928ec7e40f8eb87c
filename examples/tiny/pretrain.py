"""Pre-train the toy backbone and save it as a published checkpoint is: config.json, tokenizer.json, model.safetensors.

    python examples/tiny/pretrain.py --world runs/tiny/world --out runs/tiny/backbone

A Llama-3-shaped decoder reads lines that hold the same sentence in three random languages; the loss counts from the
second sentence on. So it learns that meaning carries over between languages, as a real backbone has, but nobody
tells it which language comes next and it never sees an instruction: translating on request is left to the adapter.
"""

import argparse
import itertools
import json
import os
import random
import sys
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
from tokenizers import decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import model as backbone  # noqa: E402
from data import LANGUAGES, PROMPT, read_flores, read_opus  # noqa: E402
from files import UserError, claim, file_sha256, run_main, write_atomic  # noqa: E402
from world import PHRASE, meanings, parts, sentence  # noqa: E402

IGNORE = -100  # label of a position that is not trained on (F.cross_entropy's convention)
CONTROL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
         r"\s*[\r\n]+|\s+(?!\S)|\s+")  # Llama-3's


def train_tokenizer(texts, vocab_size):
    """A byte-level BPE tokenizer in Llama-3's form: any text round-trips, control tokens last."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(CONTROL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(CONTROL)
    return tokenizer


def config_of(tokenizer, hidden_size, layers):
    """config.json of a small Llama-3: grouped queries, theta 500,000, a tied head as Llama-3.2 has."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "float32",
        "vocab_size": tokenizer.get_vocab_size(), "hidden_size": hidden_size, "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "rope_scaling": None, "tie_word_embeddings": True, "max_position_embeddings": 8192,
        "attention_bias": False, "mlp_bias": False, "initializer_range": 0.02,
        "bos_token_id": tokenizer.token_to_id("<|begin_of_text|>"), "eos_token_id": tokenizer.token_to_id("<|eot_id|>"),
    }


def random_model(config, folder):
    """A CausalLM with fresh weights, its config.json written to `folder`."""
    write_atomic(folder / "config.json", json.dumps(config, indent=2) + "\n")
    model = backbone.CausalLM(backbone.Config.load(folder))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=config["initializer_range"])
    return model


def batches(tokenizer, stream, rng, lines, phrase_steps):
    """Endless (tokens, labels), both (B, T): BOS, one text in three languages after a space or newline each, end of
    turn. The text is a phrase of a sentence, as in a dictionary, for `phrase_steps` batches, then the sentence."""
    begin, end = (tokenizer.token_to_id(t) for t in ("<|begin_of_text|>", "<|eot_id|>"))
    for step in itertools.count():
        rows = []
        for _ in range(lines):
            meaning, texts = next(stream), []
            part = rng.choice([i for i, text in enumerate(parts(meaning, "en")) if text])
            for lang in rng.sample(list(PHRASE), 3):
                text = parts(meaning, lang)[part] if step < phrase_steps else sentence(meaning, lang)
                texts.append(tokenizer.encode(rng.choice(("\n", " ")) + text).ids)
            rows.append(([begin, *texts[0]], [*texts[1], *texts[2], end]))
        T = max(len(c) + len(t) for c, t in rows) - 1
        tokens, labels = torch.zeros(lines, T, dtype=torch.long), torch.full((lines, T), IGNORE)
        for row, (context, target) in enumerate(rows):
            ids = torch.tensor(context + target)
            tokens[row, : len(ids) - 1] = ids[:-1]
            labels[row, len(context) - 1 : len(ids) - 1] = ids[len(context) :]
        yield tokens, labels


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", required=True, help="folder that world.py wrote; its dev and test sentences are avoided")
    parser.add_argument("--out", required=True, help="checkpoint folder to write")
    parser.add_argument("--vocab-size", type=int, default=1536)
    parser.add_argument("--hidden-size", type=int, default=96)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--phrase-steps", type=int, default=300, help="steps on phrases before those on sentences")
    parser.add_argument("--lines", type=int, default=64, help="lines a step")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    out, config = Path(args.out), {k: v for k, v in vars(args).items() if k not in ("out", "world")}
    if not (Path(args.world) / "done").exists():
        raise UserError(f"{args.world}: not made yet; run world.py --out {args.world} first")
    if (out / "config.json").exists() and not (out / "pretraining").exists():
        raise UserError(f"{out}: holds a checkpoint that this script did not make; choose another --out")
    config["world_sha256"] = file_sha256(Path(args.world) / "config.json")
    lock = claim(out / "pretraining", config)  # config.json of the folder itself is the model's
    if (out / "model.safetensors").exists():
        print(f"{out}: pre-trained already")
        return
    languages, rng = list(PHRASE), random.Random(args.seed)
    held_out = {row[0] for split in ("dev", "devtest") for row in read_flores(args.world, languages, split)}
    held_out |= {row[0] for lang in languages[1:] for split in ("dev", "test") for row in read_opus(args.world, lang, split)}
    stream = (m for m in meanings(rng) if sentence(m, "en") not in held_out)

    sample = [next(stream) for _ in range(4000)]
    texts = [before + sentence(m, lang) for m in sample for lang in languages for before in ("\n", " ")]
    instruction = PROMPT.format(src="".join(f" {LANGUAGES[code].name}" for code in PHRASE), tgt="")
    texts += ["user", "assistant", "\n\n", instruction] * 500  # frequent, as they are where real tokenizers come from
    tokenizer = train_tokenizer(texts, args.vocab_size)
    torch.manual_seed(args.seed)
    model = random_model(config_of(tokenizer, args.hidden_size, args.layers), out)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {tokenizer.get_vocab_size()} tokens")

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    first, checkpoint = 0, out / "pretraining/checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
        print(f"{out}: resuming at step {first}")
    stream = itertools.islice(batches(tokenizer, stream, rng, args.lines, args.phrase_steps), first, args.steps)
    bar = tqdm(stream, desc="pre-training", initial=first, total=args.steps, disable=None)
    for step, (tokens, labels) in enumerate(bar, first):
        for group in optimizer.param_groups:  # warm-up, flat, and down to nothing over the last fifth
            group["lr"] = args.lr * min(1, (step + 1) / 50, 5 * (1 - step / args.steps))
        at = labels != IGNORE  # (B, T)
        logits = model.head(model(tokens)[at])  # (targets, V)
        loss = F.cross_entropy(logits, labels[at])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            accuracy = (logits.argmax(-1) == labels[at]).float().mean().item()
            bar.write(f"step {step + 1}: loss {loss.item():.3f}, token accuracy {accuracy:.1%}", file=sys.stdout)
            torch.save({"step": step + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, f"{checkpoint}.tmp")
            os.replace(f"{checkpoint}.tmp", checkpoint)
    tokenizer.save(str(out / "tokenizer.json"))
    backbone.save(model, json.loads((out / "config.json").read_text()), out)
    lock.close()
    print(f"{out}: saved")


if __name__ == "__main__":
    run_main(main)
