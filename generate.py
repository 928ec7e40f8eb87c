"""Batched greedy translation with a KV cache, any mix of directions in a batch.

    python generate.py --src de --tgt is "Der Hund schläft."
    python generate.py --src de --tgt is < lines.txt
    python generate.py --input pairs.jsonl --output translated.jsonl

The adapter is runs/stage2/adapter, or runs/stage1/adapter where there is no other. Also the module
by which pivot.py and evaluate.py translate. Shapes: B rows, T tokens, D hidden, V vocabulary.
"""

import support.interrupts  # noqa: F401 - before all else

import itertools
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from crosslora import CrossLoRA, load_adapter, read_description
from data import LANGUAGES, Tokenizer
from model import CausalLM, Config, KVCache, load
from support import runs
from support.corpora import read_jsonl
from support.runs import UserError
from support.text import input_lines, is_empty
from support.translations import Translator, decoding_order, report_cut, translate_jsonl


class Row(NamedTuple):
    """A sentence to decode."""

    key: int  # the caller's name for it
    prompt: list[int]  # token ids
    src_lang: str
    tgt_lang: str
    room: int  # most new tokens, at least 1


# --- greedy decoding ------------------------------------------------------------------------------


def greedy(logits: Tensor) -> Tensor:
    """The likeliest token of each row: (B, V) -> (B, 1)."""
    return logits.argmax(-1, keepdim=True)


def decode(
    model: CausalLM,
    adapter: CrossLoRA | None,
    rows: Iterable[Row],
    stop_ids: tuple,
    batch_size: int,
    choose: Callable[[Tensor], Tensor] = greedy,
) -> Iterator[tuple[int, list[int], str]]:
    """Continuation of `rows`, `batch_size` together: (key, new token ids, "stop" or "length") of
    each, "length" where it was cut off after `room` tokens. choose: logits -> next tokens. fast/
    has its own, which is greedy: another choice takes --plain."""
    rows = iter(rows)
    while batch := list(itertools.islice(rows, batch_size)):
        yield from decode_batch(model, adapter, batch, stop_ids, choose)


@torch.inference_mode()
def decode_batch(
    model: CausalLM, adapter: CrossLoRA | None, batch: list[Row], stop_ids: tuple, choose: Callable
) -> list[tuple[int, list[int], str]]:
    """As decode, for one batch: prompts at once, then token by token until every row has ended."""
    device = model.device
    longest = max(len(row.prompt) for row in batch)
    pads = [longest - len(row.prompt) for row in batch]
    # Pads on the left, so that all rows go on at the same slot of the cache.
    tokens = [[0] * pad + row.prompt for pad, row in zip(pads, batch)]
    tokens = torch.tensor(tokens, device=device)  # (B, T)
    pads = torch.tensor(pads, device=device)  # (B,)
    lora = None
    if adapter is not None:
        src_langs, tgt_langs = [row.src_lang for row in batch], [row.tgt_lang for row in batch]
        lora = adapter(src_langs, tgt_langs, model.dtype)
    slots = longest + max(row.room for row in batch)
    cache = KVCache(model.cfg, len(batch), slots, device, model.dtype)
    outputs = [[] for _ in batch]
    finish = [""] * len(batch)
    while not all(finish):
        hidden = model(tokens, lora, cache, pads)[:, -1]  # (B, T) -> (B, T, D) -> (B, D)
        tokens = choose(model.lm_head(hidden))  # (B, D) -> (B, V) -> (B, 1)
        for b, token in enumerate(tokens[:, 0].tolist()):
            if finish[b]:
                continue  # what follows the end of a row is ignored
            if token in stop_ids:
                finish[b] = "stop"
                continue
            outputs[b].append(token)
            if len(outputs[b]) == batch[b].room:
                finish[b] = "length"
    return [(row.key, ids, end) for row, ids, end in zip(batch, outputs, finish)]


# --- the engine: backbone, tokenizer, adapter -----------------------------------------------------


class Engine(NamedTuple):
    model: CausalLM
    adapter: CrossLoRA | None
    tokenizer: Tokenizer
    languages: list[str]
    decode: Callable  # decode above, or fast/'s
    identity: dict  # what a result depends on: outputs of another are never continued
    via_english: bool = False  # see support/baselines.py

    @property
    def place(self) -> str:
        return f"{self.model.device} in {self.identity['dtype']}"

    def translate_each(self, rows: list[dict], max_new_tokens: int, batch_size: int) -> Iterator:
        """Greedy translations of `rows` (src_lang, tgt_lang, src): (index, text, "stop" or
        "length"), in the order in which they end. "length" marks an output cut off at
        `max_new_tokens` or at the model's last position; a sentence that alone fills those gives an
        empty one."""
        queue, too_long = [], []
        for i in decoding_order(rows):
            langs = rows[i]["src_lang"], rows[i]["tgt_lang"]
            prompt = self.tokenizer.prompt(*langs, rows[i]["src"])
            room = self.model.cfg.max_position_embeddings - len(prompt)
            if room > 0:
                queue.append(Row(i, prompt, *langs, min(room, max_new_tokens)))
            else:
                too_long.append(i)
        stop_ids = self.tokenizer.stop_ids
        for i, ids, finish in self.decode(self.model, self.adapter, queue, stop_ids, batch_size):
            yield i, self.tokenizer.decode(ids), finish
        for i in too_long:
            yield i, "", "length"


def default_adapter() -> str:
    """The last stage's adapter that there is. Raises UserError where there is none."""
    for folder in ("runs/stage2/adapter", "runs/stage1/adapter"):
        if (Path(folder) / "adapter.json").exists():
            return folder
    raise UserError(
        "no runs/stage2/adapter or runs/stage1/adapter here; `train.py --stage 1` makes one, "
        "--adapter takes another, --model a backbone to run without"
    )


def load_engine(
    model: str | None,
    adapter: str | None,
    prompt_format: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    fast: ModuleType | None = None,
) -> Engine:
    """Backbone, tokenizer and, where `adapter` is a folder, adapter. `model` defaults to what the
    adapter was made for, and so does the prompt. fast: the package, or None. Raises UserError for
    an adapter of another backbone or prompt."""
    device, dtype = runs.device_and_dtype(device, dtype)
    if adapter is not None:
        description = read_description(adapter)
        model = model or description["backbone"]
        if description["prompt_format"] == "plain":
            prompt_format = "plain"
    folder, _ = runs.resolve(model)
    tokenizer = Tokenizer(folder, Config.load(folder), prompt_format)
    lm = load(folder, device, dtype)
    here = {"backbone_fingerprint": lm.fingerprint(), **tokenizer.describe()}
    identity = {
        "backbone": here["backbone_fingerprint"],
        "adapter": None,
        "prompt_sha256": here["prompt_sha256"],
        "dtype": runs.dtype_name(dtype),
        "engine": runs.engine_name(fast),
    }
    lora, languages = None, list(LANGUAGES)
    if adapter is not None:
        lora, _ = load_adapter(adapter, lm.cfg, here)
        lora.requires_grad_(False).to(device)
        languages = lora.languages
        identity["adapter"] = runs.file_sha256(Path(adapter) / "adapter.safetensors")
    if fast:
        fast.prepare(lm, lora, training=False)
    return Engine(lm, lora, tokenizer, languages, fast.decode if fast else decode, identity)


def check_languages(engine: Translator, languages: set[str], who: str) -> None:
    """Raises UserError if the engine, which the user knows as `who`, lacks one of `languages`."""
    strangers = sorted(languages.difference(engine.languages))
    if strangers:
        has = ", ".join(engine.languages)
        raise UserError(f"{who}: has nothing for {', '.join(strangers)}; it has {has}")


# --- the command ----------------------------------------------------------------------------------


def add_translation_arguments(parser: runs.ArgumentParser) -> None:
    add = parser.add_argument
    together = "sentences decoded together; in fp32 it does not change results"
    add("--batch-size", type=int, default=128, help=together)
    add("--max-new-tokens", type=int, default=256, help="longer outputs are cut off and say so")
    runs.add_device_arguments(parser)


def add_engine_arguments(parser: runs.ArgumentParser) -> None:
    """Flags of every script that translates with load_engine()."""
    add = parser.add_argument
    add("--model", help="backbone: folder or hub name; default: the adapter's; alone: no adapter")
    add("--adapter", help="adapter folder that train.py wrote")
    chat = "auto: the backbone's own chat template, or what the adapter was trained with"
    add("--prompt-format", default="auto", choices=["auto", "plain"], help=chat)
    runs.add_plain_argument(parser)
    add_translation_arguments(parser)


def parse_args() -> Namespace:
    parser = runs.ArgumentParser(__doc__)
    add = parser.add_argument
    add("text", nargs="?", help="sentence; without it and without --input, lines of stdin")
    add("--src", help="source language code")
    add("--tgt", help="target language code")
    add("--input", help="JSONL file whose lines carry src_lang, tgt_lang and src")
    add("--output", help="where --input's translations go: the same lines with hyp and finish")
    add_engine_arguments(parser)
    args = parser.parse_args()
    runs.at_least(1, args, "batch_size", "max_new_tokens")
    if args.adapter is None and args.model is None:
        args.adapter = default_adapter()
    return args


def read_rows(args: Namespace) -> list[dict]:
    """What is to be translated: --input's lines, the sentence, or lines of stdin."""
    if args.input is not None or args.output is not None:
        if None in (args.input, args.output) or args.text is not None or args.src or args.tgt:
            raise UserError(
                "--input goes with --output, and the file's lines name the languages: "
                "no text, --src or --tgt"
            )
        runs.check_output(args.output)
        return read_jsonl(args.input, LANGUAGES, need=("src",))
    for flag, code in (("--src", args.src), ("--tgt", args.tgt)):
        if code not in LANGUAGES:
            wrong = f"{code}: unknown language" if code else "is needed"
            raise UserError(f"{flag} {wrong}; known: {', '.join(LANGUAGES)}")
    if args.src == args.tgt:
        raise UserError(f"--src and --tgt are both {args.src}")
    if runs.launch().world > 1:
        raise UserError("a text or stdin is for one process; torchrun takes --input and --output")
    lines = input_lines(args.text)
    return [{"src_lang": args.src, "tgt_lang": args.tgt, "src": line} for line in lines]


def translate_lines(engine: Engine, rows: list[dict], args: Namespace) -> list[dict]:
    """Translate `rows` to stdout, a line for a line; an empty line stays an empty line."""
    numbers = [i for i, row in enumerate(rows) if not is_empty(row["src"])]
    full = [rows[i] for i in numbers]
    each = engine.translate_each(full, args.max_new_tokens, args.batch_size)
    done = [{"hyp": "", "finish": "stop"} for _ in rows]
    for n, hyp, finish in runs.progress(each, total=len(full), desc="translating"):
        done[numbers[n]] = {"hyp": hyp, "finish": finish}
    for row in done:
        print(" ".join(row["hyp"].splitlines()))
    return done


def main() -> None:
    args = parse_args()
    rows = read_rows(args)
    ranks = runs.init_distributed(args.device, args.timeout)
    fast = runs.load_fast(args.plain, ranks)
    engine = load_engine(
        args.model, args.adapter, args.prompt_format, args.device, args.dtype, fast
    )
    languages = {row["src_lang"] for row in rows} | {row["tgt_lang"] for row in rows}
    check_languages(engine, languages, args.adapter or args.model)
    size, most = args.batch_size, args.max_new_tokens
    if args.input is not None:
        done = translate_jsonl(engine, rows, args.output, size, most, ranks, "translating")
    else:
        done = translate_lines(engine, rows, args)
    if ranks.rank == 0:
        report_cut(done, args.max_new_tokens)


if __name__ == "__main__":
    runs.run_main(main)
