"""What the pivot's rules (section A.2) say of human translations, in which nothing is wrong: how
often each is a false alarm, and how often langid finds a language that is wrong.

    python examples/human_text.py --data corpora --page docs/human-text.md \\
        --data-out docs/data/human-text.json

Takes OPUS-100's training pairs. The page's part between its two markers is written from --data-out
alone (without --data: as it is), what stands around it is kept.
"""

import random
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data import LANGUAGES, PIVOT, read_opus
from support import runs
from support.corpora import full_pairs, length_ratio
from support.report import markdown, page_around
from support.scores import percent
from support.text import is_repetitive

MAKER, TITLE = "examples/human_text.py", "The pivot's rules on human text"
LENGTHS = [(1, 10), (11, 15), (16, 20), (21, 30), (31, 50), (51, 100), (101, 1000)]  # characters
MARGINS = (0, 2)  # langid's log-probability by which another language must be ahead
RATIOS = (2.0, 2.5, 3.0)


def own_language(text: str, lang: str) -> bool:
    return True


def has_digit(text: str, lang: str) -> bool:
    return re.search(r"\d", text) is not None


def is_mixed(text: str, lang: str) -> bool:
    """Latin letters in Russian or Chinese."""
    return lang in ("ru", "zh") and re.search("[A-Za-z]", text) is not None


def is_name(text: str, lang: str) -> bool:
    """At most four words, each with a capital, where that is not the whole of the writing."""
    words = text.split()
    capitals = all(word[0].isupper() for word in words)
    return lang != "zh" and 2 <= len(words) <= 4 and capitals


KINDS = {
    "all": own_language,
    "with a digit": has_digit,
    "Russian, Chinese with Latin letters": is_mixed,
    "2 to 4 words, all capitalised": is_name,
}


def length_name(low: int, high: int) -> str:
    return f"{low} to {high}" if high < 1000 else f"over {low - 1}"


def scorer() -> Callable[[str], dict[str, float]]:
    """langid restricted to our languages: {language: log-probability} of a text."""
    from langid.langid import LanguageIdentifier, model

    identifier = LanguageIdentifier.from_modelstring(model)
    identifier.set_languages(list(LANGUAGES))

    def scores(text: str) -> dict[str, float]:
        return {lang: float(score) for lang, score in identifier.rank(text)}

    return scores


def sampled(texts: list[str], most: int) -> list[str]:
    texts = sorted(set(texts))
    return random.Random(0).sample(texts, min(most, len(texts)))


def of_language(texts: dict[str, list[str]], scores: Callable) -> dict:
    """Sentences of one kind: how many, and by margin the share, %, that `off_target` drops, and the
    share of the other five languages that it would drop in this text's place."""
    wrong, found = {m: [] for m in MARGINS}, {m: [] for m in MARGINS}
    for lang, own in texts.items():
        for text in own:
            by_lang = scores(text)
            best = max(by_lang.values())
            for m in MARGINS:
                for asked in LANGUAGES:
                    dropped = best - by_lang[asked] > m
                    (wrong if asked == lang else found)[m].append(dropped)
    result = {"sentences": len(wrong[0])}
    for m in MARGINS:
        if wrong[m]:
            result[f"margin {m}"] = [round(percent(wrong[m]), 2), round(percent(found[m]), 2)]
    return result


def of_pairs(pairs: list[tuple[str, str]]) -> dict:
    """How many (English, X) pairs, and by ratio the share, %, that `length_ratio` drops."""
    above, ratios = {}, [length_ratio(en, x) for en, x in pairs]
    for most in RATIOS:
        above[str(most)] = round(percent(ratio > most for ratio in ratios), 2) if ratios else None
    return {"pairs": len(pairs), "above": above}


def measure(root: str, most: int) -> dict:
    """What the page is made from. most: sentences per language and length."""
    pairs, texts = [], {lang: [] for lang in LANGUAGES}
    for lang in LANGUAGES:
        if lang != PIVOT:
            own = full_pairs(read_opus(root, lang, "train"))
            pairs += own
            texts[PIVOT] += [en for en, _ in own]
            texts[lang] += [x for _, x in own]
    scores, lengths, ratios, sample = scorer(), {}, {}, {lang: [] for lang in LANGUAGES}
    for low, high in runs.progress(LENGTHS, desc="by length"):
        name, chosen = length_name(low, high), {}
        for lang, own in texts.items():
            chosen[lang] = sampled([text for text in own if low <= len(text) <= high], most)
            sample[lang] += chosen[lang]
        lengths[name] = of_language(chosen, scores)
        ratios[name] = of_pairs([(en, x) for en, x in pairs if low <= len(en) <= high])
    kinds = {}
    for kind, belongs in runs.progress(KINDS.items(), desc="by kind"):
        chosen = {}
        for lang, own in sample.items():
            chosen[lang] = [text for text in own if len(text) <= 50 and belongs(text, lang)]
        kinds[kind] = of_language(chosen, scores)
    circles = percent(is_repetitive(x) for _, x in pairs)
    repetitive = {"pairs": len(pairs), "percent": round(circles, 3)}
    return {"lengths": lengths, "kinds": kinds, "ratios": ratios, "repetitive": repetitive}


def langid_table(first: str, rows: dict) -> str:
    header = [first, "sentences", "false alarms %", "found %"]
    header += [f"{name} with a margin of {MARGINS[1]}" for name in header[2:]]
    lines = []
    for name, found in rows.items():
        cells = [name, f"{found['sentences']:,}"]
        for m in MARGINS:
            cells += [f"{share:.1f}" for share in found.get(f"margin {m}", ())]
        lines.append(cells)
    return markdown(header, lines)


def page_of(data: dict) -> str:
    """The page's generated part. data: what --data-out holds."""
    lines = []
    for name, found in data["ratios"].items():
        shares = ["" if share is None else f"{share:.2f}" for share in found["above"].values()]
        lines.append([name, f"{found['pairs']:,}", *shares])
    header = ["characters of English", "pairs", *(f"% above {ratio}" for ratio in RATIOS)]
    repetitive = data["repetitive"]
    return (
        "`off_target`: langid, given the six languages, on human sentences by their length in "
        "characters. A false alarm is a sentence that is dropped in its own language; found are "
        "those of the other five that are dropped. With a margin, another language must be ahead "
        "by that much in log-probability.\n\n"
        + langid_table("characters", data["lengths"])
        + "\nThe same, sentences of at most 50 characters by kind:\n\n"
        + langid_table("kind", data["kinds"])
        + "\n`length_ratio`, pairs with English (`--max-ratio` is 2.5 in the pivot):\n\n"
        + markdown(header, lines)
        + f"\n`--drop-repetitive` would drop {repetitive['percent']:.2f} % of these "
        f"{repetitive['pairs']:,} human targets.\n"
    )


def main() -> None:
    parser = runs.ArgumentParser(__doc__)
    add = parser.add_argument
    add("--data", help="folder of the corpora as published; without: --data-out is read")
    add("--page", required=True, help="Markdown file to write the tables into")
    add("--data-out", required=True, help="JSON file, what --page is made from")
    add("--most", type=int, default=250, help="sentences per language and length")
    args = parser.parse_args()
    runs.at_least(1, args, "most")
    before, behind = page_around(args.page, MAKER, TITLE)
    if args.data is not None:
        runs.write_json(args.data_out, measure(args.data, args.most))
    runs.write_atomic(args.page, before + page_of(runs.read_json(args.data_out)) + behind)
    print(args.page)


if __name__ == "__main__":
    runs.run_main(main)
