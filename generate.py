"""Batched greedy translation with a KV cache, any mix of directions in a batch.

    python generate.py --adapter runs/stage2/adapter --src de --tgt is "Der Hund schläft."
    python generate.py --adapter runs/stage2/adapter --src de --tgt is < lines.txt
    python generate.py --adapter runs/stage2/adapter --input pairs.jsonl --output translated.jsonl

Also the module by which pivot.py and evaluate.py translate. B rows in decoding, n whose prompts are read, T tokens of those,
D hidden, V vocabulary.
"""

import argparse
import dataclasses
import glob
import hashlib
import itertools
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import model as backbone
from attention import Rows
from crosslora import load_adapter, read_description
from data import FORMATS, LANGUAGES, Tokenizer, read_jsonl
from devices import Recorded, add_device_arguments, device_and_dtype, dtype_name, init_distributed
from files import UserError, at_least, check_output, file_sha256, open_alone, resolve, run_main, write_jsonl

PROMPTS = {"cpu": 2**10, "cuda": 2**14}  # tokens of prompts, copied ones too, in one pass: wide enough for the products, little memory
SLOTS = {"cpu": 2**17, "cuda": 2**18}  # of the cache, all rows together, about: 16 GiB for 2**17 of Llama-3-8B in bf16
REFILL = {"cpu": 8, "cuda": 4}  # waiting rows are read when one in so many places is free: on a GPU a pass costs two steps at least


class Engine(NamedTuple):
    model: backbone.CausalLM
    adapter: torch.nn.Module | None
    tokenizer: Tokenizer
    languages: list
    dtype: torch.dtype
    identity: dict  # fingerprint of the backbone, hash of the adapter: what a result depends on
    via_english: bool = False  # translates non-English directions in two hops, see baselines.py

    def translate_each(self, rows, max_new_tokens, batch_size):
        """Greedy translations of `rows` (dicts with src_lang, tgt_lang, src): (index, text, "stop" | "length") as they end.

        "length" marks an output cut off at `max_new_tokens` or at the last position the model has; a sentence that alone
        fills those gives an empty one.
        """
        too_long = []
        def queue():
            for i in decoding_order(rows):
                langs = rows[i]["src_lang"], rows[i]["tgt_lang"]
                prompt = self.tokenizer.prompt(*langs, rows[i]["src"])
                room = min(max_new_tokens, self.model.cfg.max_position_embeddings - len(prompt))
                if room > 0:
                    yield Row(i, prompt, *langs, room)
                else:
                    too_long.append(i)

        for row in decode(self.model, self.adapter, self.dtype, queue(), self.tokenizer.stop_ids, batch_size):
            yield row.key, self.tokenizer.decode(row.out), row.finish
        yield from ((i, "", "length") for i in too_long)


def load_engine(model, adapter, prompt_format="auto", device="auto", dtype="auto"):
    """Backbone, tokenizer and, if `adapter` is a folder, adapter. `model` defaults to what the adapter was made for;
    so does the prompt format, and asking an adapter for another one raises UserError."""
    if adapter is None and model is None:
        raise UserError("--adapter or --model is needed: an adapter folder, or a backbone to run without adapter")
    device, dtype = device_and_dtype(device, dtype)
    if adapter is not None:
        made_for = read_description(adapter)
        model = model or made_for["backbone"]
        if prompt_format not in ("auto", made_for["prompt_format"]):
            raise UserError(f"--prompt-format {prompt_format}: {adapter} was trained with {made_for['prompt_format']}")
        prompt_format = made_for["prompt_format"]
    folder, _ = resolve(model)
    tokenizer = Tokenizer(folder, backbone.Config.load(folder), prompt_format)
    lm = backbone.load(folder, device, dtype)
    identity = {"backbone": lm.fingerprint(), "adapter": None, "prompt_format": tokenizer.format,
                "dtype": dtype_name(dtype)}
    lm.pack()
    if adapter is None:
        return Engine(lm, None, tokenizer, list(LANGUAGES), dtype, identity)
    lora, description = load_adapter(adapter, lm.cfg, identity["backbone"], tokenizer.sha256)
    identity["adapter"] = file_sha256(Path(adapter) / "adapter.safetensors")
    lora.to(device, None if lora.learned else dtype)  # cast once; a learned router stays fp32
    return Engine(lm, lora.eval(), tokenizer, description["languages"], dtype, identity)


def check_languages(engine, languages, who):
    """Raises UserError if the engine, which the user knows as `who`, has nothing for one of these languages, a set."""
    if strangers := sorted(languages.difference(engine.languages)):
        raise UserError(f"{who}: has nothing for {', '.join(strangers)}; it has {', '.join(engine.languages)}")


@dataclasses.dataclass
class Row:
    """A sentence in decoding."""
    key: int  # the caller's
    prompt: list  # token ids
    src_lang: str
    tgt_lang: str
    room: int  # most new tokens, at least 1
    out: list = dataclasses.field(default_factory=list)  # new token ids
    finish: str = ""  # then "stop" or "length"


@torch.inference_mode()
def decode(lm, adapter, dtype, queue, stop_ids, batch_size, record=None):
    """Greedy continuation of the Rows of `queue`, an iterator, yielded in the order in which they end.

    At most `batch_size` are decoded together, fewer if the longest of the first would make the cache too large. When an eighth (a quarter
    on a GPU) has ended, waiting ones take their places. A row keeps its own positions and limit, whatever its company; keys and values of
    what its prompt has in common with the beginning of an earlier one of its direction are copied from there. record: all experts are at
    hand, so that a step takes any rows, and devices.Recorded plays it; default: on a GPU.
    """
    device = lm.device
    rows = list(itertools.islice(queue, batch_size))  # by place in the batch of B; where one has ended the place is free
    fit = max(1, SLOTS[device.type] // max((len(row.prompt) + row.room for row in rows), default=1))
    rows, queue = rows[:fit], itertools.chain(rows[fit:], queue)
    fresh = list(range(len(rows)))  # places whose prompt was not read yet
    cache, token = backbone.KVCache(lm.cfg, len(rows), 0, device, dtype), torch.zeros(len(rows), dtype=torch.long, device=device)
    record = device.type == "cuda" if record is None else record
    routed = adapter((), (), dtype) if adapter is not None and adapter.learned else None  # for any rows; once: a record keeps to its memory
    stacked = [*adapter.stacked(dtype)] if record and adapter is not None and routed is None else None
    direction = lambda b: (rows[b].src_lang, rows[b].tgt_lang)
    languages = lambda places: zip(*map(direction, places))  # (src_langs, tgt_langs)

    def read(part, known):
        """Prompts of the rows at places `part` go into the cache, first new tokens into `token`.
        known: {direction: place of a row of it whose prompt is there}."""
        places = torch.tensor(part, device=device)
        donors = [known.get(direction(b), b) for b in part]  # or the row itself
        common = lambda a, b: len(os.path.commonprefix([rows[a].prompt, rows[b].prompt[:-1]]))  # works on ids too
        copied = [0 if a == b else common(a, b) for a, b in zip(donors, part)]  # numbers of tokens
        cache.copy(torch.tensor(donors, device=device), places, max(copied))
        new = [rows[b].prompt[n:] for b, n in zip(part, copied)]
        batch = Rows.of([*map(len, new)], device, copied, places)
        if adapter is None or routed:
            lora = routed
        else:
            lora = adapter(*languages(part), dtype, counts=batch.lengths, last=[1] * len(part), stacked=stacked)
        tokens = torch.tensor([[*itertools.chain(*new)]], device=device)  # (1, T)
        hidden = lm(tokens, lora, batch, cache, wanted=batch.starts[None, 1:] - 1)  # (1, T) -> (1, n, D)
        token[places] = lm.greedy(hidden[0])  # (n, D) -> (n,)

    def step(token, at, *columns):
        batch = Rows([1] * len(token), torch.arange(len(token) + 1, dtype=torch.int32, device=device), at[None])
        updates = adapter.by_token(stacked, itertools.repeat(columns[0])) if columns else lora
        return lm.greedy(lm(token[None], updates, batch, cache)[0])  # (1, B) -> (1, B, D) -> (B,)

    lora, columns, recorded, shape = routed, None, None, None
    while rows:
        if fresh:
            columns = None  # and the rows' experts are out of date: the next step finds them anew
            fresh.sort(key=lambda b: -len(rows[b].prompt))
            # An output is about as long as its prompt: so the cache moves seldom.
            cache.reserve(max(len(rows[b].prompt) + min(len(rows[b].prompt), rows[b].room) for b in fresh))
            others = sorted({*range(len(rows))}.difference(fresh))
            known = {direction(b): b for b in others if not rows[b].finish}  # a step writes over slot 0 of ended ones
            # The longest of each direction is read whole, then the others (reversed, since in a dict the last of a key stays).
            first = {direction(b): b for b in reversed(fresh) if direction(b) not in known}
            for some in first.values(), [b for b in fresh if first.get(direction(b)) != b]:
                sums = itertools.accumulate(len(rows[b].prompt) for b in some)  # those in the same multiple of PROMPTS share a pass
                for _, part in itertools.groupby(zip(some, sums), key=lambda x: x[1] // PROMPTS[device.type]):
                    read([b for b, _ in part], known)
                known |= first
        else:
            if columns is None:
                langs = [*languages(range(len(rows)))]
                columns = [] if stacked is None else [adapter.columns(*langs, [1] * len(rows))]  # a recorded step's input
                if not (adapter is None or routed or record):
                    lora = adapter.grouped(*langs, dtype, lora)
            at = [0 if row.finish else len(row.prompt) + len(row.out) - 1 for row in rows]  # where each row's last token stands
            cache.reserve(max(at) + 1)
            at = torch.tensor(at, device=device)
            if record and shape != cache.k[0].shape:  # no record yet, or for a cache that has moved since
                recorded, shape = Recorded(recorded, step, token, at, *columns), cache.k[0].shape
                token = recorded.first
            else:
                token = (recorded or step)(token, at, *columns)
        new = token.tolist()
        for row, t in [(rows[b], new[b]) for b in fresh or range(len(rows)) if not rows[b].finish]:
            if t in stop_ids:
                row.finish = "stop"
            else:
                row.out.append(t)
                row.finish = "length" if len(row.out) == row.room else ""
            if row.finish:
                yield row
        fresh, free = [], [b for b, row in enumerate(rows) if row.finish]
        if REFILL[device.type] * len(free) >= len(rows):
            waiting = list(itertools.islice(queue, len(free)))
            fresh = free[: len(waiting)]
            for b, row in zip(fresh, waiting):
                rows[b] = row
            # One free place in so many makes it pay to find the rows' experts anew, on a GPU to record anew.
            one_in = 5 if not record else 2 if len(rows) > 64 else 1
            if not waiting and one_in * len(free) >= len(rows):
                count = len(rows) - len(free)  # the rows beyond fill the gaps before, so that the others stay, with their experts
                gaps = [b for b in free if b < count]
                last = [b for b in range(count, len(rows)) if not rows[b].finish]  # as many
                for gap, b in zip(gaps, last, strict=True):
                    rows[gap] = rows[b]
                gaps, last = (torch.tensor(x, dtype=torch.long, device=device) for x in (gaps, last))
                cache.copy(last, gaps)
                token[gaps] = token[last]
                cache.each(lambda x: x[:count])
                rows, token, columns = rows[:count], token[:count], None


def decoding_order(rows):
    """Indices of `rows`, longest source first, so that rows in decoding are of similar length and none is left over at the end.
    Among sources of much the same length a direction at a time: fewer experts are at work, and prompts have more in common."""
    return sorted(range(len(rows)), key=lambda i: (-(len(rows[i]["src"]) // 16), rows[i]["src_lang"], rows[i]["tgt_lang"]))


def read_part(path):
    """Finished rows of a part file as {id: row}, and its length up to the last whole line (a kill can cut the last)."""
    whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
    return {row["id"]: row for row in map(json.loads, whole.splitlines())}, len(whole) + bool(whole)


def job_of(engine, rows, max_new_tokens):
    """8 hex digits of what translations depend on, for the names of files that hold a part of them."""
    return hashlib.sha256(json.dumps([rows, max_new_tokens, engine.identity]).encode()).hexdigest()[:8]


def finished(out, parts, ranks):
    """The rows of `out`, now that it is whole; the first rank removes `parts`, those too that a killed run has left beside it."""
    ranks.barrier()
    if ranks.rank == 0:
        for part in parts:
            part.unlink(missing_ok=True)
    return ranks.of_first(lambda: [json.loads(line) for line in out.read_text(encoding="utf-8").split("\n") if line])


def translate_jsonl(engine, rows, out, batch_size, max_new_tokens, ranks, desc):
    """Translate `rows` into the JSONL file `out` (each row plus "hyp" and "finish"), and return its rows. `engine` has
    `translate_each` and `identity`: an Engine or a baselines.Baseline.

    Rows are dealt to the ranks in turn, in decoding_order. Finished ones are appended to `out`.part-JOB-RANK, so a
    stopped run goes on where it was, on any number of ranks; `out` itself appears when it is whole.
    """
    out = Path(out)
    stem = f"{out.name}.part-{job_of(engine, rows, max_new_tokens)}"  # another job's leftovers are not ours
    parts = lambda: list(out.parent.glob(f"{glob.escape(stem)}-*"))
    if not ranks.of_first(out.exists):
        done = ranks.of_first(lambda: {i for part in parts() for i in read_part(part)[0]})  # so nobody writes before it has read
        mine = [i for i in decoding_order(rows) if i not in done][ranks.rank :: ranks.world]
        part = out.with_name(f"{stem}-{ranks.rank}")
        with open_alone(part, out) as file, tqdm(total=len(mine), desc=desc, unit="sent", disable=ranks.rank > 0 or None) as bar:
            file.truncate(read_part(part)[1])
            for n, hyp, finish in engine.translate_each([rows[i] for i in mine], max_new_tokens, batch_size):
                file.write((json.dumps({"id": mine[n], "hyp": hyp, "finish": finish}, ensure_ascii=False) + "\n").encode())
                file.flush()
                bar.update()
        ranks.barrier()
        if ranks.rank == 0:
            done = {i: row for part in parts() for i, row in read_part(part)[0].items()}
            if len(done) < len(rows):
                raise UserError(f"{out}: not all parts of it are to be seen here yet; the same command continues from here")
            write_jsonl(out, [{**row, "hyp": done[i]["hyp"], "finish": done[i]["finish"]} for i, row in enumerate(rows)])
    return finished(out, parts(), ranks)


def add_translation_arguments(parser):
    parser.add_argument("--batch-size", type=int, default=128,
                        help="sentences decoded together; in fp32 it does not change results. 512 is faster on a GPU of 80 GB")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longer outputs are cut off and say so")
    add_device_arguments(parser)


def add_engine_arguments(parser):
    """Flags of every script that translates with load_engine()."""
    parser.add_argument("--model", help="backbone: checkpoint folder or hub name; default: the one the adapter was made for")
    parser.add_argument("--adapter", help="adapter folder that train.py wrote; without it the bare backbone translates")
    parser.add_argument("--prompt-format", default="auto", choices=["auto", *FORMATS],
                        help="auto: the adapter's, else the tokenizer's own chat format")
    add_translation_arguments(parser)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", help="sentence to translate; without it and without --input, lines of stdin")
    parser.add_argument("--src", help="source language code")
    parser.add_argument("--tgt", help="target language code")
    parser.add_argument("--input", help="JSONL file whose lines carry src_lang, tgt_lang and src")
    parser.add_argument("--output", help="where --input's translations go: the same lines with hyp and finish")
    add_engine_arguments(parser)
    args = parser.parse_args()
    at_least(1, args, "batch_size", "max_new_tokens")
    if args.input is not None or args.output is not None:
        if args.input is None or args.output is None or args.text is not None or args.src or args.tgt:
            raise UserError("--input goes with --output, and the file's lines name the languages: no text, --src or --tgt")
        check_output(args.output)
        rows = read_jsonl(args.input, need=("src",))
    else:
        for flag, code in (("--src", args.src), ("--tgt", args.tgt)):
            if code not in LANGUAGES:
                raise UserError(f"{flag} {f'{code}: unknown language' if code else 'is needed'}; known: {', '.join(LANGUAGES)}")
        if args.src == args.tgt:
            raise UserError(f"--src and --tgt are both {args.src}")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("a text or stdin is work for one process; under torchrun give --input and --output")
        try:
            lines = [args.text] if args.text is not None else sys.stdin.buffer.read().decode().split("\n")
            "".join(lines).encode()
        except UnicodeError:
            raise UserError("the text is not UTF-8") from None
        rows = [{"src_lang": args.src, "tgt_lang": args.tgt, "src": line} for line in lines]
        if args.text is None and not lines[-1]:
            rows.pop()  # what stands behind the last line's end is none
    ranks = init_distributed(args.device)
    engine = load_engine(args.model, args.adapter, args.prompt_format, args.device, args.dtype)
    check_languages(engine, {row[side] for row in rows for side in ("src_lang", "tgt_lang")}, args.adapter or args.model)
    if args.input is not None:
        done = translate_jsonl(engine, rows, args.output, args.batch_size, args.max_new_tokens, ranks, "translating")
    else:
        full = [r for r in rows if r["src"].strip()]  # an empty line stays an empty line
        each = engine.translate_each(full, args.max_new_tokens, args.batch_size)
        each = tqdm(each, total=len(full), desc="translating", disable=len(full) <= args.batch_size or None)
        results = {n: {"hyp": hyp, "finish": finish} for n, hyp, finish in each}
        found = (results[n] for n in range(len(full)))
        done = [next(found) if r["src"].strip() else {"hyp": "", "finish": "stop"} for r in rows]
        sys.stdout.writelines(" ".join(row["hyp"].splitlines()) + "\n" for row in done)
    cut = sum(row["finish"] == "length" for row in done)
    if cut and ranks.rank == 0:
        print(f"{cut} of {len(done)} outputs were cut off at --max-new-tokens {args.max_new_tokens}", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
