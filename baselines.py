"""Prior systems of Table 1 (section 4.3), each with its own language codes, prompt and usual decoding.

    python baselines.py --system nllb --input data/test.jsonl --output runs/nllb.jsonl     # then evaluate.py --hypotheses
    python evaluate.py --system nllb --all-directions --out runs/scores/nllb               # the same, resumable, scored
    python pivot.py --system nllb --out runs/pseudo-nllb                                   # Table 7's second row

The models run in `transformers`, which no other script needs. B batch rows, T tokens.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch

from data import LANGUAGES, PIVOT, group_of, read_jsonl
from devices import device_and_dtype, dtype_name, init_distributed
from files import UserError, at_least, check_output, hub_snapshot, reason, run_main, write_jsonl
from generate import add_translation_arguments, check_languages, finished, job_of, load_engine, translate_jsonl

ALMA = "Translate this from {src} to {tgt}:\n{src}: {text}\n{tgt}:"
BIGTRANSLATE = "以下是一个描述任务的指令，请写一个完成该指令的适当回复。\n\n### 指令:\n请将以下{src}句子翻译成{tgt}：{text}\n\n### 回复:"
CHINESE_NAMES = {"en": "英语", "de": "德语", "is": "冰岛语", "cs": "捷克语", "ru": "俄语", "zh": "汉语"}


class System(NamedTuple):
    model: str  # hub name of the size that the paper compares
    codes: dict  # our language code -> the system's
    prompt: str | None  # of a decoder-only system; encoder-decoders take language tokens
    beams: int  # as its authors decode, like no_repeat
    no_repeat: int = 0  # no n-gram of this length twice
    token: str = "{}"  # an encoder-decoder's language token, from its code
    via_english: bool = False  # non-English directions in two hops, as the paper evaluates it


SYSTEMS = {
    "nllb": System("facebook/nllb-200-3.3B", {code: language.flores for code, language in LANGUAGES.items()}, None, 4),
    "m2m100": System("facebook/m2m100-12B-avg-5-ckpt", {code: code for code in LANGUAGES}, None, 5, token="__{}__"),
    "bigtranslate": System("James-WYang/BigTranslate", CHINESE_NAMES, BIGTRANSLATE, 5, no_repeat=6),
    "alma": System("haoranxu/ALMA-7B", {code: language.name for code, language in LANGUAGES.items()}, ALMA, 5, via_english=True),
}


class Baseline:
    """A prior system behind what translate_jsonl needs of an engine: languages, identity, translate_each."""

    def __init__(self, system, model=None, device="auto", dtype="auto"):
        """system: a key of SYSTEMS; model: a folder or hub name in place of its own. Raises UserError if it can't be had."""
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer  # slow to import

        self.system, name = SYSTEMS[system], model or SYSTEMS[system].model
        self.via_english = self.system.via_english
        self.device, self.dtype = device_and_dtype(device, dtype)
        revision = None if Path(name).is_dir() else hub_snapshot(str(name), ["config.json"])[1]  # says in one line what is wrong
        name = str(name).partition("@")[0] if revision else str(name)
        try:
            side = {"padding_side": "left"} if self.system.prompt else {}
            self.tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, **side)
            kind = AutoModelForCausalLM if self.system.prompt else AutoModelForSeq2SeqLM
            self.model = kind.from_pretrained(name, revision=revision, dtype=self.dtype).to(self.device).eval()
        except Exception as error:  # of the hub, a missing file or a wrong architecture
            raise UserError(f"{name}: can't be loaded as {system} ({reason(error)}); pass --model with a folder that holds it") from None
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if self.system.prompt is None:
            self.tokens = {lang: token for lang in LANGUAGES if (token := self.language_token(lang)) is not None}
            if not self.tokens:
                one = self.system.token.format(self.system.codes[PIVOT])
                raise UserError(f"{name}: its tokenizer has no language's token, such as {one}; it is no checkpoint of {system}")
        self.languages = [lang for lang in LANGUAGES if lang in (self.tokens if self.system.prompt is None else self.system.codes)]
        self.identity = {"system": system, "model": name, "revision": revision, "beams": self.system.beams,
                         "dtype": dtype_name(self.dtype)}

    def language_token(self, lang):
        """Id of a language's token, None if the tokenizer has none."""
        token = self.tokenizer.convert_tokens_to_ids(self.system.token.format(self.system.codes[lang]))
        return None if token == self.tokenizer.unk_token_id else token

    @torch.inference_mode()
    def translate(self, rows, max_new_tokens):
        """[(translation, "stop" | "length"), ...] of rows (src_lang, tgt_lang, src), mixed directions in one batch. A source
        longer than the system takes is cut, and its translation says "length"."""
        limit = min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)
        ids, cut = [], []
        for row in rows:
            if self.system.prompt is None:
                self.tokenizer.src_lang = self.system.codes[row["src_lang"]]
                text = row["src"].strip()
            else:
                codes = self.system.codes
                text = self.system.prompt.format(src=codes[row["src_lang"]], tgt=codes[row["tgt_lang"]], text=row["src"].strip())
            ids.append(self.tokenizer(text, verbose=False).input_ids)
            cut.append(len(ids[-1]) > limit)
            if cut[-1]:
                ids[-1] = self.tokenizer(text, truncation=True, max_length=limit).input_ids
        batch = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(self.device)  # (B, T)
        settings = {"num_beams": self.system.beams, "do_sample": False, "no_repeat_ngram_size": self.system.no_repeat}
        if self.system.prompt is None:
            first = torch.tensor([self.tokens[row["tgt_lang"]] for row in rows], device=self.device)  # (B,)

            def force(ids, scores):
                """forced_bos_token_id with a token a row, where transformers knows one for all: ids (B*beams, T), scores (B*beams, V)."""
                if ids.shape[1] > 1:
                    return scores
                allowed = first.repeat_interleave(len(ids) // len(first))[:, None]  # (B,) -> (B*beams, 1)
                return torch.full_like(scores, float("-inf")).scatter(1, allowed, 0.0)

            out = self.model.generate(**batch, logits_processor=[force], max_new_tokens=max_new_tokens + 1, **settings)[:, 2:]
        else:
            settings.update(pad_token_id=self.tokenizer.pad_token_id, max_new_tokens=max_new_tokens)
            out = self.model.generate(**batch, **settings)[:, batch.input_ids.shape[1] :]
        results = []
        for row, source_cut in zip(out.tolist(), cut):
            text = self.tokenizer.decode(row, skip_special_tokens=True).strip()
            ended = self.tokenizer.eos_token_id in row
            if self.system.prompt is not None and "\n" in text:  # a decoder-only system that goes on has ended its sentence
                text, ended = text.split("\n")[0].strip(), True
            results.append((text, "stop" if ended and not source_cut else "length"))
        return results

    def translate_each(self, rows, max_new_tokens, batch_size):
        """(index, translation, "stop" | "length") of `rows`, in batches as they come; see generate.Engine.translate_each. A
        sentence counts as many times as it has beams."""
        size = max(1, batch_size // self.system.beams)
        for start in range(0, len(rows), size):
            for i, (text, finish) in enumerate(self.translate(rows[start : start + size], max_new_tokens), start):
                yield i, text, finish


def translate_via_english(engine, rows, out, batch_size, max_new_tokens, ranks, desc):
    """As translate_jsonl, but in two hops, X -> English -> Y, where English is on neither side; the English in between
    is kept as `pivot`, and an output is cut off if either hop was. As ALMA is evaluated (section 4.3). A sentence with
    several targets is put into English once; one whose English is empty stays empty."""
    out, work = Path(out), (batch_size, max_new_tokens, ranks, desc)
    job = job_of(engine, rows, max_new_tokens)  # another job's hops are not ours
    hops = [out.with_name(f"{out.name}.{hop}-{job}") for hop in ("to-english", "from-english")]
    if not ranks.of_first(out.exists):
        key = lambda row: (row["src_lang"], row["src"])
        two_hops = lambda row: group_of(row["src_lang"], row["tgt_lang"]) == "non_english"
        first = {key(row): {**row, "tgt_lang": PIVOT} for row in rows if two_hops(row)}
        pivot = {key(row): row for row in translate_jsonl(engine, list(first.values()), hops[0], *work)}
        middle = [pivot[key(row)] if two_hops(row) else None for row in rows]
        second = [{**row, "src_lang": PIVOT, "src": m["hyp"]} if m else row for row, m in zip(rows, middle)]
        done = iter(translate_jsonl(engine, [row for row in second if row["src"].strip()], hops[1], *work))
        result = []
        for row, m, asked in zip(rows, middle, second):
            last = next(done) if asked["src"].strip() else {"hyp": "", "finish": "stop"}
            finish = "length" if "length" in (last["finish"], m and m["finish"]) else "stop"
            result.append({**row, **({"pivot": m["hyp"]} if m else {}), "hyp": last["hyp"], "finish": finish})
        ranks.barrier()  # everybody has read the hops
        if ranks.rank == 0:
            write_jsonl(out, result)
    return finished(out, hops, ranks)


def add_system_argument(parser):
    parser.add_argument("--system", choices=list(SYSTEMS), help="a prior system in place of --adapter or --model (section 4.3)")


def engine_of(args):
    """The generate.Engine, or the Baseline, that the flags of add_engine_arguments and add_system_argument ask for."""
    if args.system is None:
        return load_engine(args.model, args.adapter, args.prompt_format, args.device, args.dtype)
    if args.adapter is not None:
        raise UserError("--system is a prior system; --adapter has no part in it")
    return Baseline(args.system, args.model, args.device, args.dtype)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", required=True, choices=list(SYSTEMS), help="section 4.3")
    parser.add_argument("--model", help="folder or hub name; default: the size that the paper compares")
    parser.add_argument("--input", required=True, help="JSONL file whose lines carry src_lang, tgt_lang and src")
    parser.add_argument("--output", required=True, help="the same lines with hyp and finish")
    add_translation_arguments(parser)
    args = parser.parse_args()
    at_least(1, args, "batch_size", "max_new_tokens")
    check_output(args.output)
    rows = read_jsonl(args.input, need=("src",))
    ranks = init_distributed(args.device)
    engine = Baseline(args.system, args.model, args.device, args.dtype)
    check_languages(engine, {row[side] for row in rows for side in ("src_lang", "tgt_lang")}, args.system)
    translate = translate_via_english if engine.via_english else translate_jsonl
    translate(engine, rows, Path(args.output), args.batch_size, args.max_new_tokens, ranks, args.system)
    if ranks.rank == 0:
        print(f"{args.output}: {len(rows)} translations")


if __name__ == "__main__":
    run_main(main)
