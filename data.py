"""Languages, prompt, corpora and batches (paper sections 4.1 and A.2).

    python data.py --source publisher    # fetch OPUS-100 and FLORES-200, write Table 5's files
    python data.py --data corpora        # the same from a folder that holds them as published

Everything that turns text into model input is here, so that training, decoding and the pivot can't
disagree about it. Shapes: B batch rows, T tokens.
"""

import support.interrupts  # noqa: F401 - before all else

import hashlib
import json
import random
import re
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
import torch
from torch import Tensor

from model import Config
from support import chat, corpora, runs
from support.runs import UserError
from support.text import comparable, is_empty


class Language(NamedTuple):
    name: str  # as the prompt spells it
    flores: str  # FLORES-200 code
    bleu: str  # sacrebleu tokenizer when it is the target


LANGUAGES = {  # a new language: a line here, its code in --languages; their order is the experts'
    "en": Language("English", "eng_Latn", "13a"),
    "de": Language("German", "deu_Latn", "13a"),
    "is": Language("Icelandic", "isl_Latn", "13a"),
    "cs": Language("Czech", "ces_Latn", "13a"),
    "ru": Language("Russian", "rus_Cyrl", "13a"),
    "zh": Language("Chinese", "zho_Hans", "zh"),
}
PIVOT = "en"
PROMPT = "Translate the following {src} sentences into {tgt}: "  # section 4.1
IGNORE = -100  # the label of a position that is not trained on, as F.nll_loss has it


def parse_languages(text: str) -> list[str]:
    """'en,de,zh' -> ['en', 'de', 'zh']; the order is the order of the experts. Raises UserError."""
    codes = [code.strip() for code in text.split(",")]
    for code in codes:
        if code not in LANGUAGES:
            known = ", ".join(LANGUAGES)
            raise UserError(f"--languages {text}: unknown language {code!r}; data.py has {known}")
    if len(set(codes)) < max(2, len(codes)) or PIVOT not in codes:
        raise UserError(f"--languages {text}: at least two, each once, {PIVOT} among them")
    return codes


def all_directions(languages: list[str]) -> list[tuple[str, str]]:
    """All n(n-1) ordered pairs, English-centric ones first."""
    pairs = [(s, t) for s in languages for t in languages if s != t]
    return sorted(pairs, key=is_non_english)


def is_non_english(direction: tuple[str, str]) -> bool:
    """Whether a direction has English on neither side, as 20 of the paper's 30 have."""
    return PIVOT not in direction


def group_of(src_lang: str, tgt_lang: str) -> str:
    """The two column groups of the paper's tables."""
    return "non_english" if is_non_english((src_lang, tgt_lang)) else "english"


# --- prompt and tokenizer -------------------------------------------------------------------------


class Tokenizer:
    """The published tokenizer.json and chat template, such that text can't become control.

    `text` reads control tokens as what they are spelled with: `<|eot_id|>` inside a sentence comes
    out as plain characters.
    Control tokens are put in by id where the template has them, and nowhere else.
    """

    def __init__(self, folder: str | Path, cfg: Config, prompt_format: str = "auto"):
        """prompt_format: auto, the chat template beside the tokenizer if there is one; or plain.
        Raises UserError if tokenizer, template and checkpoint don't belong together."""
        path = Path(folder) / "tokenizer.json"
        raw, ends = runs.read_json(path), chat.end_ids(folder, cfg)
        turn = None if prompt_format == "plain" else chat.render_turn(folder)
        try:
            self.added = {token["content"]: token for token in raw["added_tokens"]}
            self.control = self.control_tokens(turn, ends, cfg)
            for token in raw["added_tokens"]:
                token["special"] = token["content"] in self.control
            raw.update(post_processor=None, truncation=None, padding=None)
            self.text = tokenizers.Tokenizer.from_str(json.dumps(raw))
            self.text.encode_special_tokens = True  # as plain text: no text becomes a control token
        except Exception as error:  # tokenizers raises a bare Exception
            raise UserError(f"{path}: `tokenizers` can't load it ({error})") from None
        self.sha256 = runs.file_sha256(path)
        self.format = "plain" if turn is None else "chat"
        before, after, behind_answer = turn or ("", "\n", "")
        self.template = before + PROMPT + "{text}" + after
        self.pieces = self.split_control(before + chat.PLACEHOLDER + after)
        self.bos = []  # a chat template spells its own
        if turn is None and cfg.bos_token_id is not None:
            self.bos = [cfg.bos_token_id]
        end_of_turn = [
            self.control[p] for p in self.split_control(behind_answer) if p in self.control
        ]
        # What a target ends with comes first, then what else ends an output.
        self.stop_ids = tuple(dict.fromkeys(end_of_turn[:1] + ends))
        if not self.stop_ids:
            raise UserError(f"{path}: no end-of-turn token; config.json needs an eos_token_id")
        self.check_checkpoint(path, cfg)

    def control_tokens(self, turn: tuple | None, ends: list[int], cfg: Config) -> dict[str, int]:
        """{content: id} of added tokens that steer the model: the special ones, and whatever ends a
        text or stands in the template. The others are words like any."""
        steering, template = {cfg.bos_token_id, *cfg.eos_token_ids, *ends}, "".join(turn or ())
        control = {}
        for content, token in self.added.items():
            if token.get("special") or token["id"] in steering or content in template:
                control[content] = token["id"]
        return control

    def check_checkpoint(self, path: Path, cfg: Config) -> None:
        """Raises UserError for ids that the model lacks, unless nothing here uses them."""
        used = {*self.bos, *self.stop_ids}
        used.update(self.control[piece] for piece in self.pieces if piece in self.control)
        used.update(i for word, i in self.text.get_vocab().items() if word not in self.control)
        largest = max(used)
        if largest >= cfg.vocab_size:
            raise UserError(
                f"{path}: does not match the checkpoint: token id {largest}, "
                f"but the model has {cfg.vocab_size} rows"
            )
        for token in (cfg.bos_token_id, *cfg.eos_token_ids):
            if token is not None and token not in self.control.values():
                name = "bos_token_id" if token == cfg.bos_token_id else "eos_token_id"
                why = f"config.json's {name} {token} is no control token here"
                raise UserError(f"{path}: does not match the checkpoint: {why}")

    def split_control(self, text: str) -> list[str]:
        """`text` of a template, cut at its control tokens, which are pieces of their own."""
        if not self.control:
            return [text]
        longest_first = sorted(self.control, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
        for i, part in enumerate(parts):
            if part in self.control and self.added[part]["lstrip"]:  # it swallows blanks before it
                parts[i - 1] = parts[i - 1].rstrip()
            if part in self.control and self.added[part]["rstrip"]:
                parts[i + 1] = parts[i + 1].lstrip()
        return [part for part in parts if part]

    def describe(self) -> dict:
        """What an adapter remembers of tokenizer and prompt, and refuses to be used without."""
        return {
            "prompt_format": self.format,
            "prompt": self.template,
            "prompt_date": chat.DATE_STRING,  # for templates that name the date
            "prompt_sha256": hashlib.sha256(self.template.encode()).hexdigest(),
            "tokenizer_sha256": self.sha256,
        }

    def ids(self, text: str) -> list[int]:
        return self.text.encode(text, add_special_tokens=False).ids

    def prompt(self, src_lang: str, tgt_lang: str, src: str) -> list[int]:
        """Ids of all that stands before the translation: chat turn, instruction, sentence."""
        instruction = PROMPT.format(src=LANGUAGES[src_lang].name, tgt=LANGUAGES[tgt_lang].name)
        ids = list(self.bos)
        for piece in self.pieces:
            if piece in self.control:
                ids.append(self.control[piece])
            else:
                ids += self.ids(piece.replace(chat.PLACEHOLDER, instruction + src.strip()))
        return ids

    def decode(self, ids: list[int]) -> str:
        return self.text.decode(list(ids), skip_special_tokens=True).strip()


# --- examples and batches -------------------------------------------------------------------------


class Example(NamedTuple):
    ids: np.ndarray  # (T,) int32: prompt, target, end of turn
    prompt_length: int  # labels start here
    src_lang: str
    tgt_lang: str
    pair: dict | None = None  # as it was read

    @property
    def target_count(self) -> int:
        """Target tokens, the end of turn included."""
        return len(self.ids) - self.prompt_length


def encode(tokenizer: Tokenizer, pairs: list[dict], max_length: int = 512) -> tuple[list, int]:
    """Sentence pairs -> (examples, number dropped). A pair longer than `max_length` tokens (section
    A.1), prompt and end of turn included, is dropped rather than cut: half a translation teaches
    stopping early."""
    examples, dropped = [], 0
    for pair in pairs:
        prompt = tokenizer.prompt(pair["src_lang"], pair["tgt_lang"], pair["src"])
        ids = prompt + tokenizer.ids(pair["tgt"].strip()) + [tokenizer.stop_ids[0]]
        if len(ids) > max_length:
            dropped += 1
            continue
        ids = np.array(ids, dtype=np.int32)
        examples.append(Example(ids, len(prompt), pair["src_lang"], pair["tgt_lang"], pair))
    return examples, dropped


def collate(examples: list[Example]) -> tuple[Tensor, Tensor]:
    """Examples -> tokens (B, T) and labels (B, T), padded on the right. labels[b, t] is the token
    after tokens[b, t] where that is part of the target or its end of turn, else IGNORE: prompts
    and pads are never trained on."""
    T = max(len(example.ids) for example in examples) - 1
    tokens = torch.zeros(len(examples), T, dtype=torch.long)
    labels = torch.full((len(examples), T), IGNORE)
    for row, example in enumerate(examples):
        ids, start = torch.from_numpy(example.ids).long(), example.prompt_length
        tokens[row, : len(ids) - 1] = ids[:-1]
        labels[row, start - 1 : len(ids) - 1] = ids[start:]
    return tokens, labels


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """Order of the examples in an epoch, whatever the number of processes."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()


# --- the paper's sample of the corpora ------------------------------------------------------------


def pair_row(src_lang: str, tgt_lang: str, src: str, tgt: str, origin: str) -> dict:
    return {"src_lang": src_lang, "tgt_lang": tgt_lang, "src": src, "tgt": tgt, "origin": origin}


def opus_pair(lang: str) -> str:
    """The language's OPUS-100 pair as its files spell it: de-en, but en-is."""
    return "-".join(sorted((PIVOT, lang)))


def read_opus(root: str | Path, lang: str, split: str) -> list[tuple[str, str]]:
    """OPUS-100 pairs of a split, train, dev or test: [(English, X), ...]."""
    files = corpora.opus_files(root, opus_pair(lang), split)
    if files[0].suffix != f".{PIVOT}":
        files.reverse()
    return corpora.read_aligned(files)


def read_flores(root: str | Path, languages: list[str], split: str) -> list[tuple[str, ...]]:
    """FLORES-200 sentences of a split, dev or devtest: [(sentence in each language), ...]."""
    codes = [LANGUAGES[lang].flores for lang in languages]
    return corpora.read_aligned([corpora.flores_file(root, code, split) for code in codes])


def both_ways(lang: str, pairs: list[tuple[str, str]]) -> list[dict]:
    """OPUS-100 pairs (en, x) as rows of both directions, x -> en first."""
    into_english = [pair_row(lang, PIVOT, x, en, "opus-100") for en, x in pairs]
    return into_english + [pair_row(PIVOT, lang, en, x, "opus-100") for en, x in pairs]


def flores_rows(flores: list, languages: list[str], src_lang: str, tgt_lang: str) -> list[dict]:
    """FLORES-200 sentences as rows of one direction."""
    s, t = languages.index(src_lang), languages.index(tgt_lang)
    rows = []
    for sentences in flores:
        if not is_empty(sentences[s]) and not is_empty(sentences[t]):
            rows.append(pair_row(src_lang, tgt_lang, sentences[s], sentences[t], "flores-200"))
    return rows


def held_out_sentences(opus: dict, flores_test: list[tuple], languages: list[str]) -> dict:
    """{language: its sentences in OPUS-100's dev and test and FLORES-200's devtest}, none of which
    may be trained on."""
    held_out = {}
    for i, lang in enumerate(languages):
        held_out[lang] = {comparable(sentences[i]) for sentences in flores_test}
    for (lang, _), pairs in opus.items():
        for en, x in pairs:
            held_out[PIVOT].add(comparable(en))
            held_out[lang].add(comparable(x))
    return held_out


def prepare(root: str | Path, languages: list[str], args: Namespace) -> tuple[dict, dict]:
    """The paper's sampling (sections 4.1, A.2, Table 5): {file stem: rows}, a report of counts.

    One sample of --train-pairs per language serves both directions; of what is left of the
    training set, --pivot-pairs are the pivot's source, none of which Stage 1 trains on.
    """
    files = {"stage1.train": [], "stage1.dev": [], "test": [], "stage2.flores": []}
    files["pivot.source"] = []
    others = [lang for lang in languages if lang != PIVOT]
    flores = {split: read_flores(root, languages, split) for split in ("dev", "devtest")}
    opus = {
        (lang, split): read_opus(root, lang, split) for lang in others for split in ("dev", "test")
    }
    held_out = held_out_sentences(opus, flores["devtest"], languages)
    report = {}
    for lang in runs.progress(others, desc="sampling"):
        kept, count = corpora.clean(
            read_opus(root, lang, "train"),
            held_out[PIVOT],
            held_out[lang],
            args.drop,
            args.max_ratio,
        )
        random.Random(f"{args.seed} {lang}").shuffle(kept)
        sample, rest = kept[: args.train_pairs], kept[args.train_pairs :]
        trained_on = {comparable(x) for _, x in sample}
        source = [pair for pair in rest if comparable(pair[1]) not in trained_on]
        source = source[: args.pivot_pairs]
        dev = corpora.full_pairs(opus[lang, "dev"])[: args.dev_pairs]
        test = [] if args.flores_test else corpora.full_pairs(opus[lang, "test"])[: args.test_pairs]
        files["stage1.train"] += both_ways(lang, sample)
        files["stage1.dev"] += both_ways(lang, dev)
        files["test"] += both_ways(lang, test)
        files["pivot.source"] += [pair_row(lang, PIVOT, x, en, "opus-100") for en, x in source]
        report[lang] = {**count, "stage1": len(sample), "pivot_source": len(source)}
        report[lang].update(dev=len(dev), test=len(test))
    for src_lang, tgt_lang in all_directions(languages):
        stage_2 = is_non_english((src_lang, tgt_lang))
        train = flores_rows(flores["dev"], languages, src_lang, tgt_lang)[: args.flores_pairs]
        files["stage2.flores" if stage_2 else "stage1.train"] += train
        if stage_2 or args.flores_test:
            test = flores_rows(flores["devtest"], languages, src_lang, tgt_lang)
            files["test"] += test[: args.test_pairs]
    return files, report


def read_stage_data(
    data: str | Path, pseudo: str | Path | None = None, pseudo_only: bool = False
) -> tuple[list[str], list[dict], list[dict], list[Path]]:
    """(languages, train, dev, files) of a stage: Stage 1 the English-centric files; Stage 2, where
    `pseudo` is pivot.py's folder, those, FLORES-200 in the other directions, and the pseudo pairs
    (section 3.3, Table 5). Raises UserError."""
    data = Path(data)
    if not (data / "manifest.json").exists():
        raise UserError(
            f"{data}: no manifest.json in it; --data takes a folder that data.py has finished, "
            "`python data.py --source publisher` makes it"
        )
    languages = parse_languages(runs.read_json(data / "config.json").get("languages", ""))
    train, dev = [data / "stage1.train.jsonl"], [data / "stage1.dev.jsonl"]
    if pseudo is not None:
        pseudo_train = Path(pseudo) / "pseudo.train.jsonl"
        pseudo_dev = Path(pseudo) / "pseudo.dev.jsonl"
        if not pseudo_train.exists():
            raise UserError(
                f"{pseudo_train}: no such file; --pseudo takes the folder of a finished pivot.py "
                "run, `torchrun --nproc_per_node=2 pivot.py` makes runs/pseudo"
            )
        if pseudo_train.stat().st_size == 0:
            raise UserError(f"{pseudo_train}: no pairs in it; Stage 2 would be Stage 1 again")
        train += [data / "stage2.flores.jsonl", pseudo_train]
        dev += [pseudo_dev]
        if pseudo_only:
            train, dev = [pseudo_train], [pseudo_dev]
    train_rows, dev_rows = [], []
    for file in train:
        train_rows += corpora.read_jsonl(file, languages)
    for file in dev:
        dev_rows += corpora.read_jsonl(file, languages)
    return languages, train_rows, dev_rows, [*train, *dev]


# --- the command ----------------------------------------------------------------------------------


def parse_args() -> Namespace:
    parser = runs.ArgumentParser(__doc__)
    add = parser.add_argument
    add("--data", default="corpora", help="folder of the corpora as published (support/corpora.py)")
    sources = ["folder", "publisher", "hub"]
    fetches = "where what --data lacks comes from: nowhere, the publishers, the Hugging Face hub"
    add("--source", default="folder", choices=sources, help=fetches)
    add("--out", default="data", help="folder for the JSONL files and manifest.json")
    codes, order = ",".join(LANGUAGES), "codes, in the order of the experts (section 4.1)"
    add("--languages", default=codes, help=order)
    add("--train-pairs", type=int, default=20000, help="OPUS-100's per direction (section 4.1)")
    add("--dev-pairs", type=int, default=2000, help="per direction (Table 5)")
    add("--test-pairs", type=int, default=2000, help="per direction at most (Table 5)")
    add("--flores-test", action="store_true", help="test on FLORES-200 where English is, too")
    add("--pivot-pairs", type=int, default=100000, help="sentences per language, for pivot.py")
    add("--flores-pairs", type=int, help="FLORES-200's per direction at most (Table 5: all 997)")
    noise = "noise to remove from OPUS-100's training pairs, or none; each kind is counted"
    add("--drop", default=",".join(corpora.NOISE), help=noise)
    ratio = "length ratio that is noise; 4 of 95,841 human pairs of WMT and Tatoeba exceed 5"
    add("--max-ratio", type=float, default=5.0, help=ratio)
    add("--seed", type=int, default=0, help="of the samples")
    args = parser.parse_args()
    args.languages = ",".join(parse_languages(args.languages))
    args.drop = [] if args.drop == "none" else args.drop.split(",")
    if not set(args.drop) <= set(corpora.NOISE):
        known = ", ".join(corpora.NOISE)
        raise UserError(f"--drop {','.join(args.drop)}: takes {known}, or none")
    runs.at_least(0, args, "train_pairs", "dev_pairs", "test_pairs", "pivot_pairs", "flores_pairs")
    runs.at_least(1, args, "max_ratio")
    return args


def main() -> None:
    args = parse_args()
    out, languages = Path(args.out), args.languages.split(",")
    config = {k: v for k, v in vars(args).items() if k not in ("out", "source", "data")}
    config["data"] = str(Path(args.data).resolve())
    runs.check_claim(out, config)
    made = (out / "manifest.json").exists()
    if made and runs.all_there(out, runs.read_json(out / "manifest.json").get("files", ())):
        print(f"{out}: prepared already")
        return
    pairs = [opus_pair(lang) for lang in languages if lang != PIVOT]
    codes = [LANGUAGES[lang].flores for lang in languages]
    inputs = corpora.find_inputs(args.data, pairs, codes, args.source)
    files, report = prepare(args.data, languages, args)
    lock = runs.claim(out, config)
    manifest = {
        "settings": config,
        "sources": corpora.sources(args.data, [*pairs, "flores-200"]),
        "corpora": report,
        "files": {},
        "inputs": {str(file.relative_to(args.data)): runs.file_sha256(file) for file in inputs},
    }
    for name, rows in files.items():
        file = out / f"{name}.jsonl"
        runs.write_jsonl(file, rows)
        manifest["files"][file.name] = corpora.file_entry(file, rows)
    runs.write_json(out / "manifest.json", manifest)  # last: it says that the others are whole
    lock.close()
    corpora.print_report(manifest, out)


if __name__ == "__main__":
    runs.run_main(main)
