"""Scores of translations: BLEU, chrF++, ROUGE-L, COMET-22, off-target rate, and whether two systems differ (section 4.1).

Every metric is a library's; this file states how it is called. Higher is better except for off-target, cut-off and empty
rates. All are percentages.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from data import LANGUAGES
from files import UserError, hub_snapshot, reason

KEYS = ("bleu", "chrf", "rouge_l", "comet", "off_target", "off_target_ref", "cut_off", "empty")
NAMES = {"bleu": "BLEU", "chrf": "chrF++", "rouge_l": "ROUGE-L", "comet": "COMET-22", "off_target": "off-target %",
         "off_target_ref": "same, references %", "cut_off": "cut off %", "empty": "empty %"}
ROUGE_TOKENS = "ROUGE-L: F1 on lower-cased 13a tokens, into Chinese on characters"


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


class RougeTokens:
    """Tokens of ROUGE-L; the metric's own tokenizer would delete every letter outside a-z."""

    def __init__(self, tgt_lang):
        self.words = None if LANGUAGES[tgt_lang].bleu == "zh" else Tokenizer13a()

    def tokenize(self, text):
        return list("".join(text.split())) if self.words is None else self.words(text.lower()).split()


def score(rows, tgt_lang, identify):
    """Scores of one direction's rows (each with tgt and hyp), COMET apart, and the signatures of BLEU and chrF++.

    off_target: hypotheses that `identify` takes for another language, empty ones included; off_target_ref is the same
    for the references, so that the identifier's own errors can be told from the system's.
    """
    hyps, refs = [row["hyp"] for row in rows], [row["tgt"] for row in rows]
    bleu, chrf = BLEU(tokenize=LANGUAGES[tgt_lang].bleu), CHRF(word_order=2)
    rouge = RougeScorer(["rougeL"], tokenizer=RougeTokens(tgt_lang))
    share = lambda flags: 100 * sum(flags) / len(rows)
    return {
        "bleu": bleu.corpus_score(hyps, [refs]).score,
        "chrf": chrf.corpus_score(hyps, [refs]).score,
        "rouge_l": 100 * float(np.mean([rouge.score(r, h)["rougeL"].fmeasure for r, h in zip(refs, hyps)])),
        "off_target": share(not h.strip() or identify(h) != tgt_lang for h in hyps),
        "off_target_ref": share(identify(r) != tgt_lang for r in refs),
        "cut_off": share(row.get("finish") == "length" for row in rows),
        "empty": share(not h.strip() for h in hyps),
        "sentences": len(rows),
        "signatures": {"BLEU": str(bleu.get_signature()), "chrF++": str(chrf.get_signature())},
    }


def load_comet(name):
    """The COMET model `name`: a hub name such as Unbabel/wmt22-comet-da, or a local folder or checkpoint file, which is
    read without any network. Raises UserError that says why it can't be had."""
    local = Path(name).exists()
    folder = Path(name) if local else hub_snapshot(name, ["checkpoints/*", "hparams.yaml"])[0]
    checkpoint = folder if folder.is_file() else next(iter(sorted(folder.glob("**/*.ckpt"))), folder / "checkpoints/model.ckpt")
    try:
        from comet import load_from_checkpoint  # slow to import

        return load_from_checkpoint(str(checkpoint), local_files_only=local)
    except Exception as error:  # of comet, lightning, transformers or the hub
        raise UserError(f"--comet {name}: can't be loaded ({type(error).__name__}: {reason(error)})") from None


def comet_scores(model, rows, batch_size=32, device="auto"):
    """COMET of every row (src, hyp, tgt), times 100, in the rows' order. device: auto, cpu or cuda. Raises UserError where it fails,
    for want of memory for example."""
    data = [{"src": row["src"], "mt": row["hyp"], "ref": row["tgt"]} for row in rows]
    gpus = int(device != "cpu" and torch.cuda.is_available())
    try:
        result = model.predict(data, batch_size=batch_size, gpus=gpus, num_workers=1, progress_bar=sys.stderr.isatty())
    except Exception as error:  # of comet, lightning or torch
        raise UserError(f"--comet: scoring failed ({type(error).__name__}: {reason(error)})") from None
    return [100 * score for score in result.scores]


def paired_bootstrap(ours, theirs, tgt_lang, samples=1000):
    """Two systems' hypotheses of the same rows, resampled `samples` times by sacrebleu (with its own seed): for BLEU and chrF++
    {"ours", "theirs"}, the half-widths of their 95 % intervals, and the p-value of the difference. Raises UserError for other
    references."""
    if len(ours) != len(theirs):
        raise UserError(f"--against: {len(ours)} and {len(theirs)} sentences into {tgt_lang}")
    for a, b in zip(ours, theirs):
        if a["tgt"] != b["tgt"]:
            raise UserError(f"--against: the systems translated other sentences ({a['tgt'][:40]!r} and {b['tgt'][:40]!r})")
    metrics = {"BLEU": BLEU(tokenize=LANGUAGES[tgt_lang].bleu, references=[[r["tgt"] for r in ours]]),
               "chrF++": CHRF(word_order=2, references=[[r["tgt"] for r in ours]])}
    systems = [("theirs", [r["hyp"] for r in theirs]), ("ours", [r["hyp"] for r in ours])]
    _, results = PairedTest(systems, metrics, references=None, test_type="bs", n_samples=samples)()
    found = {}
    for name, key in (("bleu", "BLEU"), ("chrf", "chrF2++")):
        theirs_result, ours_result = results[key]
        found[name] = {"ours": ours_result.score, "ours_ci": ours_result.ci, "theirs": theirs_result.score,
                       "theirs_ci": theirs_result.ci, "p": ours_result.p_value}
    return found
