"""Prior systems of Table 1 (section 4.3), each with its own language codes, prompt and decoding.

    python evaluate.py --system nllb --all-directions                 # -> runs/scores/nllb
    python pivot.py --system nllb --out runs/pseudo-nllb              # Table 7's second row
    python support/baselines.py --system nllb --input data/test.jsonl --output nllb.jsonl

The models run in `transformers`, which no other script needs. Shapes: B batch rows, T tokens,
V vocabulary.
"""

import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this is a command, too
from data import LANGUAGES, PIVOT
from generate import Engine, add_translation_arguments, check_languages, load_engine
from support import runs
from support.corpora import read_jsonl
from support.runs import Ranks, UserError
from support.translations import translate_jsonl, translate_via_english

ALMA = "Translate this from {src} to {tgt}:\n{src}: {text}\n{tgt}:"
BIGTRANSLATE = (
    "以下是一个描述任务的指令，请写一个完成该指令的适当回复。\n\n"
    "### 指令:\n请将以下{src}句子翻译成{tgt}：{text}\n\n### 回复:"
)
CHINESE_NAMES = {
    "en": "英语",
    "de": "德语",
    "is": "冰岛语",
    "cs": "捷克语",
    "ru": "俄语",
    "zh": "汉语",
}


class System(NamedTuple):
    model: str  # hub name of the size that the paper compares
    codes: dict  # our language code -> the system's
    prompt: str | None  # of a decoder-only system; encoder-decoders take language tokens
    beams: int  # as its authors decode, like no_repeat
    no_repeat: int = 0  # no n-gram of this length twice
    token: str = "{}"  # an encoder-decoder's language token, from its code
    via_english: bool = False  # non-English directions in two hops, as the paper evaluates it


FLORES_CODES = {code: language.flores for code, language in LANGUAGES.items()}
ENGLISH_NAMES = {code: language.name for code, language in LANGUAGES.items()}
OWN_CODES = {code: code for code in LANGUAGES}
SYSTEMS = {
    "nllb": System("facebook/nllb-200-3.3B", FLORES_CODES, None, 4),
    "m2m100": System("facebook/m2m100-12B-avg-5-ckpt", OWN_CODES, None, 5, token="__{}__"),
    "bigtranslate": System("James-WYang/BigTranslate", CHINESE_NAMES, BIGTRANSLATE, 5, no_repeat=6),
    "alma": System("haoranxu/ALMA-7B", ENGLISH_NAMES, ALMA, 5, via_english=True),
}


class ForceFirst:
    """forced_bos_token_id with a token per row, where transformers knows one for all."""

    def __init__(self, first: Tensor):
        self.first = first  # (B,)

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """ids (B*beams, T), scores (B*beams, V)."""
        if ids.shape[1] > 1:
            return scores
        allowed = self.first.repeat_interleave(len(ids) // len(self.first))  # (B,) -> (B*beams,)
        return torch.full_like(scores, float("-inf")).scatter(1, allowed[:, None], 0.0)


class Baseline:
    """A prior system behind what translate_jsonl needs of an engine: languages, identity,
    translate_each."""

    def __init__(
        self,
        system: str,
        model: str | Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
    ):
        """system: a key of SYSTEMS; model: a folder or hub name in place of its own. Raises
        UserError if it can't be had."""
        self.system, name = SYSTEMS[system], str(model or SYSTEMS[system].model)
        self.via_english = self.system.via_english
        self.device, self.dtype = runs.device_and_dtype(device, dtype)
        self.place = f"{self.device} in {runs.dtype_name(self.dtype)}"
        revision = None
        if not Path(name).is_dir():  # the hub's own errors, in one line
            revision = runs.hub_snapshot(name, ["config.json"])[1]
            name = name.partition("@")[0]
        self.load(system, name, revision)
        languages = self.system.codes
        if self.system.prompt is None:
            self.tokens = self.language_tokens()
            languages = self.tokens
            if not self.tokens:
                one = self.system.token.format(self.system.codes[PIVOT])
                raise UserError(
                    f"{name}: its tokenizer has no language's token, such as {one}; "
                    f"it is no checkpoint of {system}"
                )
        self.languages = [lang for lang in LANGUAGES if lang in languages]
        self.identity = {
            "system": system,
            "model": name,
            "revision": revision,
            "beams": self.system.beams,
            "dtype": runs.dtype_name(self.dtype),
        }

    def load(self, system: str, name: str, revision: str | None) -> None:
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

        decoder_only = self.system.prompt is not None
        side = {"padding_side": "left"} if decoder_only else {}
        kind = AutoModelForCausalLM if decoder_only else AutoModelForSeq2SeqLM
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, **side)
            model = kind.from_pretrained(name, revision=revision, dtype=self.dtype)
            self.model = model.to(self.device).eval()
        except Exception as error:  # of the hub, a missing file or a wrong architecture
            raise UserError(
                f"{name}: can't be loaded as {system} ({runs.reason(error)}); "
                "pass --model with a folder that holds it"
            ) from None
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def language_tokens(self) -> dict[str, int]:
        """{language: id of its token} for those that the tokenizer has."""
        tokens = {}
        for lang, code in self.system.codes.items():
            token = self.tokenizer.convert_tokens_to_ids(self.system.token.format(code))
            if token != self.tokenizer.unk_token_id:
                tokens[lang] = token
        return tokens

    def encode(self, row: dict, limit: int) -> tuple[list[int], bool]:
        """(ids of a row's input, whether it was cut to the system's `limit` of tokens)."""
        codes, text = self.system.codes, row["src"].strip()
        if self.system.prompt is None:
            self.tokenizer.src_lang = codes[row["src_lang"]]
        else:
            src, tgt = codes[row["src_lang"]], codes[row["tgt_lang"]]
            text = self.system.prompt.format(src=src, tgt=tgt, text=text)
        ids = self.tokenizer(text, verbose=False).input_ids
        if len(ids) <= limit:
            return ids, False
        return self.tokenizer(text, truncation=True, max_length=limit).input_ids, True

    @torch.inference_mode()
    def translate(self, rows: list[dict], max_new_tokens: int) -> list[tuple[str, str]]:
        """[(translation, "stop" or "length"), ...] of rows (src_lang, tgt_lang, src), mixed
        directions in one batch. A source longer than the system takes is cut, and its translation
        says "length"."""
        limit = min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)
        encoded = [self.encode(row, limit) for row in rows]
        batch = self.tokenizer.pad({"input_ids": [ids for ids, _ in encoded]}, return_tensors="pt")
        batch = batch.to(self.device)  # (B, T)
        settings = {"num_beams": self.system.beams, "do_sample": False}
        settings["no_repeat_ngram_size"] = self.system.no_repeat
        if self.system.prompt is None:
            first = torch.tensor([self.tokens[row["tgt_lang"]] for row in rows], device=self.device)
            settings["logits_processor"] = [ForceFirst(first)]
            out = self.model.generate(**batch, max_new_tokens=max_new_tokens + 1, **settings)
            out = out[:, 2:]  # behind the start and the language
        else:
            settings["pad_token_id"] = self.tokenizer.pad_token_id
            out = self.model.generate(**batch, max_new_tokens=max_new_tokens, **settings)
            out = out[:, batch.input_ids.shape[1] :]
        results = []
        for ids, (_, source_cut) in zip(out.tolist(), encoded):
            text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
            ended = self.tokenizer.eos_token_id in ids
            if self.system.prompt is not None and "\n" in text:
                # A decoder-only system that goes on has ended its sentence.
                text, ended = text.split("\n")[0].strip(), True
            results.append((text, "stop" if ended and not source_cut else "length"))
        return results

    def translate_each(
        self, rows: list[dict], max_new_tokens: int, batch_size: int
    ) -> Iterator[tuple[int, str, str]]:
        """(index, translation, "stop" or "length") of `rows`, in batches as they come; see
        generate.Engine.translate_each. A sentence counts as many times as it has beams."""
        size = max(1, batch_size // self.system.beams)
        for start in range(0, len(rows), size):
            translated = self.translate(rows[start : start + size], max_new_tokens)
            for i, (text, finish) in enumerate(translated, start):
                yield i, text, finish


def add_system_argument(parser: runs.ArgumentParser) -> None:
    in_place = "a prior system in place of --adapter or --model (section 4.3)"
    parser.add_argument("--system", choices=list(SYSTEMS), help=in_place)


def engine_of(args: Namespace, ranks: Ranks) -> Engine | Baseline:
    """The generate.Engine, or the Baseline, that the flags of add_engine_arguments and
    add_system_argument ask for. Raises UserError."""
    if args.system is None:
        fast = runs.load_fast(args.plain, ranks)
        where = args.device, args.dtype
        return load_engine(args.model, args.adapter, args.prompt_format, *where, fast)
    if args.adapter is not None:
        raise UserError("--system is a prior system; --adapter has no part in it")
    return Baseline(args.system, args.model, args.device, args.dtype)


def main() -> None:
    parser = runs.ArgumentParser(__doc__)
    add = parser.add_argument
    add("--system", required=True, choices=list(SYSTEMS), help="section 4.3")
    add("--model", help="folder or hub name; default: the size that the paper compares")
    carry = "JSONL file whose lines carry src_lang, tgt_lang and src"
    add("--input", required=True, help=carry)
    add("--output", required=True, help="the same lines with hyp and finish")
    add_translation_arguments(parser)
    args = parser.parse_args()
    runs.at_least(1, args, "batch_size", "max_new_tokens")
    runs.check_output(args.output)
    rows = read_jsonl(args.input, LANGUAGES, need=("src",))
    ranks = runs.init_distributed(args.device, args.timeout)
    engine = Baseline(args.system, args.model, args.device, args.dtype)
    languages = {row["src_lang"] for row in rows} | {row["tgt_lang"] for row in rows}
    check_languages(engine, languages, args.system)
    translate = translate_via_english if engine.via_english else translate_jsonl
    sizes = args.batch_size, args.max_new_tokens
    translate(engine, rows, Path(args.output), *sizes, ranks, args.system)
    if ranks.rank == 0:
        print(f"{args.output}: {len(rows)} translations")


if __name__ == "__main__":
    runs.run_main(main)
