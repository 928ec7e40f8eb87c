"""Pseudo-corpora for the 20 non-English directions: X -> English -> Y (sections 3.3 and A.2).

    torchrun --nproc_per_node=2 pivot.py                            # runs/stage1 -> runs/pseudo
    torchrun --nproc_per_node=2 pivot.py --model meta-llama/... --out runs/pseudo-base  # Table 7
    torchrun --nproc_per_node=2 pivot.py --system nllb --out runs/pseudo-nllb           # Table 7

X comes from the part of OPUS-100 that Stage 1 did not train on. Translations are filtered; rounds
go on until every direction has --pairs of them or its source runs out. Writes pseudo.train.jsonl,
pseudo.dev.jsonl, report.json and report.md. The same command again continues a stopped run.
"""

import hashlib
import math
import random
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from data import LANGUAGES, PIVOT, pair_row, parse_languages
from generate import add_engine_arguments, check_languages
from support import runs
from support.baselines import add_system_argument, engine_of
from support.corpora import length_ratio, read_jsonl
from support.report import pivot_table
from support.runs import UserError
from support.scores import language_identifier
from support.text import comparable, is_empty, is_repetitive
from support.translations import translate_jsonl

RULES = ("empty", "cut_off", "off_target", "length_ratio", "duplicate", "repetitive")


def rejected(row: dict, lang: str, source: str, identify: Callable, max_ratio: float) -> str | None:
    """The first rule of section A.2 that `row`, a translation of `source`, breaks, or None."""
    if is_empty(row["hyp"]):
        return "empty"
    if row["finish"] == "length":
        return "cut_off"
    if identify(row["hyp"]) != lang:
        return "off_target"
    if length_ratio(source, row["hyp"]) > max_ratio:
        return "length_ratio"
    return None


class PseudoCorpus:
    """What has been kept and counted so far, by direction (x, y), English on neither side. One
    English translation of a sentence serves all targets of its language."""

    def __init__(
        self,
        sources: dict[str, list[str]],
        pairs: int,
        identify: Callable,
        max_ratio: float,
        drop_repetitive: bool = False,
    ):
        """sources: each language's sentences in the order in which they are used."""
        self.drop_repetitive = drop_repetitive
        self.sources, self.pairs = sources, pairs
        self.identify, self.max_ratio = identify, max_ratio
        self.used = dict.fromkeys(sources, 0)  # sentences
        self.directions = [(x, y) for x in sources for y in sources if x != y]
        self.kept = {d: {} for d in self.directions}  # target -> pair: no target comes twice
        self.counts = {d: Counter() for d in self.directions}

    def out_of(self, x: str) -> list[tuple[str, str]]:
        return [d for d in self.directions if d[0] == x]

    def missing(self, x: str) -> int:
        """Pairs that the direction out of x with the fewest still lacks."""
        return max(self.pairs - len(self.kept[d]) for d in self.out_of(x))

    def goes_on(self) -> bool:
        return any(
            self.missing(x) > 0 and self.used[x] < len(self.sources[x]) for x in self.sources
        )

    def next_sentences(self) -> list[dict]:
        """Sentences of the next round, to be put into English. Their number is estimated from the
        share of pairs kept so far in the worst direction."""
        rows = []
        for x, sentences in self.sources.items():
            if self.missing(x) <= 0:
                continue
            rates = []
            for d in self.out_of(x):
                rates.append((len(self.kept[d]) + 1) / (self.counts[d]["generated"] + 1))
            take = math.ceil(1.1 * self.missing(x) / max(min(rates), 0.1))
            if self.used[x]:  # the last pairs come in rounds of at least a batch
                take = max(take, 128)
            for text in sentences[self.used[x] : self.used[x] + take]:
                rows.append({"src_lang": x, "tgt_lang": PIVOT, "src": text})
            self.used[x] = min(self.used[x] + take, len(sentences))
        return rows

    def to_targets(self, english: list[dict]) -> list[dict]:
        """The English -> Y translations that follow, for directions that still lack pairs."""
        rows = []
        for row in english:
            why = rejected(row, PIVOT, row["src"], self.identify, self.max_ratio)
            for d in self.out_of(row["src_lang"]):
                if len(self.kept[d]) >= self.pairs:
                    continue
                self.counts[d]["generated"] += 1
                if why:
                    self.counts[d][f"en: {why}"] += 1
                    continue
                source = {"x_lang": d[0], "x": row["src"]}
                rows.append({"src_lang": PIVOT, "tgt_lang": d[1], "src": row["hyp"], **source})
        return rows

    def broken_rule(self, row: dict) -> str | None:
        """The first rule that `row`, one of to_targets translated, breaks, or None."""
        d, hyp = (row["x_lang"], row["tgt_lang"]), row["hyp"]
        why = rejected(row, d[1], row["x"], self.identify, self.max_ratio)
        if why is None and comparable(hyp) in self.kept[d]:
            why = "duplicate"
        if why is None and self.drop_repetitive and is_repetitive(hyp):
            why = "repetitive"
        return why

    def add(self, targets: list[dict]) -> None:
        """Filter what came of to_targets, and keep what is good and wanted."""
        for row in targets:
            d, why = (row["x_lang"], row["tgt_lang"]), self.broken_rule(row)
            if why:
                self.counts[d][why] += 1
            elif len(self.kept[d]) < self.pairs:
                pair = pair_row(*d, row["x"], row["hyp"], "pseudo")
                self.kept[d][comparable(row["hyp"])] = {**pair, "pivot": row["src"]}
            else:
                self.counts[d]["generated"] -= 1  # more than was wanted: neither kept nor dropped

    def split(self, dev_share: float) -> tuple[list[dict], list[dict], dict]:
        """(train, dev, report). Dev is chosen by the source's hash, so that the targets, which
        share their sources, set mostly the same sentences aside."""
        train, dev, report = [], [], {}
        for d in self.directions:
            pairs = sorted(self.kept[d].values(), key=source_hash)
            aside = round(dev_share * len(pairs))
            if dev_share and len(pairs) > 1:  # a small trial has a dev pair, too
                aside = max(1, aside)
            dev += pairs[:aside]
            train += pairs[aside:]
            ended = f"source ran out after {self.used[d[0]]} sentences"
            if len(pairs) == self.pairs:
                ended = "complete"
            report["-".join(d)] = {"generated": 0, **self.counts[d], "kept": len(pairs)}
            repetitive = sum(is_repetitive(pair["tgt"]) for pair in pairs)
            report["-".join(d)].update({"of these repetitive": repetitive, "ended": ended})
        return train, dev, report


def source_hash(row: dict) -> bytes:
    return hashlib.sha256(row["src"].encode()).digest()


def parse_args() -> Namespace:
    parser = runs.ArgumentParser(__doc__)
    add = parser.add_argument
    add("--data", default="data", help="folder that data.py wrote; pivot.source.jsonl is read")
    add("--out", default="runs/pseudo", help="folder for the pseudo pairs and the report")
    add("--pairs", type=int, default=20000, help="pairs wanted per direction (section 4.1)")
    add("--dev-share", type=float, default=0.1, help="set aside as dev (section A.2, Table 5)")
    letters = "longer over shorter side in letters, a Chinese character being three (section A.2)"
    add("--max-ratio", type=float, default=2.5, help=letters)
    add("--max-tries", type=int, default=20, help="source sentences at most, per wanted pair")
    add("--drop-repetitive", action="store_true", help="targets that go round in circles, too")
    add("--seed", type=int, default=0, help="of the order of sentences")
    add_engine_arguments(parser)
    add_system_argument(parser)
    args = parser.parse_args()
    runs.at_least(1, args, "batch_size", "max_new_tokens", "pairs", "max_ratio", "max_tries")
    runs.within(1, args, "dev_share")
    if args.adapter is None and args.model is None and args.system is None:
        args.adapter = "runs/stage1/adapter"
    return args


def read_sources(args: Namespace) -> tuple[list[str], dict[str, list[str]]]:
    """(languages, {X: its sentences, each once, in random order})."""
    file = Path(args.data) / "pivot.source.jsonl"
    if not file.exists():
        raise UserError(f"{file}: no such file; `python data.py --source publisher` makes it")
    pool = {}
    for row in read_jsonl(file, LANGUAGES, need=("src",)):
        pool.setdefault(row["src_lang"], {}).setdefault(comparable(row["src"]), row["src"])
    if not pool:
        todo = "data.py --train-pairs must leave some of OPUS-100 to the pivot"
        raise UserError(f"{file}: no sentences in it; {todo}")
    config = runs.read_json(Path(args.data) / "config.json")
    languages = parse_languages(config.get("languages", ""))
    if len(languages) < 3:
        raise UserError(f"{args.data}: has {', '.join(languages)}; a pivot needs 2 beside {PIVOT}")
    sources = {}
    for lang in languages:
        if lang != PIVOT:
            sentences = list(pool.get(lang, {}).values())
            order = random.Random(f"{args.seed} {lang}").sample(sentences, len(sentences))
            sources[lang] = order[: args.pairs * args.max_tries]
    return languages, sources


def main() -> None:
    args = parse_args()
    out = Path(args.out)
    ranks = runs.init_distributed(args.device, args.timeout)
    languages, sources = read_sources(args)
    engine = engine_of(args, ranks)
    check_languages(engine, set(languages), args.adapter or args.system or args.model)
    settings = ("pairs", "dev_share", "max_ratio", "seed", "max_new_tokens", "max_tries")
    settings += ("drop_repetitive",)
    config = {**engine.identity, **{name: getattr(args, name) for name in settings}}
    config["source_sha256"] = runs.file_sha256(Path(args.data) / "pivot.source.jsonl")
    lock = runs.claim_run(out, config, ranks)
    files = ("report.json", "report.md", "pseudo.train.jsonl", "pseudo.dev.jsonl")
    if ranks.broadcast_from_rank0(lambda: runs.all_there(out, files)):
        if ranks.rank == 0:
            print(f"{out}: made already\n{(out / 'report.md').read_text(encoding='utf-8')}", end="")
        return
    (out / "rounds").mkdir(exist_ok=True)
    identify = language_identifier(languages)
    corpus = PseudoCorpus(sources, args.pairs, identify, args.max_ratio, args.drop_repetitive)

    def translate(rows: list[dict], number: int, hop: str) -> list[dict]:
        file = out / "rounds" / f"{number}.{hop}.jsonl"
        sizes = args.batch_size, args.max_new_tokens
        return translate_jsonl(engine, rows, file, *sizes, ranks, f"round {number}: {hop}")

    number = 0
    while corpus.goes_on():
        number += 1
        english = translate(corpus.next_sentences(), number, "english")
        corpus.add(translate(corpus.to_targets(english), number, "targets"))
        if ranks.rank == 0:
            kept = sum(len(pairs) for pairs in corpus.kept.values())
            print(f"round {number}: {kept} of {args.pairs * len(corpus.kept)} pairs", flush=True)
    if lock is None:
        return  # the files are rank 0's
    train, dev, report = corpus.split(args.dev_share)
    train_file, dev_file = out / "pseudo.train.jsonl", out / "pseudo.dev.jsonl"
    runs.write_jsonl(train_file, train)
    runs.write_jsonl(dev_file, dev)
    runs.write_atomic(out / "report.md", pivot_table(report, RULES))
    runs.write_json(out / "report.json", report)  # last: it says that the others are whole
    print(pivot_table(report, RULES) + f"{train_file}: {len(train)} pairs, {dev_file}: {len(dev)}")
    lock.close()


if __name__ == "__main__":
    runs.run_main(main)
