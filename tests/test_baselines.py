"""Prior systems on small random checkpoints of their own architectures, made by transformers, with
tiny tokenizers."""

import json

import pytest
import torch
from conftest import ROOT, TORCHRUN, inside, read_rows, refuses, run, translate_batch

from data import LANGUAGES
from generate import check_languages
from support import baselines
from support.baselines import Baseline
from support.runs import Ranks, UserError, read_json, write_json, write_jsonl
from support.translations import job_of, translate_via_english

sentencepiece = pytest.importorskip("sentencepiece")
import transformers

pytestmark = pytest.mark.once

TEXT = [
    "Der Hund sieht den Tisch.",
    "The dog sees the table.",
    "Hundurinn sér borðið.",
    "Pes vidí stůl.",
    "Собака видит стол.",
    "那只狗看见桌子。",
]
SIZE = dict(
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    max_position_embeddings=128,
    init_std=1.0,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder a system, as its authors publish them: M2M100 twice (with NLLB's tokenizer and its
    own), Llama twice."""
    root = tmp_path_factory.mktemp("systems")
    (root / "text").write_text("\n".join(TEXT * 30), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(root / "text"),
        model_prefix=str(root / "sp"),
        vocab_size=150,
        hard_vocab_limit=False,
        minloglevel=2,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        byte_fallback=False,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(root / "sp.model"))
    vocab = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>"])}
    for i in range(3, len(pieces)):
        vocab.setdefault(pieces.id_to_piece(i), len(vocab))
    (root / "vocab.json").write_text(json.dumps(vocab))
    tokenizers = {
        "nllb": transformers.NllbTokenizer(vocab_file=str(root / "sp.model")),
        "m2m100": transformers.M2M100Tokenizer(
            vocab_file=str(root / "vocab.json"), spm_file=str(root / "sp.model")
        ),
        "alma": transformers.LlamaTokenizer(vocab_file=str(root / "sp.model")),
    }
    tokenizers["bigtranslate"] = tokenizers["alma"]
    for name, tokenizer in tokenizers.items():
        torch.manual_seed(len(name))
        if name in ("nllb", "m2m100"):
            config = transformers.M2M100Config(
                vocab_size=len(tokenizer) + 120,
                **SIZE,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                decoder_start_token_id=tokenizer.eos_token_id,
            )
            model = transformers.M2M100ForConditionalGeneration(config)
            # so that some hypotheses end, at unequal lengths
            model.model.shared.weight.data[tokenizer.eos_token_id] *= 2
        else:
            config = transformers.LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                initializer_range=0.3,
                max_position_embeddings=256,
            )
            model = transformers.LlamaForCausalLM(config)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


ROWS = [
    {"src_lang": s, "tgt_lang": t, "src": TEXT[i], "tgt": "x"}
    for i, (s, t) in enumerate(
        [("de", "zh"), ("en", "de"), ("is", "cs"), ("cs", "is"), ("ru", "en"), ("zh", "ru")]
    )
]


@pytest.mark.parametrize("system", ["nllb", "m2m100"])
def test_encoder_decoders_equal_generate_one_direction_at_a_time(system, folders):
    """Mixed directions in one batch, against transformers' documented call: src_lang and
    forced_bos_token_id."""
    engine = Baseline(system, str(folders / system), device="cpu")
    got = engine.translate(ROWS, 12)
    tokenizer, model = engine.tokenizer, engine.model
    codes = {
        "nllb": {
            "de": "deu_Latn",
            "zh": "zho_Hans",
            "en": "eng_Latn",
            "is": "isl_Latn",
            "cs": "ces_Latn",
            "ru": "rus_Cyrl",
        },
        "m2m100": {c: c for c in LANGUAGES},
    }[system]
    for row, (hyp, finish) in zip(ROWS, got):
        tokenizer.src_lang = codes[row["src_lang"]]
        target = codes[row["tgt_lang"]]
        first = (
            tokenizer.get_lang_id(target)
            if system == "m2m100"
            else tokenizer.convert_tokens_to_ids(target)
        )
        assert first != tokenizer.unk_token_id
        out = model.generate(
            **tokenizer(row["src"], return_tensors="pt"),
            forced_bos_token_id=first,
            num_beams={"nllb": 4, "m2m100": 5}[system],
            max_new_tokens=13,
        )
        assert hyp == tokenizer.decode(out[0, 2:], skip_special_tokens=True).strip()
        assert finish == ("stop" if (out[0, 2:] == tokenizer.eos_token_id).any() else "length")
    assert len({hyp for hyp, _ in got}) > 3 and {finish for _, finish in got} == {
        "stop",
        "length",
    }, got


def test_a_language_that_a_system_lacks_is_its_only_loss(folders, monkeypatch):
    system = baselines.SYSTEMS["m2m100"]
    monkeypatch.setitem(
        baselines.SYSTEMS, "m2m100", system._replace(codes={**system.codes, "is": "xx"})
    )
    engine = Baseline("m2m100", str(folders / "m2m100"), device="cpu")
    assert (
        engine.languages == ["en", "de", "cs", "ru", "zh"]
        and len(engine.translate(ROWS[:2], 4)) == 2
    )
    with pytest.raises(UserError, match="m2m100: has nothing for is; it has en, de, cs, ru, zh"):
        check_languages(engine, {"de", "is"}, "m2m100")
    monkeypatch.setitem(baselines.SYSTEMS, "m2m100", system._replace(token="no {}"))
    why = "its tokenizer has no language's token, such as no en; it is no checkpoint of m2m100"
    with pytest.raises(UserError, match=why):
        Baseline("m2m100", str(folders / "m2m100"), device="cpu")


NAMES = {
    "alma": ["English", "German", "Icelandic", "Czech", "Russian", "Chinese"],
    "bigtranslate": ["英语", "德语", "冰岛语", "捷克语", "俄语", "汉语"],
}
PROMPTS = {
    "alma": "Translate this from {s} to {t}:\n{s}: {text}\n{t}:",
    "bigtranslate": (
        "以下是一个描述任务的指令，请写一个完成该指令的适当回复。\n\n"
        "### 指令:\n请将以下{s}句子翻译成{t}：{text}\n\n### 回复:"
    ),
}


@pytest.mark.parametrize("system", ["alma", "bigtranslate"])
def test_decoder_only_systems_get_their_own_prompt(system, folders):
    engine = Baseline(system, str(folders / system), device="cpu")
    tokenizer, names = engine.tokenizer, dict(zip(LANGUAGES, NAMES[system]))
    # Long enough for BigTranslate's ban on 6-grams that come twice to bite.
    got, bitten = engine.translate(ROWS, 48), False
    settings = {"num_beams": 5, "do_sample": False, "max_new_tokens": 48}
    settings["pad_token_id"] = tokenizer.pad_token_id
    for row, (hyp, finish) in zip(ROWS, got):
        s, t = names[row["src_lang"]], names[row["tgt_lang"]]
        ids = tokenizer(PROMPTS[system].format(s=s, t=t, text=row["src"]), return_tensors="pt")
        outputs = []
        for ban in ({"alma": 0, "bigtranslate": 6}[system], 0):
            out = engine.model.generate(**ids, no_repeat_ngram_size=ban, **settings)
            outputs.append(out[0, ids.input_ids.shape[1] :])
        out, free = outputs
        bitten |= out.tolist() != free.tolist()
        text = tokenizer.decode(out, skip_special_tokens=True).strip()
        assert hyp == text.split("\n")[0].strip()
        ended = tokenizer.eos_token_id in out or "\n" in text
        assert finish == ("stop" if ended else "length")
    assert bitten == (system == "bigtranslate")


def test_commands_score_a_system_and_alma_goes_via_english(folders, tmp_path):
    given, out = tmp_path / "test.jsonl", tmp_path / "out.jsonl"
    write_jsonl(given, ROWS)
    nllb = "--system", "nllb", "--model", folders / "nllb"
    files = "--input", given, "--output", out
    inside(ROOT / "support/baselines.py", *nllb, *files, "--max-new-tokens", 6)
    for row, asked in zip(read_rows(out), ROWS, strict=True):
        assert {key: value for key, value in row.items() if key not in ("hyp", "finish")} == asked
    directions = ",".join(f"{row['src_lang']}-{row['tgt_lang']}" for row in ROWS)
    evaluate = ROOT / "evaluate.py", "--directions", directions, "--max-new-tokens", 6
    inside(*evaluate, "--hypotheses", out, "--out", tmp_path / "scored")
    inside(*evaluate, "--test", given, *nllb, "--out", tmp_path / "direct")
    scored, direct = (read_json(tmp_path / f"{n}/scores.json") for n in ("scored", "direct"))
    assert scored["directions"] == direct["directions"]
    alma = "--system", "alma", "--model", folders / "alma", "--out", tmp_path / "alma"
    inside(*evaluate, "--test", given, *alma)
    engine = Baseline("alma", str(folders / "alma"), device="cpu")
    rows = {row["src"]: row for row in read_rows(tmp_path / "alma/hypotheses.jsonl")}
    for asked in ROWS:
        row = rows[asked["src"]]
        # Source and languages are the test set's, not the second hop's.
        assert {key: row[key] for key in asked} == asked
        if "en" in (asked["src_lang"], asked["tgt_lang"]):
            assert "pivot" not in row
            continue
        english = engine.translate([{**asked, "tgt_lang": "en"}], 6)[0][0]
        second = {"src_lang": "en", "tgt_lang": asked["tgt_lang"], "src": english}
        assert row["pivot"] == english and row["hyp"] == engine.translate([second], 6)[0][0]


def test_pivot_takes_a_system_as_its_translator(folders, tmp_path):
    rows = []
    for i in range(3):
        row = {"src_lang": "de", "tgt_lang": "en", "src": f"Der Hund sieht {i}.", "tgt": "x"}
        rows.append(row)
    write_jsonl(tmp_path / "pivot.source.jsonl", rows)
    # data.py's: fewer than the system knows.
    write_json(tmp_path / "config.json", {"languages": "en,de,zh"})
    nllb = "--system", "nllb", "--model", folders / "nllb"
    where = "--data", tmp_path, "--out", tmp_path / "pseudo"
    inside(ROOT / "pivot.py", *nllb, *where, "--pairs", 2, "--max-new-tokens", 6)
    report = read_json(tmp_path / "pseudo/report.json")
    assert report["de-zh"]["generated"] == 3 and set(report) == {"de-zh", "zh-de"}
    assert read_json(tmp_path / "pseudo/config.json")["system"] == "nllb"


def test_our_own_engine_via_english(adapter_folder, plain_engine, tmp_path):
    """Two hops are two translations; what is cut off in the first hop says so."""
    write_jsonl(tmp_path / "test.jsonl", [ROWS[0], ROWS[1], {**ROWS[0], "tgt_lang": "is"}])
    where = "--test", tmp_path / "test.jsonl", "--out", tmp_path / "out"
    ours = "--adapter", adapter_folder, "--via-english", "--max-new-tokens", 5
    script = ROOT / "evaluate.py", "--directions", "de-zh,en-de,de-is"
    run(*TORCHRUN, *script, *where, *ours)
    first, _ = translate_batch(plain_engine, [{**ROWS[0], "tgt_lang": "en"}], 5)[0]
    for row in read_rows(tmp_path / "out/hypotheses.jsonl"):
        hops = row["src_lang"] == "de"
        source = {**row, "src_lang": "en", "src": first} if hops else row
        assert row["hyp"] == translate_batch(plain_engine, [source], 5)[0][0]
        assert row.get("pivot") == (first if hops else None)
        assert row["finish"] == "length"


class Scripted:
    """An engine that says what it was asked, and nothing for what has "nothing" in it; `asked`
    counts its sentences."""

    identity, place, asked = {"backbone": "scripted"}, "nowhere", 0

    def translate_each(self, rows, max_new_tokens, batch_size):
        for i, row in enumerate(rows):
            self.asked += 1
            hyp = f"{row['tgt_lang']}({row['src']})"[:max_new_tokens]
            yield i, "" if "nothing" in row["src"] else hyp, "stop"


def test_two_hops_are_asked_for_once_and_never_mistaken_for_another_jobs(tmp_path):
    out, engine = tmp_path / "out.jsonl", Scripted()

    def call(rows, most=99):
        return translate_via_english(engine, rows, out, 8, most, Ranks(0, 1), "")

    rows = []
    for text in ("eins", "nothing"):
        rows += [{"src_lang": "de", "tgt_lang": t, "src": text} for t in ("zh", "is", "en")]
    done = call(rows)
    assert [row["hyp"] for row in done] == ["zh(en(eins))", "is(en(eins))", "en(eins)", "", "", ""]
    assert [row.get("pivot") for row in done] == ["en(eins)", "en(eins)", None, "", "", None]
    # X -> en once for both targets; what has no English is not asked for.
    assert engine.asked == 2 + 2 + 2
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]
    assert call(rows) == done and engine.asked == 6
    for hop in ("to-english", "from-english"):  # what a run killed between its hops leaves behind
        left = out.with_name(f"out.jsonl.{hop}-{job_of(engine, rows, 99)}")
        write_jsonl(left, [{**rows[0], "tgt_lang": "en", "hyp": "old", "finish": "stop"}])
    out.unlink()
    assert [row["hyp"] for row in call(rows, 5)] == ["zh(en", "is(en", "en(ei", "", "", ""]
    out.unlink()
    (row,) = call([{"src_lang": "cs", "tgt_lang": "en", "src": "dva"}])
    assert row["hyp"] == "en(dva)"


def test_bad_input(folders, adapter_folder, tmp_path):
    given = tmp_path / "test.jsonl"
    write_jsonl(given, ROWS)
    files = "--input", given, "--output", tmp_path / "o.jsonl"
    base = ROOT / "support/baselines.py", *files, "--system"
    refuses(*base, "nllb", "--model", tmp_path / "nowhere", says="the hub did not give it")
    (tmp_path / "empty").mkdir()
    says = ["can't be loaded as nllb", "--model"]
    refuses(*base, "nllb", "--model", tmp_path / "empty", says=says)
    says = ["such as __en__", "no checkpoint of m2m100"]
    refuses(*base, "m2m100", "--model", folders / "nllb", says=says)
    refuses(*base, "nllb", "--model", folders / "m2m100", says="no checkpoint of nllb")
    evaluate = ROOT / "evaluate.py", "--directions", "de-zh", "--test", given
    system = "--system", "nllb", "--adapter", adapter_folder, "--out", tmp_path / "x"
    refuses(*evaluate, *system, says="--adapter has no part in it")
    assert set(baselines.SYSTEMS) == {"nllb", "m2m100", "bigtranslate", "alma"}
