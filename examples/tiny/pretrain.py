"""Pre-train the toy backbone and save it as a published checkpoint is: config.json, tokenizer.json,
model.safetensors.

    python examples/tiny/pretrain.py --world runs/tiny/world --out runs/tiny/backbone

A Llama-3-shaped decoder reads lines that hold the same sentence in three random languages; the loss
counts from the second sentence on. So it learns that meaning carries over between languages, as a
real backbone has. A tenth of the later lines are instructions as real chat models know them: the
paper's prompt, all 30 directions, answered by the gist alone (who does what to whom, without time,
place and adjectives). So the bare backbone mostly writes the language it is asked for, and
translates badly; whole translations are left to the adapter.
"""

import itertools
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
from world import PHRASE, meanings, parts, sentence

import model as backbone
from data import IGNORE, LANGUAGES, PROMPT, Tokenizer, read_flores, read_opus
from support.export import save_backbone
from support.runs import (
    ArgumentParser,
    UserError,
    at_least,
    claim,
    file_sha256,
    run_main,
    within,
    write_json,
)

CONTROL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
# A user's turn and an answer in Llama-3's form.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
SPLIT = (  # Llama-3's
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts, vocab_size):
    """A byte-level BPE tokenizer in Llama-3's form: any text round-trips, control tokens last."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(CONTROL)
    return tokenizer


def save_tokenizer(tokenizer, folder):
    """tokenizer.json, and the chat template where published checkpoints have it."""
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    write_json(folder / "tokenizer_config.json", {**special, "chat_template": CHAT_TEMPLATE})


def config_of(tokenizer, hidden_size, layers):
    """config.json of a small Llama-3: grouped queries, theta 500,000, tied as Llama-3.2."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "torch_dtype": "float32",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "bos_token_id": tokenizer.token_to_id("<|begin_of_text|>"),
        "eos_token_id": tokenizer.token_to_id("<|eot_id|>"),
    }


def random_model(config, folder):
    """A CausalLM with fresh weights, its config.json written to `folder`."""
    write_json(folder / "config.json", config)
    model = backbone.CausalLM(backbone.Config.load(folder))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=config["initializer_range"])
    return model


def gist(meaning):
    """Who does what to whom, without time, place and adjectives."""
    _, subject, _, verb, obj, _, _ = meaning
    return None, subject, None, verb, obj, None, None


class Lines:
    """What the backbone reads, endlessly: (context, target) in token ids."""

    def __init__(self, tokenizer, stream, rng, args):
        """tokenizer: data.Tokenizer. stream: meanings."""
        self.tokenizer, self.stream, self.rng, self.args = tokenizer, stream, rng, args

    def three_languages(self, whole):
        """BOS, one text in three languages after a space or newline each, end of turn. The text is
        a sentence, or where `whole` is false a phrase of it, as in a dictionary."""
        meaning, texts = next(self.stream), []
        part = self.rng.choice([i for i, text in enumerate(parts(meaning, "en")) if text])
        for lang in self.rng.sample(list(PHRASE), 3):
            text = sentence(meaning, lang) if whole else parts(meaning, lang)[part]
            texts.append(self.tokenizer.ids(self.rng.choice(("\n", " ")) + text))
        begin = self.tokenizer.control["<|begin_of_text|>"]
        return [begin, *texts[0]], [*texts[1], *texts[2], self.tokenizer.stop_ids[0]]

    def instruction(self):
        """The prompt of the paper, in the chat format, and the gist in answer."""
        meaning = next(self.stream)
        src_lang, tgt_lang = self.rng.sample(list(PHRASE), 2)
        prompt = self.tokenizer.prompt(src_lang, tgt_lang, sentence(meaning, src_lang))
        answer = self.tokenizer.ids(sentence(gist(meaning), tgt_lang))
        return prompt, [*answer, self.tokenizer.stop_ids[0]]

    def batches(self):
        """(tokens, labels), both (B, T): phrases for --phrase-steps, then sentences, and
        instructions among them."""
        for step in itertools.count():
            rows = []
            whole = step >= self.args.phrase_steps
            for _ in range(self.args.lines):
                if whole and self.rng.random() < self.args.asked:
                    rows.append(self.instruction())
                else:
                    rows.append(self.three_languages(whole))
            yield padded(rows)


def padded(rows):
    """[(context, target), ...] as tokens and labels, both (B, T); the loss is the targets'."""
    T = max(len(context) + len(target) for context, target in rows) - 1
    tokens = torch.zeros(len(rows), T, dtype=torch.long)
    labels = torch.full((len(rows), T), IGNORE)
    for row, (context, target) in enumerate(rows):
        ids = torch.tensor(context + target)
        tokens[row, : len(ids) - 1] = ids[:-1]
        labels[row, len(context) - 1 : len(ids) - 1] = ids[len(context) :]
    return tokens, labels


def parse_args():
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    avoided = "folder that world.py wrote; its dev and test sentences are avoided"
    add("--world", required=True, help=avoided)
    add("--out", required=True, help="checkpoint folder to write")
    add("--vocab-size", type=int, default=1536)
    add("--hidden-size", type=int, default=96)
    add("--layers", type=int, default=4)
    add("--steps", type=int, default=700)
    add("--phrase-steps", type=int, default=300, help="steps on phrases before those on sentences")
    add("--lines", type=int, default=64, help="lines per step")
    asked = "share of lines, after the phrases, that are instructions"
    add("--asked", type=float, default=0.1, help=asked)
    add("--lr", type=float, default=4e-3)
    add("--seed", type=int, default=1)
    args = parser.parse_args()
    at_least(1, args, "layers", "steps", "lines")
    at_least(0, args, "phrase_steps")
    within(1, args, "asked")
    return args


def held_out_sentences(world):
    """English sentences of the world's dev and test sets."""
    languages = list(PHRASE)
    held_out = set()
    for split in ("dev", "devtest"):
        held_out.update(row[0] for row in read_flores(world, languages, split))
    for lang in languages[1:]:
        for split in ("dev", "test"):
            held_out.update(en for en, _ in read_opus(world, lang, split))
    return held_out


def tokenizer_for(stream, vocab_size):
    """A tokenizer that knows the world's words and the prompt's."""
    texts = []
    for meaning in itertools.islice(stream, 4000):
        for lang in PHRASE:
            text = sentence(meaning, lang)
            texts += ["\n" + text, " " + text]
    instruction = PROMPT.format(src="".join(f" {LANGUAGES[code].name}" for code in PHRASE), tgt="")
    # Frequent, as they are where real tokenizers come from.
    texts += ["user", "assistant", "\n\n", instruction] * 500
    return train_tokenizer(texts, vocab_size)


def pretrain(model, stream, args, checkpoint):
    """The loop. `stream`: batches(); goes on from `checkpoint`, if there is one."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
        print(f"{args.out}: resuming at step {first}")
    left = itertools.islice(stream, first, args.steps)
    bar = tqdm(left, desc="pre-training", initial=first, total=args.steps, disable=None)
    for step, (tokens, labels) in enumerate(bar, first):
        # Warm-up, flat, and down to nothing over the last fifth.
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 50, 5 * (1 - step / args.steps))
        is_target = labels != IGNORE  # (B, T)
        logits = model.lm_head(model(tokens)[is_target])  # (N, D) -> (N, V)
        loss = F.cross_entropy(logits, labels[is_target])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            accuracy = (logits.argmax(-1) == labels[is_target]).float().mean().item()
            line = f"step {step + 1}: loss {loss.item():.3f}, token accuracy {accuracy:.1%}"
            bar.write(line, file=sys.stdout)
            state = {"step": step + 1, "model": model.state_dict()}
            torch.save({**state, "optimizer": optimizer.state_dict()}, f"{checkpoint}.tmp")
            os.replace(f"{checkpoint}.tmp", checkpoint)


def main():
    args = parse_args()
    out = Path(args.out)
    config = {k: v for k, v in vars(args).items() if k not in ("out", "world")}
    if not (Path(args.world) / "done").exists():
        raise UserError(f"{args.world}: not made yet; run world.py --out {args.world} first")
    if (out / "config.json").exists() and not (out / "pretraining").exists():
        raise UserError(f"{out}: holds a checkpoint that this script did not make; choose another")
    config["world_sha256"] = file_sha256(Path(args.world) / "config.json")
    lock = claim(out / "pretraining", config)  # config.json of the folder itself is the model's
    if (out / "model.safetensors").exists():
        print(f"{out}: pre-trained already")
        return
    rng = random.Random(args.seed)
    held_out = held_out_sentences(args.world)
    stream = (meaning for meaning in meanings(rng) if sentence(meaning, "en") not in held_out)
    tokenizer = tokenizer_for(stream, args.vocab_size)
    torch.manual_seed(args.seed)
    shape = config_of(tokenizer, args.hidden_size, args.layers)
    model = random_model(shape, out)
    save_tokenizer(tokenizer, out)
    reads = Tokenizer(out, model.cfg)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size:,} parameters, {tokenizer.get_vocab_size()} tokens")
    lines = Lines(reads, stream, rng, args).batches()
    pretrain(model, lines, args, out / "pretraining/checkpoint.pt")
    save_backbone(model, shape, out)
    lock.close()
    print(f"{out}: saved")


if __name__ == "__main__":
    run_main(main)
