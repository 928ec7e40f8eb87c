"""Scores of translations: BLEU, chrF++, ROUGE-L, COMET-22, off-target rate, and whether two systems
differ (section 4.1).

Every metric is a library's; this file states how it is called. Higher is better except for
off-target, cut-off and empty rates. All are on a scale of 0 to 100.
"""

import sys
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from data import LANGUAGES
from support.runs import UserError, hub_snapshot, reason
from support.text import is_empty

KEYS = ("bleu", "chrf", "rouge_l", "comet", "off_target", "off_target_ref", "cut_off", "empty")
NAMES = {
    "bleu": "BLEU",
    "chrf": "chrF++",
    "rouge_l": "ROUGE-L",
    "comet": "COMET-22",
    "off_target": "off-target %",
    "off_target_ref": "same, references %",
    "cut_off": "cut off %",
    "empty": "empty %",
}
ROUGE_TOKENS = "ROUGE-L: F1 on lower-cased 13a tokens, into Chinese on characters"


def language_identifier(languages: Collection[str]) -> Callable[[str], str]:
    """langid restricted to `languages` (it is weak on short text, and worse with its other 90 to
    choose from): a function from text to code."""
    from langid.langid import LanguageIdentifier, model  # unpacks its model on import

    identifier = LanguageIdentifier.from_modelstring(model)
    unknown = sorted(set(languages) - set(identifier.nb_classes))
    if unknown:
        raise UserError(
            f"langid does not know {', '.join(unknown)}: off-target output can't be told"
        )
    identifier.set_languages(list(languages))

    def identify(text: str) -> str:
        return identifier.classify(text)[0]

    return identify


class RougeTokens:
    """Tokens of ROUGE-L; the metric's own tokenizer would delete every letter outside a-z."""

    def __init__(self, tgt_lang: str):
        self.words = None if LANGUAGES[tgt_lang].bleu == "zh" else Tokenizer13a()

    def tokenize(self, text: str) -> list[str]:
        if self.words is None:
            return list("".join(text.split()))
        return self.words(text.lower()).split()


def percent(flags: Iterable[bool]) -> float:
    """Share of true ones."""
    flags = list(flags)
    return 100 * sum(flags) / len(flags)


def score(rows: list[dict], tgt_lang: str, identify: Callable[[str], str]) -> dict:
    """Scores of one direction's rows (each with tgt and hyp), COMET apart, and the signatures of
    BLEU and chrF++.

    off_target: hypotheses that `identify` takes for another language, empty ones included;
    off_target_ref is the same for the references, so that the identifier's own errors can be told
    from the system's.
    """
    hyps, refs = [row["hyp"] for row in rows], [row["tgt"] for row in rows]
    bleu, chrf = BLEU(tokenize=LANGUAGES[tgt_lang].bleu), CHRF(word_order=2)
    rouge = RougeScorer(["rougeL"], tokenizer=RougeTokens(tgt_lang))
    f1 = [rouge.score(ref, hyp)["rougeL"].fmeasure for ref, hyp in zip(refs, hyps)]
    return {
        "bleu": bleu.corpus_score(hyps, [refs]).score,
        "chrf": chrf.corpus_score(hyps, [refs]).score,
        "rouge_l": 100 * float(np.mean(f1)),
        "off_target": percent(is_empty(hyp) or identify(hyp) != tgt_lang for hyp in hyps),
        "off_target_ref": percent(identify(ref) != tgt_lang for ref in refs),
        "cut_off": percent(row.get("finish") == "length" for row in rows),
        "empty": percent(is_empty(hyp) for hyp in hyps),
        "sentences": len(rows),
        "signatures": {"BLEU": str(bleu.get_signature()), "chrF++": str(chrf.get_signature())},
    }


def load_comet(name: str) -> Any:
    """The COMET model `name`: a hub name such as Unbabel/wmt22-comet-da, or a local folder or
    checkpoint file, which is read without any network. Raises UserError that says why it can't be
    had."""
    local = Path(name).exists()
    folder = Path(name) if local else hub_snapshot(name, ["checkpoints/*", "hparams.yaml"])[0]
    checkpoint = folder
    if not folder.is_file():
        found = sorted(folder.glob("**/*.ckpt"))
        checkpoint = found[0] if found else folder / "checkpoints/model.ckpt"
    try:
        from comet import load_from_checkpoint  # slow to import
    except ImportError:
        raise UserError(
            "--comet: unbabel-comet is not installed; it needs Python 3.11 or 3.12"
        ) from None
    try:
        return load_from_checkpoint(str(checkpoint), local_files_only=local)
    except Exception as error:  # of comet, lightning, transformers or the hub
        raise UserError(
            f"--comet {name}: can't be loaded ({type(error).__name__}: {reason(error)})"
        ) from None


def comet_scores(
    model: Any, rows: list[dict], batch_size: int = 32, device: str = "auto"
) -> list[float]:
    """COMET of every row (src, hyp, tgt), times 100, in the rows' order. device: auto, cpu or cuda.
    Raises UserError where it fails, for want of memory for example."""
    data = [{"src": row["src"], "mt": row["hyp"], "ref": row["tgt"]} for row in rows]
    gpus = int(device != "cpu" and torch.cuda.is_available())
    try:
        result = model.predict(
            data, batch_size=batch_size, gpus=gpus, num_workers=1, progress_bar=sys.stderr.isatty()
        )
    except Exception as error:  # of comet, lightning or torch
        raise UserError(
            f"--comet: scoring failed ({type(error).__name__}: {reason(error)})"
        ) from None
    return [100 * score for score in result.scores]


def resampled(
    rows: list[dict], tgt_lang: str, draws: np.ndarray
) -> dict[str, tuple[float, np.ndarray]]:
    """BLEU and chrF++ of one direction's rows, and of each resample of them: {key: (score,
    (samples,))}. draws (samples, rows): which rows a resample takes. Each sentence's counts are
    taken once, as in sacrebleu's own bootstrap."""
    hyps, refs = [row["hyp"] for row in rows], [row["tgt"] for row in rows]
    found = {}
    for key, metric in (
        ("bleu", BLEU(tokenize=LANGUAGES[tgt_lang].bleu)),
        ("chrf", CHRF(word_order=2)),
    ):
        counts = np.array(metric._extract_corpus_statistics(hyps, [refs]))  # (rows, counts)
        scores = []
        for chosen in (np.arange(len(rows)), *draws):
            sums = counts[chosen].sum(0).tolist()
            scores.append(metric._compute_score_from_stats(sums).score)
        found[key] = scores[0], np.array(scores[1:])
    return found


def paired_bootstrap(
    ours: list[dict], theirs: list[dict], tgt_lang: str, samples: int = 1000
) -> dict[str, dict]:
    """Two systems' hypotheses of the same rows, resampled `samples` times by sacrebleu (with its
    own seed): for BLEU and chrF++ {"ours", "ours_ci", "theirs", "theirs_ci", "p"}, where ci is half
    of the 95 % interval and p that of the difference. Raises UserError for other references."""
    if len(ours) != len(theirs):
        raise UserError(f"--against: {len(ours)} and {len(theirs)} sentences into {tgt_lang}")
    for a, b in zip(ours, theirs):
        if a["tgt"] != b["tgt"]:
            raise UserError(
                "--against: the systems translated other sentences "
                f"({a['tgt'][:40]!r} and {b['tgt'][:40]!r})"
            )
    metrics = {
        "BLEU": BLEU(tokenize=LANGUAGES[tgt_lang].bleu, references=[[r["tgt"] for r in ours]]),
        "chrF++": CHRF(word_order=2, references=[[r["tgt"] for r in ours]]),
    }
    systems = [("theirs", [r["hyp"] for r in theirs]), ("ours", [r["hyp"] for r in ours])]
    _, results = PairedTest(systems, metrics, references=None, test_type="bs", n_samples=samples)()
    found = {}
    for name, key in (("bleu", "BLEU"), ("chrf", "chrF2++")):
        theirs_result, ours_result = results[key]
        found[name] = {
            "ours": ours_result.score,
            "ours_ci": ours_result.ci,
            "theirs": theirs_result.score,
            "theirs_ci": theirs_result.ci,
            "p": ours_result.p_value,
        }
    return found
