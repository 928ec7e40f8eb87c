"""What the whole method does with a small real model and real text: the page of a `make small`.

    python examples/real_text.py --run runs/small/SmolLM2-135M-Instruct \\
        --page runs/small/SmolLM2-135M-Instruct/real-text.md --data-out .../real-text.json

Scores, their intervals and what each of the pivot's rules dropped go into --data-out; the page's
part between its two markers is written from that file alone (without --run: as it is), what stands
around it is kept.
"""

import statistics
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data import LANGUAGES, PIVOT, group_of
from pivot import RULES, PseudoCorpus, rejected
from support import runs
from support.corpora import NOISE, read_jsonl
from support.likelihood import middle, per_character, sentence_draws
from support.report import (
    COLUMNS,
    better_and_worse,
    by_direction,
    markdown,
    page_around,
    read_curves,
    read_hypotheses,
    read_scores,
)
from support.runs import UserError
from support.scores import language_identifier, resampled
from support.text import comparable, is_repetitive

MAKER, TITLE = "examples/real_text.py", "A small real model on real text"
SYSTEMS = {  # folder -> name
    "base": "backbone alone",
    "stage1": "CrossLoRA, Stage 1",
    "stage2": "CrossLoRA, Stage 2",
    "lora": "LoRA in Stage 2's place",
    "molora-static": "MoLoRA (Static) in Stage 2's place",
}
TRAINED = list(SYSTEMS)[1:]
OURS = "stage2"
GROUPS = {"english": "English-centric", "non_english": "non-English-centric", "all": "all"}
HOPS = {"english": "into English", "targets": "from English"}
KEPT, CIRCLES = "kept", "kept, though it goes round in circles"  # beside the rules' names
SHOWN = 10  # examples per rule
EXAMPLE = {  # the columns of an example, by hop
    "english": ["direction", "source", "translation"],
    "targets": ["direction", "source", "by way of", "translation"],
}


# --- scores and their intervals -------------------------------------------------------------------


def average_scores(rows: dict, draws: np.ndarray) -> dict[str, tuple[float, np.ndarray]]:
    """BLEU and chrF++ averaged over all directions, and the same of each resample:
    {key: (score, (samples,))}. rows: {(src, tgt): hypotheses}; draws (samples, sentences) takes the
    same sentences in each direction."""
    means, samples = {"bleu": [], "chrf": []}, {"bleu": [], "chrf": []}
    for (_, tgt_lang), of_direction in runs.progress(rows.items(), desc="resampling"):
        for key, (score, scores) in resampled(of_direction, tgt_lang, draws).items():
            means[key].append(score)
            samples[key].append(scores)
    found = {}
    for key in means:
        found[key] = statistics.mean(means[key]), np.mean(samples[key], axis=0)
    return found


def with_interval(mean: float, samples: np.ndarray) -> dict:
    return {"mean": round(mean, 4), "interval": middle(samples)}


def group_nlls(nlls: list[float], pairs: list[dict], draws: np.ndarray) -> dict[str, dict]:
    """NLL per character by group of directions: {group: {"mean", "interval"}}."""
    found = per_character(nlls, pairs, draws)
    return {group: found[group] for group in GROUPS}


# --- what the run folder says ---------------------------------------------------------------------


def read_test(path: Path) -> list[dict]:
    """Test pairs. Raises UserError where the directions' sentences are not the same ones."""
    pairs, texts = read_jsonl(path, LANGUAGES), {}
    for (_, tgt_lang), rows in by_direction(pairs).items():
        said = [row["tgt"] for row in rows]
        if texts.setdefault(tgt_lang, said) != said:
            raise UserError(f"{path}: its directions differ; `data.py --flores-test` makes one set")
    if {group_of(*direction) for direction in by_direction(pairs)} != {"english", "non_english"}:
        raise UserError(f"{path}: it needs directions with English and without")
    return pairs


def hypotheses_of(scores: Path, pairs: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """An evaluation's hypotheses by direction. Raises UserError where they are of other pairs."""
    found = read_hypotheses(scores)
    wanted = by_direction(pairs)
    for direction in {**wanted, **found}:
        theirs = [row["tgt"] for row in found.get(direction, [])]
        if theirs != [row["tgt"] for row in wanted.get(direction, [])]:
            raise UserError(f"{scores}: not of the run's test set; run evaluate.py again")
    return found


def read_nlls(scores: Path, test: Path) -> list[float]:
    """The NLL of each reference. Raises UserError where they are another test set's."""
    found = runs.read_json(scores / "likelihood.json")
    if "nlls" not in found or found.get("test_sha256") != runs.file_sha256(test):
        raise UserError(f"{scores}/likelihood.json: not of {test}; run support/likelihood.py again")
    return found["nlls"]


def training_of(run: Path) -> dict:
    """Steps, time and size of a run of train.py. Raises UserError for one that isn't finished."""
    summary = runs.read_json(run / "summary.json")
    steps, dev = read_curves(run)
    if not dev:
        raise UserError(f"{run}/metrics.jsonl: no dev loss in it; is the run finished?")
    last = {group: part for group, part in dev[-1]["dev"].items() if group in GROUPS}
    return {
        "parameters": summary["trainable_parameters"],
        "pairs": summary["train_pairs"],
        "too_long": summary["train_dropped"],
        "steps": summary["steps"],
        "minutes": round(sum(step["seconds"] for step in steps) / 60, 1),
        "dev_nll": {group: round(part["nll"], 4) for group, part in last.items()},
    }


def kept_rule(hyp: str) -> str:
    return CIRCLES if is_repetitive(hyp) else KEPT


def verdicts(pseudo: Path) -> dict[str, dict[str, list[dict]]]:
    """What pivot.py said of each translation, in its order: {hop: {rule: translations}}. Raises
    UserError for a pivot that isn't finished."""
    config, report = runs.read_json(pseudo / "config.json"), runs.read_json(pseudo / "report.json")
    identify, found = language_identifier(LANGUAGES), {hop: {} for hop in HOPS}
    rules = [config[key] for key in ("max_ratio", "drop_repetitive")]
    corpus = PseudoCorpus(dict.fromkeys(LANGUAGES, []), config["pairs"], identify, *rules)

    def note(hop: str, rule: str, row: dict) -> None:
        line = {"direction": f"{row['src_lang']}-{row['tgt_lang']}", "source": row["src"]}
        if hop == "targets":
            direction = f"{row['x_lang']}-{row['tgt_lang']}"
            line = {"direction": direction, "source": row["x"], "english": row["src"]}
        found[hop].setdefault(rule, []).append({**line, "hyp": row["hyp"]})

    for number in range(1, len(list((pseudo / "rounds").glob("*.english.jsonl"))) + 1):
        file = pseudo / "rounds" / f"{number}.english.jsonl"
        for row in read_jsonl(file, LANGUAGES, ("src",), ("hyp",)):
            rule = rejected(row, PIVOT, row["src"], identify, config["max_ratio"])
            note("english", rule or kept_rule(row["hyp"]), row)
        file = pseudo / "rounds" / f"{number}.targets.jsonl"
        for row in read_jsonl(file, LANGUAGES, ("src", "x"), ("hyp",)):
            rule, kept = corpus.broken_rule(row), corpus.kept[row["x_lang"], row["tgt_lang"]]
            if rule is None and len(kept) < corpus.pairs:  # a pair too many is no rule's
                rule = kept_rule(row["hyp"])
            if rule:
                note("targets", rule, row)
            corpus.add([row])
    for direction, counts in report.items():
        if len(corpus.kept[tuple(direction.split("-"))]) != counts["kept"]:
            raise UserError(f"{pseudo}: its rounds are not those of its report.json")
    return found


def cell(text: str, most: int = 120) -> str:
    """A text as it stands in a Markdown table, a long one with its length."""
    text = comparable(text)
    if len(text) > most:
        text = f"{text[:most].rstrip()} ... ({len(text)} characters)"
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


def examples_of(found: dict[str, list[dict]]) -> dict:
    """{rule: {"count", "shown"}}: up to SHOWN of each rule, evenly picked."""
    result = {}
    for rule in (*RULES, KEPT, CIRCLES):
        rows = found.get(rule, [])
        count = min(SHOWN, len(rows))
        shown = []
        for i in range(count):
            row = rows[i * len(rows) // count]
            shown.append({key: cell(text) for key, text in row.items()})
        result[rule] = {"count": len(rows), "shown": shown}
    return result


def model_name(backbone: str) -> str:
    """owner/name@commit of a hub model, a folder's name."""
    name, _, commit = backbone.partition("@")
    return f"{name}@{commit[:7]}" if commit else Path(backbone).name


def gather(run: Path, samples: int, machine: str) -> dict:
    """What the page is made from. Raises UserError for a run that isn't finished."""
    scores, test = run / "scores", run / "data/test.jsonl"
    manifest = runs.read_json(run / "data/manifest.json")
    config = runs.read_json(run / OURS / "config.json")
    pairs = read_test(test)
    draws = sentence_draws(pairs, samples)
    backbone = runs.read_json(run / OURS / "adapter/adapter.json")["backbone"]
    data = {"machine": machine, "model": model_name(backbone), "systems": {}, "against": {}}
    data["settings"] = {key: config[key] for key in ("epochs", "batch_size", "lr")}
    for key in ("train_pairs", "flores_pairs"):
        data["settings"][key] = manifest["settings"][key]
    data["settings"].update(test_pairs=draws.shape[1], directions=len(by_direction(pairs)))
    data["settings"]["pseudo_pairs"] = runs.read_json(run / "pseudo/config.json")["pairs"]
    data["corpora"] = manifest["corpora"]
    hyps = {name: hypotheses_of(scores / name, pairs) for name in SYSTEMS}
    nlls = {name: read_nlls(scores / name, test) for name in SYSTEMS}
    averages = {name: average_scores(hyps[name], draws) for name in SYSTEMS}
    for name in SYSTEMS:
        means = read_scores(scores / name)["averages"]
        system = {"averages": means}
        for key, found in averages[name].items():
            system[key] = with_interval(*found)
        system["nll"] = group_nlls(nlls[name], pairs, draws)
        if name in TRAINED:
            system["training"] = training_of(run / name)
        data["systems"][name] = system
    for name in SYSTEMS:
        if name != OURS:
            less = [ours - theirs for ours, theirs in zip(nlls[OURS], nlls[name])]
            found = {"nll": group_nlls(less, pairs, draws)}
            found["directions"] = better_and_worse(hyps[OURS], hyps[name], samples)
            for key, (theirs, their_samples) in averages[name].items():
                score, own = averages[OURS][key]
                found[key] = with_interval(score - theirs, own - their_samples)
            data["against"][name] = found
    data["rules"] = {hop: examples_of(found) for hop, found in verdicts(run / "pseudo").items()}
    return data


# --- the page -------------------------------------------------------------------------------------


def in_brackets(found: dict, digits: int, sign: str = "") -> str:
    """A mean and its interval."""
    low, high = found["interval"]
    form = f"{sign}.{digits}f"
    return f"{found['mean']:{form}} ({low:{form}} to {high:{form}})"


def systems_table(systems: dict) -> str:
    header = ["system", "BLEU", "chrF++"]
    header += [f"NLL per character, {group}" for group in GROUPS.values()]
    lines = []
    for name, system in systems.items():
        cells = [SYSTEMS[name], in_brackets(system["bleu"], 2), in_brackets(system["chrf"], 2)]
        for group in GROUPS:
            cells.append(in_brackets(system["nll"][group], 3))
        lines.append(cells)
    return markdown(header, lines)


def groups_table(systems: dict) -> str:
    """Where the translations are: by group of directions."""
    header = ["system"]
    for key in ("BLEU", "chrF++", "off-target %"):
        header += [f"{key} {COLUMNS[column]}" for column in ("english", "non_english")]
    lines = []
    for name, system in systems.items():
        cells = [SYSTEMS[name]]
        for key, digits in (("bleu", 2), ("chrf", 2), ("off_target", 1)):
            for column in ("english", "non_english"):
                cells.append(f"{system['averages'][column][key]:.{digits}f}")
        lines.append(cells)
    return markdown(header, lines)


def differences_table(against: dict) -> str:
    header = [f"{SYSTEMS[OURS]} less", *(f"NLL, {group}" for group in GROUPS.values())]
    header += ["BLEU", "chrF++", "BLEU: directions better / worse", "chrF++: better / worse"]
    lines = []
    for name, found in against.items():
        cells = [SYSTEMS[name]]
        for group in GROUPS:
            cells.append(in_brackets(found["nll"][group], 3, "+"))
        for key in ("bleu", "chrf"):
            cells.append(in_brackets(found[key], 2, "+"))
        for key in ("bleu", "chrf"):
            cells.append("{} / {}".format(*found["directions"][key]))
        lines.append(cells)
    return markdown(header, lines)


def training_table(systems: dict) -> str:
    header = ["run", "trained parameters", "pairs", "too long", "steps", "minutes"]
    header += ["dev NLL with English", "dev NLL, pseudo pairs"]
    lines = []
    for name in TRAINED:
        run = systems[name]["training"]
        cells = [f"{run['parameters']:,}", f"{run['pairs']:,}", str(run["too_long"])]
        cells += [str(run["steps"]), f"{run['minutes']:.1f}"]
        for group in ("english", "non_english"):
            nll = run["dev_nll"].get(group)  # Stage 1's dev set has no pseudo pairs
            cells.append("" if nll is None else f"{nll:.3f}")
        lines.append([SYSTEMS[name], *cells])
    return markdown(header, lines)


def corpora_table(corpora: dict) -> str:
    """What data.py read of each language's training pairs, and left out by rule."""
    keys = ["read", "empty", "in_dev_or_test", *NOISE]
    lines = []
    for lang, counts in corpora.items():
        lines.append([lang, *(f"{counts[key]:,}" for key in keys)])
    return markdown(["language", *keys], lines)


def rules_table(rules: dict) -> str:
    """Translations by rule, in both hops."""
    lines = []
    for rule in rules["targets"]:
        cells = [rule]
        for hop in HOPS:
            count, total = rules[hop][rule]["count"], sum(r["count"] for r in rules[hop].values())
            cells.append(f"{count} ({100 * count / max(1, total):.1f} %)")
        lines.append(cells)
    return markdown(["rule", *HOPS.values()], lines)


def examples_tables(rules: dict) -> str:
    text = ""
    for hop, name in HOPS.items():
        for rule, found in rules[hop].items():
            if found["shown"]:
                rows = [list(row.values()) for row in found["shown"]]
                text += f"\n{name}, `{rule}`:\n\n"
                text += markdown(EXAMPLE[hop], rows)
    return text


def too_few(sentences: int) -> str:
    """A caveat of the bootstrap, where it is one."""
    return "" if sentences >= 30 else f" (of {sentences} sentences such an interval is too narrow)"


def matched(systems: dict) -> str:
    """Which systems have as many parameters as CrossLoRA's Stage 2, and took as many steps."""
    ours = systems[OURS]["training"]
    found = []
    for name in ("lora", "molora-static"):
        run = systems[name]["training"]
        times = run["parameters"] / ours["parameters"]
        parameters = "as many parameters" if times == 1 else f"{times:.2f} times the parameters"
        found.append(f"{SYSTEMS[name]} has {parameters} and takes {run['steps']} steps")
    return (
        f"{SYSTEMS[OURS]} takes {ours['steps']} steps; beside it, {', '.join(found)}. All have the "
        "same pairs and the same learning rate, the paper's, tuned for none."
    )


def page_of(data: dict) -> str:
    """The page's generated part. data: what --data-out holds."""
    s = data["settings"]
    flores = "all" if s["flores_pairs"] is None else s["flores_pairs"]
    parts = [
        f"`{data['model']}` on {data['machine']}: {s['train_pairs']} pairs per direction with "
        f"English and {flores} of FLORES-200 per direction, {s['pseudo_pairs']} pseudo pairs per "
        f"direction wanted; {s['epochs']} epoch(s) in batches of {s['batch_size']}, learning rate "
        f"{s['lr']:g}, one seed. Tested on {s['test_pairs']} FLORES-200 sentences in each of "
        f"{s['directions']} directions. Brackets: 95 % intervals by resampling these sentences, "
        f"the same ones in every direction{too_few(s['test_pairs'])}; what another seed of "
        "training would change is not in them. The NLL is in nats; languages differ in it by "
        f"script, so compare down a column. {matched(data['systems'])}",
        systems_table(data["systems"]),
        groups_table(data["systems"]),
        f"{SYSTEMS[OURS]} against the others: the difference of the NLL per character (below zero: "
        "the references are likelier) and of the average scores, with the interval of the "
        "difference, and in how many directions it is better or worse by paired "
        "bootstrap (p < 0.05; one or two in thirty would come by chance if directions were "
        "independent, but all have the same sentences).",
        differences_table(data["against"]),
        "What was trained; minutes are those of its steps. Compare the dev NLL down a column.",
        training_table(data["systems"]),
        "What `data.py` read of the corpora with English, and counted by rule:",
        corpora_table(data["corpora"]),
        "What the pivot's rules said of its translations:",
        rules_table(data["rules"]),
        f"Up to {SHOWN} of each, evenly picked.\n{examples_tables(data['rules'])}",
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def main() -> None:
    parser = runs.ArgumentParser(__doc__)
    add = parser.add_argument
    add("--run", type=Path, help="folder that `make small` filled; without: --data-out is read")
    add("--page", required=True, help="Markdown file to write the tables into")
    add("--data-out", required=True, help="JSON file, what --page is made from")
    add("--machine", default="a machine of unknown kind", help="what it ran on, for the page")
    add("--samples", type=int, default=1000, help="resamples of intervals and paired bootstrap")
    args = parser.parse_args()
    runs.at_least(40, args, "samples")
    before, behind = page_around(args.page, MAKER, TITLE)
    if args.run is not None:
        data = gather(args.run, args.samples, args.machine)
        Path(args.data_out).parent.mkdir(parents=True, exist_ok=True)
        runs.write_json(args.data_out, data)
    Path(args.page).parent.mkdir(parents=True, exist_ok=True)
    runs.write_atomic(args.page, before + page_of(runs.read_json(args.data_out)) + behind)
    print(args.page)


if __name__ == "__main__":
    runs.run_main(main)
