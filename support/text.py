"""The one rule of text: what is empty, and which texts are equal. Files keep text as it was."""

import re
import sys
import unicodedata

from support.runs import UserError

# Without width or ink: control characters but for white space, soft hyphen, zero-width and
# direction marks, word joiner, byte-order mark.
INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f"
    "\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]"
)


def comparable(text: str) -> str:
    """`text` as it is compared: in NFC, without what can't be seen, white space collapsed. Texts
    are equal where these are; one is empty where this is "". Models get the text as it was."""
    if not (text.isascii() and text.isprintable()):
        text = unicodedata.normalize("NFC", INVISIBLE.sub("", text))
    return " ".join(text.split())


def is_empty(text: str) -> bool:
    """Whether a reader would see nothing."""
    return not comparable(text)


# Three characters or more, a letter among the first, three times in a row.
REPEATED = re.compile(r"(?=\S{0,2}[^\W\d])(\S.{2,40}?)(?:\s*\1){2}")


def is_repetitive(text: str) -> bool:
    """Whether a text goes round in circles, as small models' outputs do."""
    return REPEATED.search(text) is not None


def input_lines(text: str | None) -> list[str]:
    """The text, or lines of stdin. Raises UserError for what isn't UTF-8."""
    try:
        if text is not None:
            text.encode()
            return [text]
        if sys.stdin is None:
            raise UserError("standard input is closed; give a text, or --input and --output")
        lines = sys.stdin.buffer.read().decode("utf-8-sig").split("\n")
    except UnicodeError:
        raise UserError("the text is not UTF-8") from None
    return lines[:-1] if not lines[-1] else lines  # behind the last line's end is no other
