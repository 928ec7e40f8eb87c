"""A model's own chat template, rendered by jinja2 as transformers renders it."""

import datetime
import json
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox

from model import Config, token_ids
from support.runs import UserError, file_errors, read_json, read_text, reason

PLACEHOLDER = "PLACEHOLDER-OF-THE-TEXT"  # plain letters, which no template alters
# Templates that name today's date (Llama-3.1's and later) get this one, which Llama's own fall back
# to: with another date every day neither training nor decoding could be repeated.
DATE = datetime.date(2024, 7, 26)
DATE_STRING = DATE.strftime("%d %b %Y")
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for those who mask losses by it: no effect."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def to_json(value: Any, **options) -> str:
    """transformers' own, which doesn't escape HTML as jinja2's does."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationTag, jinja2.ext.loopcontrols],
    )
    env.filters["tojson"] = to_json
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = DATE.strftime
    return env


def read_template(folder: str | Path) -> tuple[str | None, dict, Path]:
    """(template or None, special tokens by name, path of the template) of a checkpoint folder."""
    path, file = Path(folder) / "tokenizer_config.json", Path(folder) / "chat_template.jinja"
    config = read_json(path) if path.exists() else {}
    with file_errors(path, "is it a tokenizer's?"):
        template = config.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        special = {}
        for name in SPECIAL_TOKENS:
            token = config.get(name)
            if token is not None:
                special[name] = token["content"] if isinstance(token, dict) else token
    if file.exists():  # where newer checkpoints keep it
        template, path = read_text(file), file
    return template, special, path


def render_turn(folder: str | Path) -> tuple[str, str, str] | None:
    """How the checkpoint's own template renders one user turn, around the user's text, and the
    text that follows the assistant's answer: (before, after, behind the answer). None where the
    folder has no template. Raises UserError that names the file."""
    template, special, path = read_template(folder)
    if template is None:
        return None
    user = {"role": "user", "content": PLACEHOLDER}
    answer = {"role": "assistant", "content": PLACEHOLDER}
    variables = {"tools": None, "documents": None, "date_string": DATE_STRING, **special}
    try:
        render = environment().from_string(template).render
        prompt = render(messages=[user], add_generation_prompt=True, **variables)
        dialogue = render(messages=[user, answer], add_generation_prompt=False, **variables)
    except Exception as error:  # of jinja2, or of whatever the template calls
        raise UserError(
            f"{path}: its chat template can't be rendered ({reason(error)}); "
            "--prompt-format plain does without"
        ) from None
    parts = prompt.split(PLACEHOLDER)
    if len(parts) != 2 or dialogue.count(PLACEHOLDER) != 2:
        raise UserError(
            f"{path}: its chat template does not give the user's and the assistant's text once "
            "each; --prompt-format plain does without"
        )
    return *parts, dialogue.split(PLACEHOLDER)[2]


def end_ids(folder: str | Path, cfg: Config) -> list[int]:
    """What ends an output by the checkpoint's generation_config.json, else by its config.json."""
    path = Path(folder) / "generation_config.json"
    ends = token_ids(read_json(path).get("eos_token_id")) if path.exists() else ()
    return list(ends or cfg.eos_token_ids)
