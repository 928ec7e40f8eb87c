"""Languages, prompt, corpora and batches (paper sections 4.1 and A.2). B batch rows, T tokens.

    python data.py --data corpora --out data        # OPUS-100 + FLORES-200 -> the JSONL files of Table 5

Everything that turns text into model input is here, so that training, decoding and pivot can't disagree about it.
"""

import argparse
import fcntl
import hashlib
import json
import os
import random
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
import torch


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
IGNORE = -100  # label of a position that is not trained on (F.cross_entropy's convention)

# Chat formats as the published templates render one user turn; `{prompt}` is where the text goes.
FORMATS = {
    "llama3": ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{prompt}<|eot_id|>"
               "<|start_header_id|>assistant<|end_header_id|>\n\n", ("<|eot_id|>", "<|end_of_text|>")),
    "chatml": ("<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
               "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n", ("<|im_end|>", "<|endoftext|>")),
    "plain": ("{prompt}\n", ()),
}


class UserError(Exception):
    """Something the user can mend; its text is the one line they read."""


def run_main(main):
    """Call `main()`; a UserError becomes one line on stderr and exit status 2, Ctrl-C exit status 130."""
    try:
        main()
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # every rank of a machine sees the same files: say it once
            print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command continues from here", file=sys.stderr)
        sys.exit(130)


def write_atomic(path, text):
    """Write `text` to `path` so that a reader, or a kill, finds the old file or the new one, never half of it."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_jsonl(path, rows):
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json(path):
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content


def file_sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def read_lines(path):
    """Lines of a text file, split at \\n only: U+2028 or NEL inside a sentence is text, not a line end."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    lines = text.split("\n")
    return [line.removesuffix("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]


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
            raise bad(f"not a JSON object ({error}); is the file cut off?") from None
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


def claim(folder, config, write=True):
    """Make `folder` the home of a run with `config`, and lock it until the returned file is closed.

    Raises UserError if a run with other settings lives there or another process works there, so that the same
    command resumes and a different one never overwrites. write=False only compares.
    """
    folder, path = Path(folder), Path(folder) / "config.json"
    if path.exists():
        old = read_json(path)
        differ = [f"{k} was {old.get(k)!r}, now {config.get(k)!r}" for k in sorted({*old, *config}) if old.get(k) != config.get(k)]
        if differ:
            more = f"; and {len(differ) - 3} more" if len(differ) > 3 else ""
            raise UserError(f"{folder}: holds a run with other settings ({'; '.join(differ[:3])}{more}); choose another --out or remove it")
    elif folder.exists() and not folder.is_dir() or folder.is_dir() and any(not p.name.endswith((".tmp", ".lock")) for p in folder.iterdir()):
        raise UserError(f"{folder}: not empty and not a run of this script; choose another --out")
    if not write:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder}: another process is at work in it (workers outlive a killed torchrun; end them first)") from None
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or error}") from None
    claim(folder, config, write=False)  # again, now that nobody else can write
    if not path.exists():
        write_atomic(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    return lock


def parse_languages(text):
    """'en,de,zh' -> ['en', 'de', 'zh']; the order is the order of the experts."""
    codes = [code.strip() for code in text.split(",")]
    unknown = [code for code in codes if code not in LANGUAGES]
    if unknown:
        raise UserError(f"unknown language {unknown[0]!r}; known: {', '.join(LANGUAGES)}")
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


def collate(examples):
    """Examples -> tokens (B, T) and labels (B, T), padded on the right. labels[b, t] is the token after tokens[b, t]
    where that is a target token or the end of turn, else IGNORE: prompts and pads are never trained on."""
    T = max(len(e.ids) for e in examples) - 1
    tokens = torch.zeros(len(examples), T, dtype=torch.long)
    labels = torch.full((len(examples), T), IGNORE)
    for row, example in enumerate(examples):
        ids = torch.from_numpy(example.ids).long()
        tokens[row, : len(ids) - 1] = ids[:-1]
        labels[row, example.prompt_length - 1 : len(ids) - 1] = ids[example.prompt_length :]
    return tokens, labels


def epoch_order(count, seed, epoch):
    """Order of the examples in an epoch: a function of seed and epoch alone, never of the number of processes."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()


def read_aligned(files):
    """Line-aligned files, one per language -> list of tuples. Raises UserError when their line counts differ."""
    columns = [read_lines(file) for file in files]
    for file, column in zip(files, columns):
        if len(column) != len(columns[0]):
            raise UserError(f"{files[0]} has {len(columns[0])} lines but {file} has {len(column)}; they must be aligned")
    return list(zip(*([text.strip() for text in column] for column in columns)))


def find_folder(root, *layouts):
    if not Path(root).is_dir():
        raise UserError(f"{root}: no such folder; --data takes the folder that holds opus-100-corpus/ and flores200_dataset/")
    for layout in layouts:
        if (Path(root) / layout).is_dir():
            return Path(root) / layout
    raise UserError(f"{root}: neither {' nor '.join(layouts)} in it; --data takes the corpora in the layout they are published in")


def read_opus(root, lang, split):
    """OPUS-100 pairs (English, lang) of a split: [(en, x), ...] from supervised/de-en/opus.de-en-train.{en,de}."""
    folder = find_folder(root, "opus-100-corpus/v1.0/supervised", "supervised")
    pair = "-".join(sorted((PIVOT, lang)))
    return read_aligned([folder / pair / f"opus.{pair}-{split}.{code}" for code in (PIVOT, lang)])


def read_flores(root, languages, split):
    """FLORES-200 sentences of a split, aligned over `languages`: [(sentence in each), ...] from dev/deu_Latn.dev."""
    folder = find_folder(root, "flores200_dataset", "flores-200")
    return read_aligned([folder / split / f"{LANGUAGES[code].flores}.{split}" for code in languages])


def pair_row(src_lang, tgt_lang, src, tgt, origin):
    return {"src_lang": src_lang, "tgt_lang": tgt_lang, "src": src, "tgt": tgt, "origin": origin}


def both_ways(lang, pairs):
    """OPUS-100 pairs (en, x) as rows of both directions, x -> en first."""
    return [pair_row(lang, PIVOT, x, en, "opus-100") for en, x in pairs] + [pair_row(PIVOT, lang, en, x, "opus-100") for en, x in pairs]


def prepare(root, languages, train_pairs, dev_pairs, test_pairs, seed):
    """The paper's sampling (sections 4.1, A.2, Table 5). Returns {file name: rows} and a report of counts.

    One sample of `train_pairs` a language serves both directions; what is left of the training set is the pivot's
    source. Empty lines, repeated pairs and pairs with a side in a dev or test set are left out and counted.
    """
    flores_dev, flores_test = read_flores(root, languages, "dev"), read_flores(root, languages, "devtest")
    held_out = {code: {row[i] for row in flores_test} for i, code in enumerate(languages)}
    files = {name: [] for name in ("stage1.train", "stage1.dev", "test", "stage2.flores", "pivot.source")}
    report, corpora = {}, {}
    for lang in (code for code in languages if code != PIVOT):
        corpora[lang] = {split: read_opus(root, lang, split) for split in ("train", "dev", "test")}
        for split in ("dev", "test"):
            for en, x in corpora[lang][split]:
                held_out[PIVOT].add(en)
                held_out[lang].add(x)
    for lang, splits in corpora.items():
        kept, count = {}, dict(read=len(splits["train"]), empty=0, repeated=0, in_dev_or_test=0)
        for en, x in splits["train"]:
            if not en or not x:
                count["empty"] += 1
            elif (en, x) in kept:
                count["repeated"] += 1
            elif en in held_out[PIVOT] or x in held_out[lang]:
                count["in_dev_or_test"] += 1
            else:
                kept[en, x] = None
        kept = list(kept)
        random.Random(f"{seed} {lang}").shuffle(kept)
        sample, trained_on = kept[:train_pairs], {x for _, x in kept[:train_pairs]}
        rest = [(en, x) for en, x in kept[train_pairs:] if x not in trained_on]
        dev, test = ([(en, x) for en, x in splits[split] if en and x][:n] for split, n in (("dev", dev_pairs), ("test", test_pairs)))
        for name, pairs in (("stage1.train", sample), ("stage1.dev", dev), ("test", test)):
            files[name] += both_ways(lang, pairs)
        files["pivot.source"] += [pair_row(lang, PIVOT, x, en, "opus-100") for en, x in rest]
        report[lang] = {**count, "stage1": len(sample), "pivot_source": len(rest), "dev": len(dev), "test": len(test)}
    for src_lang, tgt_lang in all_directions(languages):
        s, t = languages.index(src_lang), languages.index(tgt_lang)
        name = "stage1.train" if PIVOT in (src_lang, tgt_lang) else "stage2.flores"
        files[name] += [pair_row(src_lang, tgt_lang, row[s], row[t], "flores-200") for row in flores_dev if row[s] and row[t]]
        if PIVOT not in (src_lang, tgt_lang):
            rows = [row for row in flores_test if row[s] and row[t]][:test_pairs]
            files["test"] += [pair_row(src_lang, tgt_lang, row[s], row[t], "flores-200") for row in rows]
    return files, report


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder that holds opus-100-corpus/ and flores200_dataset/ as published")
    parser.add_argument("--out", required=True, help="folder for the JSONL files and manifest.json")
    parser.add_argument("--languages", default=",".join(LANGUAGES), help="codes, in the order of the experts (section 4.1)")
    parser.add_argument("--train-pairs", type=int, default=20000, help="OPUS-100 pairs a direction for Stage 1 (section 4.1)")
    parser.add_argument("--dev-pairs", type=int, default=2000, help="dev pairs a direction (Table 5)")
    parser.add_argument("--test-pairs", type=int, default=2000, help="test pairs a direction at most (Table 5; FLORES-200 has 1,012)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.languages = ",".join(languages := parse_languages(args.languages))
    if min(args.train_pairs, args.dev_pairs, args.test_pairs) < 0:
        raise UserError("--train-pairs, --dev-pairs and --test-pairs can't be negative")
    out, config = Path(args.out), {k: v for k, v in vars(args).items() if k != "out"}
    claim(out, config, write=False)
    if (out / "manifest.json").exists():
        return print(f"{out}: prepared already")
    files, report = prepare(args.data, languages, args.train_pairs, args.dev_pairs, args.test_pairs, args.seed)
    manifest, _lock = {"corpora": report, "files": {}}, claim(out, config)
    for name, rows in ((f"{name}.jsonl", rows) for name, rows in files.items()):
        write_jsonl(out / name, rows)
        manifest["files"][name] = {"pairs": len(rows), "sha256": file_sha256(out / name)}
    write_atomic(out / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    for lang, count in report.items():
        short = f"  (asked for {args.train_pairs})" if count["stage1"] < args.train_pairs else ""
        print(f"{PIVOT}-{lang}: " + ", ".join(f"{k} {v}" for k, v in count.items()) + short)
    for name, entry in manifest["files"].items():
        print(f"{out / name}: {entry['pairs']} pairs")


if __name__ == "__main__":
    run_main(main)
