"""A toy world of six languages: a grammar over real words, written out in the published corpus
layouts.

    python examples/tiny/world.py --out runs/tiny/world

One sentence is a choice of (time, subject, verb, object, place) and has exactly one form in each
language, with the article, case, gender and word order that the language asks for: German and
Icelandic put the verb second, Chinese puts the place before the verb, Czech and Russian mark the
object by animacy. "The good farmer sees the red boat in the garden." There are some 19 million of
them; train, dev and test sentences never overlap.
"""

import random
import sys
from pathlib import Path

# the project's scripts lie flat at its root
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import LANGUAGES
from support.runs import ArgumentParser, at_least, check_claim, claim, run_main, write_atomic

# One noun a line. German, Icelandic, Czech, Russian: gender, nominative, accusative (Icelandic with
# its suffixed article); Czech and Russian masculines are "a" (animate) or "i" (inanimate). Chinese:
# measure word, noun.
ANIMATE = """
man     | m Mann Mann       | m maðurinn manninn   | a muž muže         | a мужчина мужчину   | 个 男人
woman   | f Frau Frau       | f konan konuna       | f žena ženu        | f женщина женщину   | 个 女人
child   | n Kind Kind       | n barnið barnið      | n dítě dítě        | a ребёнок ребёнка   | 个 孩子
dog     | m Hund Hund       | m hundurinn hundinn  | a pes psa          | f собака собаку     | 只 狗
cat     | f Katze Katze     | m kötturinn köttinn  | f kočka kočku      | f кошка кошку       | 只 猫
horse   | n Pferd Pferd     | m hesturinn hestinn  | a kůň koně         | f лошадь лошадь     | 匹 马
teacher | m Lehrer Lehrer   | m kennarinn kennarann | a učitel učitele  | a учитель учителя   | 位 老师
doctor  | m Arzt Arzt       | m læknirinn lækninn  | a lékař lékaře     | a врач врача        | 位 医生
girl    | n Mädchen Mädchen | f stúlkan stúlkuna   | f dívka dívku      | f девочка девочку   | 个 女孩
boy     | m Junge Jungen    | m strákurinn strákinn | a chlapec chlapce | a мальчик мальчика  | 个 男孩
bird    | m Vogel Vogel     | m fuglinn fuglinn    | a pták ptáka       | f птица птицу       | 只 鸟
farmer  | m Bauer Bauern    | m bóndinn bóndann    | a sedlák sedláka   | a фермер фермера    | 位 农民
king    | m König König     | m kóngurinn kónginn  | a král krále       | a король короля     | 位 国王
"""
THINGS = """
book    | n Buch Buch       | f bókin bókina       | f kniha knihu      | f книга книгу       | 本 书
house   | n Haus Haus       | n húsið húsið        | i dům dům          | i дом дом           | 座 房子
car     | n Auto Auto       | m bíllinn bílinn     | n auto auto        | f машина машину     | 辆 汽车
letter  | m Brief Brief     | n bréfið bréfið      | i dopis dopis      | n письмо письмо     | 封 信
apple   | m Apfel Apfel     | n eplið eplið        | n jablko jablko    | n яблоко яблоко     | 个 苹果
bread   | n Brot Brot       | n brauðið brauðið    | i chléb chléb      | i хлеб хлеб         | 块 面包
picture | n Bild Bild       | f myndin myndina     | i obraz obraz      | f картина картину   | 幅 画
flower  | f Blume Blume     | n blómið blómið      | f květina květinu  | i цветок цветок     | 朵 花
chair   | m Stuhl Stuhl     | m stóllinn stólinn   | f židle židli      | i стул стул         | 把 椅子
boat    | n Boot Boot       | m báturinn bátinn    | f loď loď          | f лодка лодку       | 条 船
key     | m Schlüssel Schlüssel | m lykillinn lykilinn | i klíč klíč    | i ключ ключ         | 把 钥匙
window  | n Fenster Fenster | m glugginn gluggann  | n okno okno        | n окно окно         | 扇 窗户
table   | m Tisch Tisch     | n borðið borðið      | i stůl stůl        | i стол стол         | 张 桌子
"""
# Adjectives after a definite article. Icelandic weak forms: masculine nominative, masculine oblique
# (= feminine nominative and neuter), feminine oblique. Czech: stem. Russian: m, f, n nominative,
# animate and feminine accusative.
ADJECTIVES = """
small     | klein | litli litla litlu         | mal  | маленький маленькая маленькое маленького маленькую | 小
big       | groß  | stóri stóra stóru         | velk | большой большая большое большого большую           | 大
good      | gut   | góði góða góðu            | dobr | хороший хорошая хорошее хорошего хорошую           | 好
new       | neu   | nýi nýja nýju             | nov  | новый новая новое нового новую                     | 新
beautiful | schön | fallegi fallega fallegu   | krásn | красивый красивая красивое красивого красивую     | 美丽的
white     | weiß  | hvíti hvíta hvítu         | bíl  | белый белая белое белого белую                     | 白色的
black     | schwarz | svarti svarta svörtu    | čern | чёрный чёрная чёрное чёрного чёрную                | 黑色的
red       | rot   | rauði rauða rauðu         | červen | красный красная красное красного красную         | 红色的
green     | grün  | græni græna grænu         | zelen | зелёный зелёная зелёное зелёного зелёную          | 绿色的
"""
# Third person singular present; every one takes the accusative in all four case languages.
VERBS = """
sees     | sieht      | sér     | vidí       | видит       | 看见
finds    | findet     | finnur  | nachází    | находит     | 找到
buys     | kauft      | kaupir  | kupuje     | покупает    | 买
sells    | verkauft   | selur   | prodává    | продаёт     | 卖
paints   | malt       | málar   | maluje     | рисует      | 画
loves    | liebt      | elskar  | miluje     | любит       | 爱
hears    | hört       | heyrir  | slyší      | слышит      | 听见
washes   | wäscht     | þvær    | myje       | моет        | 洗
takes    | nimmt      | tekur   | bere       | берёт       | 拿走
chooses  | wählt      | velur   | vybírá     | выбирает    | 选择
measures | misst      | mælir   | měří       | измеряет    | 测量
examines | untersucht | skoðar  | zkoumá     | исследует   | 检查
"""
PLACES = """
in the garden  | im Garten     | í garðinum  | v zahradě | в саду     | 在花园里
in the city    | in der Stadt  | í borginni  | ve městě  | в городе   | 在城市里
in the forest  | im Wald       | í skóginum  | v lese    | в лесу     | 在森林里
at the market  | auf dem Markt | á markaðnum | na trhu   | на рынке   | 在市场上
by the river   | am Fluss      | við ána     | u řeky    | у реки     | 在河边
in the kitchen | in der Küche  | í eldhúsinu | v kuchyni | на кухне   | 在厨房里
"""
TIMES = """
today         | heute        | í dag           | dnes        | сегодня        | 今天
now           | jetzt        | núna            | teď         | сейчас         | 现在
every day     | jeden Tag    | á hverjum degi  | každý den   | каждый день    | 每天
every morning | jeden Morgen | á hverjum morgni | každé ráno | каждое утро    | 每天早上
in winter     | im Winter    | á veturna       | v zimě      | зимой          | 冬天
in summer     | im Sommer    | á sumrin        | v létě      | летом          | 夏天
"""


def table(text):
    return [[cell.strip() for cell in line.split("|")] for line in text.strip().splitlines()]


WORDS = {
    "animate": table(ANIMATE),
    "noun": table(ANIMATE + THINGS.lstrip()),
    "adjective": table(ADJECTIVES),
    "verb": table(VERBS),
    "place": table(PLACES),
    "time": table(TIMES),
}


def english(noun, adjective, case):
    return " ".join(["the", *([adjective] if adjective else []), noun])


def german(noun, adjective, case):
    gender, nominative, accusative = noun.split()
    article = {"m": ("der", "den"), "f": ("die", "die"), "n": ("das", "das")}[gender][case]
    ending = "en" if gender == "m" and case == 1 else "e"  # weak declension
    return " ".join(
        [article, *([adjective + ending] if adjective else []), (nominative, accusative)[case]]
    )


def icelandic(noun, adjective, case):
    gender, nominative, accusative = noun.split()
    form = {"m": (0, 1), "f": (1, 2), "n": (1, 1)}[gender][case]
    return " ".join(
        [*([adjective.split()[form]] if adjective else []), (nominative, accusative)[case]]
    )


def czech(noun, adjective, case):
    gender, nominative, accusative = noun.split()
    ending = {"a": ("ý", "ého"), "i": ("ý", "ý"), "f": ("á", "ou"), "n": ("é", "é")}[gender][case]
    return " ".join([*([adjective + ending] if adjective else []), (nominative, accusative)[case]])


def russian(noun, adjective, case):
    gender, nominative, accusative = noun.split()
    form = {"a": (0, 3), "i": (0, 0), "f": (1, 4), "n": (2, 2)}[gender][case]
    return " ".join(
        [*([adjective.split()[form]] if adjective else []), (nominative, accusative)[case]]
    )


def chinese(noun, adjective, case):
    measure, word = noun.split()
    return f"那{measure}{adjective or ''}{word}"


PHRASE = {"en": english, "de": german, "is": icelandic, "cs": czech, "ru": russian, "zh": chinese}


def parts(meaning, lang):
    """The phrases of a meaning in a language: [time, subject, verb, object, place], None where
    absent."""
    column = list(PHRASE).index(lang)
    kinds = ("time", "animate", "adjective", "verb", "noun", "adjective", "place")
    time, subject, subject_adj, verb, obj, obj_adj, place = (
        None if index is None else WORDS[kind][index][column] for kind, index in zip(kinds, meaning)
    )
    return [time, PHRASE[lang](subject, subject_adj, 0), verb, PHRASE[lang](obj, obj_adj, 1), place]


def sentence(meaning, lang):
    """The one form of a meaning (time, subject, adjective, verb, object, adjective, place) in a
    language. Each part is an index into its table or None where the part is absent."""
    time, subject, verb, obj, place = parts(meaning, lang)
    if lang == "zh":
        order = [time, subject, place, verb, obj]
    elif time and lang in ("de", "is"):
        order = [time, verb, subject, obj, place]  # verb second
    else:
        order = [time, subject, verb, obj, place]
    text = ("" if lang == "zh" else " ").join(part for part in order if part)
    return text[0].upper() + text[1:] + ("。" if lang == "zh" else ".")


def pick(rng, kind, absent=0.0):
    """A random word of a kind, as an index; None with probability `absent`."""
    return None if rng.random() < absent else rng.randrange(len(WORDS[kind]))


def meanings(rng):
    """Endless random meanings without repetition."""
    seen = set()
    while True:
        meaning = (
            pick(rng, "time", 0.5),
            pick(rng, "animate"),
            pick(rng, "adjective", 0.5),
            pick(rng, "verb"),
            pick(rng, "noun"),
            pick(rng, "adjective", 0.5),
            pick(rng, "place", 0.5),
        )
        if meaning not in seen and meaning[1] != meaning[4]:  # nobody sees themselves
            seen.add(meaning)
            yield meaning


def main():
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--out", required=True, help="folder for opus-100-corpus/ and flores200_dataset/"
    )
    parser.add_argument(
        "--train", type=int, default=4000, help="OPUS-100 train pairs per language with English"
    )
    parser.add_argument(
        "--dev", type=int, default=100, help="OPUS-100 dev pairs, and FLORES-200 dev lines"
    )
    parser.add_argument(
        "--test", type=int, default=200, help="OPUS-100 test pairs, and FLORES-200 devtest lines"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    at_least(1, args, "train", "dev", "test")
    out, config = Path(args.out), {k: v for k, v in vars(args).items() if k != "out"}
    check_claim(out, config)
    if (out / "done").exists():
        print(f"{out}: made already")
        return
    lock = claim(out, config)
    stream = meanings(random.Random(args.seed))
    for lang in list(PHRASE)[1:]:
        pair = "-".join(sorted(("en", lang)))
        folder = out / "opus-100-corpus/v1.0/supervised" / pair
        folder.mkdir(parents=True, exist_ok=True)
        for split, count in (("train", args.train), ("dev", args.dev), ("test", args.test)):
            drawn = [next(stream) for _ in range(count)]
            for code in ("en", lang):
                write_atomic(
                    folder / f"opus.{pair}-{split}.{code}",
                    "".join(sentence(m, code) + "\n" for m in drawn),
                )
    for split, count in (("dev", args.dev), ("devtest", args.test)):
        folder = out / "flores200_dataset" / split
        folder.mkdir(parents=True, exist_ok=True)
        drawn = [next(stream) for _ in range(count)]
        for code in PHRASE:
            write_atomic(
                folder / f"{LANGUAGES[code].flores}.{split}",
                "".join(sentence(m, code) + "\n" for m in drawn),
            )
    write_atomic(out / "done", "")
    lock.close()
    for code in PHRASE:
        print(f"{code}: {sentence(drawn[0], code)}")
    print(f"{out}: {args.train} train pairs for each of {len(PHRASE) - 1} languages with English")


if __name__ == "__main__":
    run_main(main)
