"""Languages, prompt, corpora and batches (paper sections 4.1 and A.2). T tokens, N target tokens.

    python data.py --out data --source publisher    # fetch OPUS-100 and FLORES-200 into corpora/, then write Table 5's files
    python data.py --out data --data corpora        # the same from a folder that holds them as published

Everything that turns text into model input is here, so that training, decoding and pivot can't disagree about it.
"""

import argparse
import json
import random
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
import torch
from tqdm import tqdm

from corpora import NOISE, all_files, clean, fetch, flores_file, opus_files, read_aligned, sources
from files import UserError, at_least, claim, file_sha256, read_json, read_lines, run_main, write_atomic, write_jsonl


class Language(NamedTuple):
    name: str  # as the prompt spells it
    flores: str  # FLORES-200 code
    bleu: str  # sacrebleu tokenizer when it is the target


LANGUAGES = {  # a new language is a line here and its code in --languages; the order is the experts' order
    "en": Language("English", "eng_Latn", "13a"),
    "de": Language("German", "deu_Latn", "13a"),
    "is": Language("Icelandic", "isl_Latn", "13a"),
    "cs": Language("Czech", "ces_Latn", "13a"),
    "ru": Language("Russian", "rus_Cyrl", "13a"),
    "zh": Language("Chinese", "zho_Hans", "zh"),
}
PIVOT = "en"
PROMPT = "Translate the following {src} sentences into {tgt}: "  # section 4.1

# Chat formats as the templates of Llama-3 and Qwen2.5 render one user turn; `{prompt}` is where the text goes.
FORMATS = {
    "llama3": ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{prompt}<|eot_id|>"
               "<|start_header_id|>assistant<|end_header_id|>\n\n", ("<|eot_id|>", "<|end_of_text|>")),
    "chatml": ("<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
               "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n", ("<|im_end|>", "<|endoftext|>")),
    "plain": ("{prompt}\n", ()),
}


def read_jsonl(path, languages=tuple(LANGUAGES), need=("src", "tgt"), text=()):
    """Sentence pairs of a JSONL file as dicts. `need` names the keys that must hold text that is not empty, `text`
    those that may be empty.

    Raises UserError with file and line number for a line that is not a JSON object of such text, names a language
    outside `languages`, translates a language into itself, or can't be written as UTF-8 again.
    """
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        bad = lambda why, number=number: UserError(f"{path}:{number}: {why}")
        try:
            row = json.loads(line)
            if "\\u" in line:
                json.dumps(row, ensure_ascii=False).encode()  # half of a surrogate pair is no character
        except ValueError as error:
            raise bad(f"not a JSON object ({error}); is the file cut off?" if line.strip() else "an empty line") from None
        if not isinstance(row, dict):
            raise bad(f"not a JSON object but {type(row).__name__}")
        for key in ("src_lang", "tgt_lang", *need, *text):
            if not isinstance(row.get(key), str):
                raise bad(f"no text under {key!r}")
            if key not in text and not row[key].strip():
                raise bad(f"{key!r} is empty")
        for key in ("src_lang", "tgt_lang"):
            if row[key] not in languages:
                raise bad(f"unknown language {row[key]!r} in {key}; known: {', '.join(languages)}")
        if row["src_lang"] == row["tgt_lang"]:
            raise bad(f"src_lang and tgt_lang are both {row['src_lang']!r}")
        rows.append(row)
    return rows


def parse_languages(text):
    """'en,de,zh' -> ['en', 'de', 'zh']; the order is the order of the experts."""
    codes = [code.strip() for code in text.split(",")]
    unknown = [code for code in codes if code not in LANGUAGES]
    if unknown:
        raise UserError(f"--languages {text}: unknown language {unknown[0]!r}; data.py's LANGUAGES has {', '.join(LANGUAGES)}")
    if len(set(codes)) < max(2, len(codes)) or PIVOT not in codes:
        raise UserError(f"--languages {text}: at least two, each once, {PIVOT} among them")
    return codes


def all_directions(languages):
    """All n(n-1) ordered pairs, English-centric ones first."""
    return sorted(((s, t) for s in languages for t in languages if s != t), key=lambda pair: PIVOT not in pair)


def group_of(src_lang, tgt_lang):
    """The two column groups of the paper's tables."""
    return "english" if PIVOT in (src_lang, tgt_lang) else "non_english"


class Tokenizer:
    """The published tokenizer.json, split in two so that text can't become control.

    `text` knows only the BPE model: `<|eot_id|>` inside a sentence comes out as plain characters. Control tokens
    are put in by id where the prompt format has them, and nowhere else.
    """

    def __init__(self, folder, cfg, prompt_format="auto"):
        """cfg: the backbone's model.Config. prompt_format: a key of FORMATS, or auto: the chat format whose control
        tokens this tokenizer has, else plain. Raises UserError if tokenizer and checkpoint don't belong together."""
        path = Path(folder) / "tokenizer.json"
        raw = read_json(path)
        try:
            self.control = {token["content"]: token["id"] for token in raw["added_tokens"]}
            raw.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
            self.text = tokenizers.Tokenizer.from_str(json.dumps(raw))
        except Exception as error:  # tokenizers raises a bare Exception
            raise UserError(f"{path}: not a tokenizer that `tokenizers` can load ({error})") from None
        largest = max([*self.text.get_vocab().values(), *self.control.values()])
        if largest >= cfg.vocab_size:
            raise UserError(f"{path}: does not match the checkpoint: token id {largest}, but the model has {cfg.vocab_size} rows")
        for name, token in [("bos_token_id", cfg.bos_token_id), *(("eos_token_id", e) for e in cfg.eos_token_ids)]:
            if token is not None and token not in self.control.values():
                raise UserError(f"{path}: does not match the checkpoint: config.json's {name} {token} is no control token here")
        if prompt_format == "auto":
            fits = [name for name, (_, stops) in FORMATS.items() if stops and set(stops) <= set(self.control)]
            prompt_format = fits[0] if fits else "plain"
        template, stops = FORMATS[prompt_format]
        for token in (*stops, *re.findall(r"<\|\w+\|>", template)):
            if token not in self.control:
                raise UserError(f"--prompt-format {prompt_format}: {path} has no {token}")
        self.format = prompt_format
        self.sha256 = file_sha256(path)
        self.pieces = [piece for piece in re.split(r"(<\|\w+\|>)", template) if piece]
        self.bos = [] if stops or cfg.bos_token_id is None else [cfg.bos_token_id]  # a chat format spells its own
        self.stop_ids = tuple(self.control[stop] for stop in stops) or cfg.eos_token_ids
        if not self.stop_ids:
            raise UserError(f"{path}: no end-of-turn token; config.json needs an eos_token_id for --prompt-format plain")

    def ids(self, text):
        return self.text.encode(text, add_special_tokens=False).ids

    def prompt(self, src_lang, tgt_lang, src):
        """Ids of everything before the translation: chat turn, the paper's prompt, the sentence."""
        prompt = PROMPT.format(src=LANGUAGES[src_lang].name, tgt=LANGUAGES[tgt_lang].name) + src.strip()
        ids = list(self.bos)
        for piece in self.pieces:
            ids += [self.control[piece]] if piece in self.control else self.ids(piece.replace("{prompt}", prompt))
        return ids

    def decode(self, ids):
        return self.text.decode(list(ids), skip_special_tokens=False).strip()


class Example(NamedTuple):
    ids: np.ndarray  # (T,) int32: prompt, target, end of turn
    prompt_length: int  # labels start here
    src_lang: str
    tgt_lang: str


def encode(tokenizer, pairs, max_length=512):
    """Sentence pairs -> (examples, number dropped). A pair longer than `max_length` tokens (section A.1), prompt and
    end of turn included, is dropped rather than cut: half a translation teaches stopping early."""
    examples = []
    for pair in pairs:
        prompt = tokenizer.prompt(pair["src_lang"], pair["tgt_lang"], pair["src"])
        ids = prompt + tokenizer.ids(pair["tgt"].strip()) + [tokenizer.stop_ids[0]]
        examples.append(Example(np.array(ids, dtype=np.int32), len(prompt), pair["src_lang"], pair["tgt_lang"]))
    kept = [example for example in examples if len(example.ids) <= max_length]
    return kept, len(examples) - len(kept)


def target_count(example):
    return len(example.ids) - example.prompt_length


def concatenate(examples, copies):
    """Examples one after another, without pads: tokens (1, T), each row `copies` times; labels (N,), all target tokens, the end of
    turn included, while prompts are never trained on; where the tokens before them stand in each copy, (N, copies), indices into T;
    the lengths of all rows."""
    lengths = [len(e.ids) - 1 for e in examples for _ in range(copies)]
    tokens = np.concatenate([e.ids[:-1] for e in examples for _ in range(copies)])[None]
    labels = np.concatenate([e.ids[e.prompt_length :] for e in examples])
    ends = np.cumsum(lengths).reshape(-1, copies)  # (examples, copies); the last tokens of a row stand before its targets
    at = np.concatenate([np.arange(-target_count(e), 0)[:, None] + end for e, end in zip(examples, ends)])
    return *(torch.from_numpy(x).long() for x in (tokens, labels, at)), lengths


def epoch_order(count, seed, epoch):
    """Order of the examples in an epoch: a function of seed and epoch alone, never of the number of processes."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()


def pair_row(src_lang, tgt_lang, src, tgt, origin):
    return {"src_lang": src_lang, "tgt_lang": tgt_lang, "src": src, "tgt": tgt, "origin": origin}


def both_ways(lang, pairs):
    """OPUS-100 pairs (en, x) as rows of both directions, x -> en first."""
    return [pair_row(lang, PIVOT, x, en, "opus-100") for en, x in pairs] + [pair_row(PIVOT, lang, en, x, "opus-100") for en, x in pairs]


def opus_pair(lang):
    """The language's OPUS-100 pair as its files spell it: de-en, but en-is."""
    return "-".join(sorted((PIVOT, lang)))


def read_opus(root, lang, split):
    """OPUS-100 pairs of a split: [(English, X), ...]."""
    files = opus_files(root, opus_pair(lang), split)
    return read_aligned(sorted(files, key=lambda path: path.suffix != f".{PIVOT}"))


def read_flores(root, languages, split):
    """FLORES-200 sentences of a split, dev or devtest: [(sentence in each language), ...]."""
    return read_aligned([flores_file(root, LANGUAGES[code].flores, split) for code in languages])


def prepare(root, languages, train_pairs=20000, dev_pairs=2000, test_pairs=2000, pivot_pairs=100000, drop=NOISE, max_ratio=5.0, seed=0):
    """The paper's sampling (sections 4.1, A.2, Table 5). Returns {file name: rows} and a report of counts.

    One sample of `train_pairs` a language serves both directions; of what is left of the training set, `pivot_pairs`
    are the pivot's source, none of whose sentences Stage 1 trains on. `drop`, `max_ratio`: see corpora.clean.
    """
    flores = {split: read_flores(root, languages, split) for split in ("dev", "devtest")}
    held_out = {code: {row[i] for row in flores["devtest"]} for i, code in enumerate(languages)}
    files = {name: [] for name in ("stage1.train", "stage1.dev", "test", "stage2.flores", "pivot.source")}
    others, report = [code for code in languages if code != PIVOT], {}
    opus = {(lang, split): read_opus(root, lang, split) for lang in others for split in ("dev", "test")}
    for (lang, _), pairs in opus.items():
        held_out[PIVOT].update(en for en, _ in pairs)
        held_out[lang].update(x for _, x in pairs)
    for lang in tqdm(others, desc="sampling", disable=None):
        kept, count = clean(read_opus(root, lang, "train"), held_out[PIVOT], held_out[lang], drop, max_ratio)
        random.Random(f"{seed} {lang}").shuffle(kept)
        sample, trained_on = kept[:train_pairs], {x for _, x in kept[:train_pairs]}
        rest = [(en, x) for en, x in kept[train_pairs:] if x not in trained_on][:pivot_pairs]
        dev, test = ([(en, x) for en, x in opus[lang, split] if en and x][:n] for split, n in (("dev", dev_pairs), ("test", test_pairs)))
        for name, pairs in (("stage1.train", sample), ("stage1.dev", dev), ("test", test)):
            files[name] += both_ways(lang, pairs)
        files["pivot.source"] += [pair_row(lang, PIVOT, x, en, "opus-100") for en, x in rest]
        report[lang] = {**count, "stage1": len(sample), "pivot_source": len(rest), "dev": len(dev), "test": len(test)}
    for src_lang, tgt_lang in all_directions(languages):
        s, t = languages.index(src_lang), languages.index(tgt_lang)
        name = "stage1.train" if PIVOT in (src_lang, tgt_lang) else "stage2.flores"
        rows = {split: [pair_row(src_lang, tgt_lang, row[s], row[t], "flores-200") for row in every if row[s] and row[t]]
                for split, every in flores.items()}
        files[name] += rows["dev"]
        if PIVOT not in (src_lang, tgt_lang):
            files["test"] += rows["devtest"][:test_pairs]
    return files, report


def read_stage_data(args):
    """(languages, train, dev, files) of a stage: Stage 1 the English-centric files; Stage 2 those, FLORES-200 in the
    other directions, and the pseudo pairs (section 3.3, Table 5)."""
    data = Path(args.data)
    if not (data / "manifest.json").exists():
        raise UserError(f"{data}: no manifest.json in it; --data takes a folder that data.py has finished")
    languages = parse_languages(read_json(data / "config.json").get("languages", ""))
    train, dev = [data / "stage1.train.jsonl"], [data / "stage1.dev.jsonl"]
    if args.stage == 1 and (args.pseudo or args.stage_2_data != "all"):
        raise UserError("--pseudo and --stage-2-data are Stage 2's")
    if args.stage == 2:
        if args.pseudo is None:
            raise UserError("--stage 2 needs --pseudo, the folder that pivot.py wrote")
        train += [data / "stage2.flores.jsonl", Path(args.pseudo) / "pseudo.train.jsonl"]
        dev += [Path(args.pseudo) / "pseudo.dev.jsonl"]
        if args.stage_2_data == "pseudo":
            train, dev = train[-1:], dev[-1:]
        if not train[-1].exists():
            raise UserError(f"{train[-1]}: no such file; --pseudo takes the folder of a finished pivot.py run")
        if train[-1].stat().st_size == 0:
            raise UserError(f"{train[-1]}: no pseudo pairs in it; Stage 2 would be Stage 1 again")
    rows = [[row for file in files for row in read_jsonl(file, languages)] for files in (train, dev)]
    return languages, *rows, [*train, *dev]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="corpora", help="folder of the corpora, laid out as published (see corpora.py)")
    parser.add_argument("--source", default="folder", choices=["folder", "publisher", "hub"],
                        help="where what --data lacks is fetched from: nowhere, the publishers' archives, or the Hugging Face hub")
    parser.add_argument("--out", required=True, help="folder for the JSONL files and manifest.json")
    parser.add_argument("--languages", default=",".join(LANGUAGES), help="codes, in the order of the experts (section 4.1)")
    parser.add_argument("--train-pairs", type=int, default=20000, help="OPUS-100 pairs a direction for Stage 1 (section 4.1)")
    parser.add_argument("--dev-pairs", type=int, default=2000, help="dev pairs a direction (Table 5)")
    parser.add_argument("--test-pairs", type=int, default=2000, help="test pairs a direction at most (Table 5; FLORES-200 has 1,012)")
    parser.add_argument("--pivot-pairs", type=int, default=100000, help="sentences a language set aside for pivot.py, at most")
    parser.add_argument("--drop", default=",".join(NOISE),
                        help="kinds of noise that leave OPUS-100's training pairs, or none; all are counted")
    parser.add_argument("--max-ratio", type=float, default=5.0,
                        help="length ratio that is noise; 4 of 95,841 human pairs of WMT and Tatoeba exceed 5")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.languages = ",".join(languages := parse_languages(args.languages))
    args.drop = [] if args.drop == "none" else args.drop.split(",")
    if not set(args.drop) <= set(NOISE):
        raise UserError(f"--drop {','.join(args.drop)}: takes {', '.join(NOISE)}, or none")
    at_least(0, args, "train_pairs", "dev_pairs", "test_pairs", "pivot_pairs")
    at_least(1, args, "max_ratio")
    out, config = Path(args.out), {k: v for k, v in vars(args).items() if k not in ("out", "source")}
    claim(out, config, write=False)
    if (out / "manifest.json").exists():
        return print(f"{out}: prepared already")
    wanted = [opus_pair(lang) for lang in languages if lang != PIVOT], [LANGUAGES[code].flores for code in languages]
    if args.source != "folder":
        fetch(args.data, *wanted, args.source)
    inputs = [file for files in all_files(args.data, *wanted).values() for file in files]
    for file in inputs:
        if not file.exists():
            raise UserError(f"{file}: no such file; --data takes OPUS-100 and FLORES-200 as published, "
                            "--source publisher or hub fetches them")
    files, report = prepare(args.data, languages, args.train_pairs, args.dev_pairs, args.test_pairs, args.pivot_pairs, args.drop,
                            args.max_ratio, args.seed)
    manifest = {"settings": config, "sources": sources(args.data, [*wanted[0], "flores-200"]), "corpora": report, "files": {}}
    lock = claim(out, config)
    manifest["inputs"] = {str(file.relative_to(args.data)): file_sha256(file) for file in inputs}
    for name, rows in ((f"{name}.jsonl", rows) for name, rows in files.items()):
        write_jsonl(out / name, rows)
        manifest["files"][name] = {"pairs": len(rows), "sha256": file_sha256(out / name)}
    write_atomic(out / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    lock.close()
    asked = {"stage1": args.train_pairs, "dev": args.dev_pairs, "test": args.test_pairs}
    for lang, count in report.items():
        short = "".join(f"  (asked for {asked[k]} {k})" for k in asked if count[k] < asked[k])
        print(f"{PIVOT}-{lang}: " + ", ".join(f"{k} {v}" for k, v in count.items()) + short)
    for name, entry in manifest["files"].items():
        print(f"{out / name}: {entry['pairs']} pairs")


if __name__ == "__main__":
    run_main(main)
