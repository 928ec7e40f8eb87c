"""Batched greedy translation with a KV cache, any mix of directions in a batch.

    python generate.py --adapter runs/stage2/adapter --src de --tgt is "Der Hund schläft."
    python generate.py --adapter runs/stage2/adapter --src de --tgt is < lines.txt
    python generate.py --adapter runs/stage2/adapter --input pairs.jsonl --output translated.jsonl

Also the module by which pivot.py and evaluate.py translate, and where device, precision and process group are
decided for every script. B batch rows, T tokens, D hidden, V vocabulary.
"""

import argparse
import atexit
import hashlib
import itertools
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

import model as backbone
from crosslora import load_adapter, read_description
from data import FORMATS, LANGUAGES, PIVOT, Tokenizer, read_jsonl
from files import UserError, claim, file_sha256, run_main, write_jsonl

DEFAULT_MODEL = "meta-llama/Meta-Llama-3-8B-Instruct"  # section 4.2; Qwen/Qwen2.5-7B-Instruct is the other


def language_identifier(languages):
    """langid restricted to `languages` (it is weak on short text, and worse with its other 90 to choose from):
    a function from text to code."""
    from langid.langid import LanguageIdentifier, model  # unpacks its model on import

    identifier = LanguageIdentifier.from_modelstring(model)
    unknown = sorted(set(languages) - set(identifier.nb_classes))
    if unknown:
        raise UserError(f"langid does not know {', '.join(unknown)}: off-target output can't be told")
    identifier.set_languages(list(languages))
    return lambda text: identifier.classify(text)[0]


class Ranks(NamedTuple):
    """This process among those that torchrun started; (0, 1) under plain python."""

    rank: int
    world: int

    def barrier(self):
        if self.world > 1:
            dist.barrier()


def init_distributed(device):
    """Join the process group that torchrun's environment describes, if any: NCCL on GPUs, gloo on CPUs.
    `device` is the flag: auto, cpu or cuda. Raises UserError for more processes than GPUs."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        cuda = device != "cpu" and torch.cuda.is_available()
        if cuda:
            local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
            if local > torch.cuda.device_count():
                raise UserError(f"{local} processes but {torch.cuda.device_count()} GPUs here; start as many as there are, or pass --device cpu")
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if cuda else "gloo")
        atexit.register(dist.destroy_process_group)
    return Ranks(int(os.environ.get("RANK", "0")), world)


def claim_run(folder, config, ranks):
    """files.claim by the first rank, and its refusal on every rank. Returns the lock, None on the others."""
    lock, refusal = None, [None]
    if ranks.rank == 0:
        try:
            lock = claim(folder, config)
        except UserError as error:
            refusal = [str(error)]
    if ranks.world > 1:
        dist.broadcast_object_list(refusal)
    if refusal[0]:
        raise UserError(refusal[0])
    return lock


def device_and_dtype(device, dtype="auto"):
    """Where and how precisely the backbone computes: bf16 on a GPU and fp32 on a CPU unless `dtype` says otherwise.
    Adapter parameters, optimizer and loss are fp32 everywhere. `device` is auto, cpu or cuda."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU is visible to torch")
    if device == "cpu" or not torch.cuda.is_available():
        where, precision = torch.device("cpu"), torch.float32
    else:
        where, precision = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))), torch.bfloat16
    return where, precision if dtype == "auto" else getattr(torch, dtype)


def add_device_arguments(parser):
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"], help="of the backbone; auto: bfloat16 on a GPU, float32 on a CPU")


class Engine(NamedTuple):
    model: backbone.CausalLM
    adapter: torch.nn.Module | None
    tokenizer: Tokenizer
    languages: list
    device: torch.device
    dtype: torch.dtype
    identity: dict  # fingerprint of the backbone, hash of the adapter: what a result depends on
    via_english: bool = False  # translates non-English directions in two hops, see baselines.py

    def translate(self, rows, max_new_tokens):
        return translate_batch(self, rows, max_new_tokens)


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
    folder, _ = backbone.resolve(model)
    tokenizer = Tokenizer(folder, backbone.Config.load(folder), prompt_format)
    lm = backbone.load(folder, device, dtype)
    identity = {"backbone": lm.fingerprint(), "adapter": None, "prompt_format": tokenizer.format, "dtype": str(dtype).removeprefix("torch.")}
    if adapter is None:
        return Engine(lm, None, tokenizer, list(LANGUAGES), device, dtype, identity)
    lora, description = load_adapter(adapter, lm.cfg, lm.fingerprint(), tokenizer.sha256)
    identity["adapter"] = file_sha256(Path(adapter) / "adapter.safetensors")
    return Engine(lm, lora.to(device).eval(), tokenizer, description["languages"], device, dtype, identity)


@torch.inference_mode()
def translate_batch(engine, rows, max_new_tokens):
    """Greedy translations of `rows` (dicts with src_lang, tgt_lang, src): [(text, "stop" | "length"), ...].

    Prompts are padded on the right and every row keeps its own positions and limit, so a row's result does not depend
    on its company. Rows that end leave the batch. "length" marks an output cut off at `max_new_tokens` or at the last
    position the model has; a sentence that alone fills those gives an empty one.
    """
    lm, tokenizer, device = engine.model, engine.tokenizer, engine.device
    prompts = [tokenizer.prompt(r["src_lang"], r["tgt_lang"], r["src"]) for r in rows]
    room = [min(max_new_tokens, lm.cfg.max_position_embeddings - len(prompt)) for prompt in prompts]
    outputs, finish = [[] for _ in rows], ["length"] * len(rows)
    alive = [row for row in range(len(rows)) if room[row] > 0]  # rows of `rows` in the batch, in the batch's order
    if not alive:
        return [("", "length")] * len(rows)
    B, T = len(alive), max(len(prompts[row]) for row in alive)
    tokens = torch.zeros(B, T, dtype=torch.long)
    for i, row in enumerate(alive):
        tokens[i, : len(prompts[row])] = torch.tensor(prompts[row])
    lora = None
    if engine.adapter is not None:
        lora = engine.adapter([rows[row]["src_lang"] for row in alive], [rows[row]["tgt_lang"] for row in alive], engine.dtype)
    cache = backbone.KVCache(lm.cfg, B, T + max(room), device, engine.dtype)
    hidden = lm(tokens.to(device), lora, torch.arange(T, device=device).expand(B, T), cache, slots=T)  # (B, T, D)
    position = torch.tensor([len(prompts[row]) for row in alive], device=device)  # (B,) where each row's next token goes
    last = hidden[torch.arange(B, device=device), position - 1]  # (B, D)
    for slots in itertools.count(T + 1):  # room for the longest row's next token; shorter rows' masks hide the rest
        token = lm.head(last).argmax(-1)  # (B, V) -> (B,)
        for row, t in zip(alive, token.tolist()):
            if finish[row] == "length" and len(outputs[row]) < room[row]:
                if t in tokenizer.stop_ids:
                    finish[row] = "stop"
                else:
                    outputs[row].append(t)
        going = [i for i, row in enumerate(alive) if finish[row] == "length" and len(outputs[row]) < room[row]]
        if not going:
            return [(tokenizer.decode(ids), reason) for ids, reason in zip(outputs, finish)]
        if len(going) <= 0.8 * len(alive):  # copying the cache pays once a fifth of the rows is done
            keep = torch.tensor(going, device=device)
            alive, token, position = [alive[i] for i in going], token[keep], position[keep]
            cache.select(keep)
            if lora is not None:
                lora = [{name: update.select(keep) for name, update in layer.items()} for layer in lora]
        last = lm(token[:, None], lora, position[:, None], cache, slots)[:, 0]  # (B, 1, D) -> (B, D)
        position = position + 1


def read_part(path):
    """Finished rows of a part file as {id: row}, and its length up to the last whole line (a kill can cut the last)."""
    whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
    return {row["id"]: row for row in map(json.loads, whole.splitlines())}, len(whole) + bool(whole)


def translate_jsonl(engine, rows, out, batch_size, max_new_tokens, ranks, desc):
    """Translate `rows` into the JSONL file `out` (each row plus "hyp" and "finish"), and return its rows. `engine` has
    `translate` and `identity`: an Engine or a baselines.Baseline.

    Batches are cut from the rows sorted by length, longest first, and dealt to the ranks in turn. Finished batches
    are appended to `out`.part-JOB-RANK, so a stopped run goes on where it was, on any number of ranks; `out` itself
    appears when it is whole.
    """
    out = Path(out)
    if not out.exists():
        job = hashlib.sha256(json.dumps([rows, max_new_tokens, engine.identity]).encode()).hexdigest()[:8]
        stem = f"{out.name}.part-{job}"  # another job's leftovers are not ours
        done = {i: row for part in out.parent.glob(f"{stem}-*") for i, row in read_part(part)[0].items()}
        ranks.barrier()  # nobody writes before everybody has read
        order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]["src"]), i))
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        mine = [b for b in batches if not all(i in done for i in b)][ranks.rank :: ranks.world]
        part = out.with_name(f"{stem}-{ranks.rank}")
        with open(part, "ab") as file, tqdm(total=sum(map(len, mine)), desc=desc, unit="sent", disable=ranks.rank > 0 or None) as bar:
            file.truncate(read_part(part)[1])
            for batch in mine:
                results = engine.translate([rows[i] for i in batch], max_new_tokens)
                lines = [{"id": i, "hyp": hyp, "finish": finish} for i, (hyp, finish) in zip(batch, results)]
                file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
                file.flush()
                bar.update(len(batch))
        ranks.barrier()
        if ranks.rank == 0:
            parts = list(out.parent.glob(f"{stem}-*"))
            done = {i: row for p in parts for i, row in read_part(p)[0].items()}
            merged = [{**row, "hyp": done[i]["hyp"], "finish": done[i]["finish"]} for i, row in enumerate(rows)]
            write_jsonl(out, merged)
            for p in parts:
                p.unlink()
    ranks.barrier()
    return [json.loads(line) for line in out.read_text(encoding="utf-8").split("\n") if line]


def translate_via_english(engine, rows, out, batch_size, max_new_tokens, ranks, desc):
    """As translate_jsonl, but in two hops, X -> English -> Y, where English is on neither side; the English in between
    is kept as `pivot`, and an output is cut off if either hop was. As ALMA is evaluated (section 4.3). A sentence with
    several targets is put into English once."""
    out, work = Path(out), (batch_size, max_new_tokens, ranks, desc)
    two_hops = [PIVOT not in (row["src_lang"], row["tgt_lang"]) for row in rows]
    first = {(row["src_lang"], row["src"]): {**row, "tgt_lang": PIVOT} for row, hops in zip(rows, two_hops) if hops}
    english = translate_jsonl(engine, list(first.values()), out.with_name(f"{out.stem}.to_english.jsonl"), *work)
    pivot = {(row["src_lang"], row["src"]): row for row in english}
    second = [{**row, "src_lang": PIVOT, "src": pivot[row["src_lang"], row["src"]]["hyp"]} if hops else row for row, hops in zip(rows, two_hops)]
    done = translate_jsonl(engine, second, out.with_name(f"{out.stem}.from_english.jsonl"), *work)
    result = []
    for row, last, hops in zip(rows, done, two_hops):
        middle = pivot[row["src_lang"], row["src"]] if hops else {"finish": "stop"}
        finish = "length" if "length" in (middle["finish"], last["finish"]) else "stop"
        result.append({**row, **({"pivot": middle["hyp"]} if hops else {}), "hyp": last["hyp"], "finish": finish})
    if ranks.rank == 0:
        write_jsonl(out, result)
    ranks.barrier()
    return result


def add_translation_arguments(parser):
    parser.add_argument("--batch-size", type=int, default=32, help="sentences decoded together; in fp32 it does not change results")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longer outputs are cut off and say so")
    add_device_arguments(parser)


def add_engine_arguments(parser):
    """Flags of every script that translates with load_engine()."""
    parser.add_argument("--model", help="backbone: checkpoint folder or hub name; default: the one the adapter was made for")
    parser.add_argument("--adapter", help="adapter folder that train.py wrote; without it the bare backbone translates")
    parser.add_argument("--prompt-format", default="auto", choices=["auto", *FORMATS], help="auto: the adapter's, else the tokenizer's own chat format")
    add_translation_arguments(parser)


def check_output(path):
    if Path(path).exists():
        raise UserError(f"{path}: exists already; choose another --output or remove it")
    if not Path(path).parent.is_dir():
        raise UserError(f"{path}: its folder does not exist")


def check_counts(args):
    for flag in ("batch_size", "max_new_tokens"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be at least 1")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", help="sentence to translate; without it and without --input, lines of stdin")
    parser.add_argument("--src", help="source language code")
    parser.add_argument("--tgt", help="target language code")
    parser.add_argument("--input", help="JSONL file whose lines carry src_lang, tgt_lang and src")
    parser.add_argument("--output", help="where --input's translations go: the same lines with hyp and finish")
    add_engine_arguments(parser)
    args = parser.parse_args()
    check_counts(args)
    if args.input is not None:
        if args.output is None or args.text is not None or args.src or args.tgt:
            raise UserError("--input goes with --output, and the file's lines name the languages: no text, --src or --tgt")
        check_output(args.output)
        rows = read_jsonl(args.input, need=("src",))
    else:
        for flag, code in (("--src", args.src), ("--tgt", args.tgt)):
            if code not in LANGUAGES:
                raise UserError(f"{flag} {code}: unknown language; known: {', '.join(LANGUAGES)}")
        if args.src == args.tgt:
            raise UserError(f"--src and --tgt are both {args.src}")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("a text or stdin is work for one process; under torchrun give --input and --output")
        try:
            lines = [args.text] if args.text is not None else sys.stdin.buffer.read().decode().removesuffix("\n").split("\n")
            "".join(lines).encode()
        except UnicodeError:
            raise UserError("the text is not UTF-8") from None
        rows = [{"src_lang": args.src, "tgt_lang": args.tgt, "src": line} for line in lines]
    ranks = init_distributed(args.device)
    engine = load_engine(args.model, args.adapter, args.prompt_format, args.device, args.dtype)
    for lang in sorted({r[side] for r in rows for side in ("src_lang", "tgt_lang")}):
        if lang not in engine.languages:
            raise UserError(f"{args.adapter}: no expert for {lang!r}; it has {', '.join(engine.languages)}")
    if args.input is not None:
        done = translate_jsonl(engine, rows, args.output, args.batch_size, args.max_new_tokens, ranks, "translating")
    else:
        full = [r for r in rows if r["src"].strip()]  # an empty line stays an empty line
        results = []
        for start in tqdm(range(0, len(full), args.batch_size), desc="translating", disable=len(full) <= args.batch_size or None):
            results += translate_batch(engine, full[start : start + args.batch_size], args.max_new_tokens)
        found = iter(results)
        done = [{"finish": "stop", "hyp": ""} if not r["src"].strip() else dict(zip(("hyp", "finish"), next(found))) for r in rows]
        print("\n".join(" ".join(row["hyp"].splitlines()) for row in done))
    cut = sum(row["finish"] == "length" for row in done)
    if cut and ranks.rank == 0:
        print(f"{cut} of {len(done)} outputs were cut off at --max-new-tokens {args.max_new_tokens}", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
