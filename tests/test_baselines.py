"""Prior systems on small random checkpoints of their own architectures, made by transformers, with tiny tokenizers."""

import json

import pytest
import torch

import baselines
from baselines import Baseline, translate_via_english
from conftest import ROOT, TORCHRUN, inside, read_rows, refuses, run, translate_batch
from data import LANGUAGES
from devices import Ranks
from files import UserError, write_jsonl
from generate import check_languages, job_of, load_engine

sentencepiece = pytest.importorskip("sentencepiece")
import transformers  # noqa: E402

TEXT = ["Der Hund sieht den Tisch.", "The dog sees the table.", "Hundurinn sér borðið.", "Pes vidí stůl.", "Собака видит стол.", "那只狗看见桌子。"]
SIZE = dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64,
            decoder_ffn_dim=64, max_position_embeddings=128, init_std=1.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder a system, as its authors publish them: M2M100 twice (with NLLB's tokenizer and its own), Llama twice."""
    root = tmp_path_factory.mktemp("systems")
    (root / "text").write_text("\n".join(TEXT * 30), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(input=str(root / "text"), model_prefix=str(root / "sp"), vocab_size=150,
                                             hard_vocab_limit=False, minloglevel=2, unk_id=0, bos_id=1, eos_id=2, byte_fallback=False)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(root / "sp.model"))
    vocab = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>"])}
    for i in range(3, len(pieces)):
        vocab.setdefault(pieces.id_to_piece(i), len(vocab))
    (root / "vocab.json").write_text(json.dumps(vocab))
    tokenizers = {
        "nllb": transformers.NllbTokenizer(vocab_file=str(root / "sp.model")),
        "m2m100": transformers.M2M100Tokenizer(vocab_file=str(root / "vocab.json"), spm_file=str(root / "sp.model")),
        "alma": transformers.LlamaTokenizer(vocab_file=str(root / "sp.model")),
    }
    tokenizers["bigtranslate"] = tokenizers["alma"]
    for name, tokenizer in tokenizers.items():
        torch.manual_seed(len(name))
        if name in ("nllb", "m2m100"):
            config = transformers.M2M100Config(vocab_size=len(tokenizer) + 120, **SIZE, pad_token_id=tokenizer.pad_token_id,
                                               bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                                               decoder_start_token_id=tokenizer.eos_token_id)
            model = transformers.M2M100ForConditionalGeneration(config)
            model.model.shared.weight.data[tokenizer.eos_token_id] *= 2  # so that some hypotheses end, at unequal lengths
        else:
            config = transformers.LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                              num_attention_heads=2, initializer_range=0.3, max_position_embeddings=256)
            model = transformers.LlamaForCausalLM(config)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


ROWS = [{"src_lang": s, "tgt_lang": t, "src": TEXT[i], "tgt": "x"}
        for i, (s, t) in enumerate([("de", "zh"), ("en", "de"), ("is", "cs"), ("cs", "is"), ("ru", "en"), ("zh", "ru")])]


@pytest.mark.parametrize("system", ["nllb", "m2m100"])
def test_encoder_decoders_equal_generate_one_direction_at_a_time(system, folders):
    """Mixed directions in one batch, against transformers' documented call: src_lang and forced_bos_token_id."""
    engine = Baseline(system, str(folders / system), device="cpu")
    got = engine.translate(ROWS, 12)
    tokenizer, model = engine.tokenizer, engine.model
    codes = {"nllb": {"de": "deu_Latn", "zh": "zho_Hans", "en": "eng_Latn", "is": "isl_Latn", "cs": "ces_Latn", "ru": "rus_Cyrl"},
             "m2m100": {c: c for c in LANGUAGES}}[system]
    for row, (hyp, finish) in zip(ROWS, got):
        tokenizer.src_lang = codes[row["src_lang"]]
        target = codes[row["tgt_lang"]]
        first = tokenizer.get_lang_id(target) if system == "m2m100" else tokenizer.convert_tokens_to_ids(target)
        assert first != tokenizer.unk_token_id
        out = model.generate(**tokenizer(row["src"], return_tensors="pt"), forced_bos_token_id=first,
                             num_beams={"nllb": 4, "m2m100": 5}[system], max_new_tokens=13)
        assert hyp == tokenizer.decode(out[0, 2:], skip_special_tokens=True).strip()
        assert finish == ("stop" if (out[0, 2:] == tokenizer.eos_token_id).any() else "length")
    assert len({hyp for hyp, _ in got}) > 3 and {finish for _, finish in got} == {"stop", "length"}, got


def test_a_language_that_a_system_lacks_is_its_only_loss(folders, monkeypatch):
    system = baselines.SYSTEMS["m2m100"]
    monkeypatch.setitem(baselines.SYSTEMS, "m2m100", system._replace(codes={**system.codes, "is": "xx"}))
    engine = Baseline("m2m100", str(folders / "m2m100"), device="cpu")
    assert engine.languages == ["en", "de", "cs", "ru", "zh"] and len(engine.translate(ROWS[:2], 4)) == 2
    with pytest.raises(UserError, match="m2m100: has nothing for is; it has en, de, cs, ru, zh"):
        check_languages(engine, {"de", "is"}, "m2m100")
    monkeypatch.setitem(baselines.SYSTEMS, "m2m100", system._replace(token="no {}"))
    with pytest.raises(UserError, match="its tokenizer has no language's token, such as no en; it is no checkpoint of m2m100"):
        Baseline("m2m100", str(folders / "m2m100"), device="cpu")


@pytest.mark.parametrize("system", ["alma", "bigtranslate"])
def test_decoder_only_systems_get_their_own_prompt(system, folders):
    engine = Baseline(system, str(folders / system), device="cpu")
    got, bitten = engine.translate(ROWS, 48), False  # long enough for BigTranslate's ban on 6-grams that come twice to bite
    for row, (hyp, finish) in zip(ROWS, got):
        s, t = row["src_lang"], row["tgt_lang"]
        if system == "alma":
            name = {"en": "English", "de": "German", "is": "Icelandic", "cs": "Czech", "ru": "Russian", "zh": "Chinese"}
            prompt = f"Translate this from {name[s]} to {name[t]}:\n{name[s]}: {row['src']}\n{name[t]}:"
        else:
            names = {"en": "英语", "de": "德语", "is": "冰岛语", "cs": "捷克语", "ru": "俄语", "zh": "汉语"}
            prompt = f"以下是一个描述任务的指令，请写一个完成该指令的适当回复。\n\n### 指令:\n请将以下{names[s]}句子翻译成{names[t]}：{row['src']}\n\n### 回复:"
        ids = engine.tokenizer(prompt, return_tensors="pt")
        out, free = (engine.model.generate(**ids, num_beams=5, do_sample=False, max_new_tokens=48, no_repeat_ngram_size=n,
                                           pad_token_id=engine.tokenizer.pad_token_id)[0, ids.input_ids.shape[1]:]
                     for n in ({"alma": 0, "bigtranslate": 6}[system], 0))
        bitten |= out.tolist() != free.tolist()
        text = engine.tokenizer.decode(out, skip_special_tokens=True).strip()
        assert hyp == text.split("\n")[0].strip()
        assert finish == ("stop" if engine.tokenizer.eos_token_id in out or "\n" in text else "length")
    assert bitten == (system == "bigtranslate")


def test_commands_score_a_system_and_alma_goes_via_english(folders, tmp_path):
    write_jsonl(tmp_path / "test.jsonl", ROWS)
    inside(ROOT / "baselines.py", "--system", "nllb", "--model", folders / "nllb", "--input", tmp_path / "test.jsonl",
           "--output", tmp_path / "out.jsonl", "--max-new-tokens", 6)
    assert [{k: v for k, v in row.items() if k not in ("hyp", "finish")} for row in read_rows(tmp_path / "out.jsonl")] == ROWS
    directions = ",".join(f"{r['src_lang']}-{r['tgt_lang']}" for r in ROWS)
    evaluate = (ROOT / "evaluate.py", "--directions", directions, "--max-new-tokens", 6)
    inside(*evaluate, "--hypotheses", tmp_path / "out.jsonl", "--out", tmp_path / "scored")
    inside(*evaluate, "--test", tmp_path / "test.jsonl", "--system", "nllb", "--model", folders / "nllb", "--out", tmp_path / "direct")
    directions_of = lambda name: json.loads((tmp_path / name / "scores.json").read_text())["directions"]
    assert directions_of("scored") == directions_of("direct")
    inside(*evaluate, "--test", tmp_path / "test.jsonl", "--system", "alma", "--model", folders / "alma", "--out", tmp_path / "alma")
    rows = read_rows(tmp_path / "alma/hypotheses.jsonl")
    engine = Baseline("alma", str(folders / "alma"), device="cpu")
    for row, asked in zip(sorted(rows, key=lambda r: r["src"]), sorted(ROWS, key=lambda r: r["src"])):
        assert {k: row[k] for k in asked} == asked  # source and languages are the test set's, not the second hop's
        if "en" in (asked["src_lang"], asked["tgt_lang"]):
            assert "pivot" not in row
        else:
            english = engine.translate([{**asked, "tgt_lang": "en"}], 6)[0][0]
            assert row["pivot"] == english
            assert row["hyp"] == engine.translate([{"src_lang": "en", "tgt_lang": asked["tgt_lang"], "src": english}], 6)[0][0]


def test_pivot_takes_a_system_as_its_translator(folders, tmp_path):
    rows = [{"src_lang": "de", "tgt_lang": "en", "src": f"Der Hund sieht {i}.", "tgt": "x"} for i in range(3)]
    write_jsonl(tmp_path / "pivot.source.jsonl", rows)
    (tmp_path / "config.json").write_text(json.dumps({"languages": "en,de,zh"}))  # data.py's: fewer than the system knows
    inside(ROOT / "pivot.py", "--system", "nllb", "--model", folders / "nllb", "--data", tmp_path, "--out", tmp_path / "pseudo",
           "--pairs", 2, "--max-new-tokens", 6)
    report = json.loads((tmp_path / "pseudo/report.json").read_text())
    assert report["de-zh"]["generated"] == 3 and set(report) == {"de-zh", "zh-de"}
    assert json.loads((tmp_path / "pseudo/config.json").read_text())["system"] == "nllb"


def test_our_own_engine_via_english(adapter_folder, tmp_path):
    """Two hops are two translations; what is cut off in the first hop says so."""
    write_jsonl(tmp_path / "test.jsonl", [ROWS[0], ROWS[1], {**ROWS[0], "tgt_lang": "is"}])
    run(*TORCHRUN, ROOT / "evaluate.py", "--directions", "de-zh,en-de,de-is", "--test", tmp_path / "test.jsonl", "--adapter", adapter_folder,
           "--via-english", "--out", tmp_path / "out", "--max-new-tokens", 5)
    engine = load_engine(None, adapter_folder, device="cpu")
    first, _ = translate_batch(engine, [{**ROWS[0], "tgt_lang": "en"}], 5)[0]
    for row in read_rows(tmp_path / "out/hypotheses.jsonl"):
        hops = row["src_lang"] == "de"
        source = {**row, "src_lang": "en", "src": first} if hops else row
        assert row["hyp"] == translate_batch(engine, [source], 5)[0][0] and row.get("pivot") == (first if hops else None)
        assert row["finish"] == "length"


class Scripted:
    """An engine that says what it was asked, and nothing for what has "nothing" in it; `asked` counts its sentences."""

    identity, asked = {"backbone": "scripted"}, 0

    def translate_each(self, rows, max_new_tokens, batch_size):
        for i, row in enumerate(rows):
            self.asked += 1
            yield i, "" if "nothing" in row["src"] else f"{row['tgt_lang']}({row['src']})"[:max_new_tokens], "stop"


def test_two_hops_are_asked_for_once_and_never_mistaken_for_another_jobs(tmp_path):
    out, engine = tmp_path / "out.jsonl", Scripted()
    call = lambda rows, most=99: translate_via_english(engine, rows, out, 8, most, Ranks(0, 1), "")
    rows = [{"src_lang": "de", "tgt_lang": t, "src": text} for text in ("eins", "nothing") for t in ("zh", "is", "en")]
    done = call(rows)
    assert [row["hyp"] for row in done] == ["zh(en(eins))", "is(en(eins))", "en(eins)", "", "", ""]
    assert [row.get("pivot") for row in done] == ["en(eins)", "en(eins)", None, "", "", None]
    assert engine.asked == 2 + 2 + 2  # X -> en once for both targets; what has no English is not asked for
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"] and call(rows) == done and engine.asked == 6
    for hop in ("to-english", "from-english"):  # what a run killed between its hops leaves behind
        left = out.with_name(f"out.jsonl.{hop}-{job_of(engine, rows, 99)}")
        write_jsonl(left, [{**row, "tgt_lang": "en", "hyp": "old", "finish": "stop"} for row in rows[:1]])
    out.unlink()
    assert [row["hyp"] for row in call(rows, 5)] == ["zh(en", "is(en", "en(ei", "", "", ""]
    out.unlink()
    assert [row["hyp"] for row in call([{"src_lang": "cs", "tgt_lang": "en", "src": "dva"}])] == ["en(dva)"]


def test_bad_input(folders, checkpoint, adapter_folder, tmp_path):
    write_jsonl(tmp_path / "test.jsonl", ROWS)
    base = (ROOT / "baselines.py", "--input", tmp_path / "test.jsonl", "--output", tmp_path / "o.jsonl", "--system")
    refuses(*base, "nllb", "--model", tmp_path / "nowhere", says="the hub did not give it")
    (tmp_path / "empty").mkdir()
    refuses(*base, "nllb", "--model", tmp_path / "empty", says=["can't be loaded as nllb", "--model"])
    refuses(*base, "m2m100", "--model", folders / "nllb", says=["such as __en__", "no checkpoint of m2m100"])
    refuses(*base, "nllb", "--model", folders / "m2m100", says="no checkpoint of nllb")
    refuses(ROOT / "evaluate.py", "--directions", "de-zh", "--system", "nllb", "--adapter", adapter_folder,
            "--test", tmp_path / "test.jsonl", "--out", tmp_path / "x", says="--adapter has no part in it")
    assert set(baselines.SYSTEMS) == {"nllb", "m2m100", "bigtranslate", "alma"}
