"""Tokenizers of models, with their chat template and what a run fixes for it."""

import datetime
import pathlib
from collections.abc import Mapping
from typing import Any

from fedsafe_jax.data import chat_template, named_templates
from fedsafe_jax.data.chat_template import ChatTemplateError
from fedsafe_jax.models import hub
from fedsafe_jax.models.tokenizer_loading import read_tokenizer

PROBE = (("user", "Hi"),)


def load_tokenizer(
    folder: pathlib.Path,
    template: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    date: datetime.date | str | None = None,
) -> Any:
    """Loads the tokenizer of a model folder, ready to render dialogues.

    Args:
      folder: the model's folder.
      template: replaces the folder's chat template: a name of `named_templates.NAMED`, a file, or
        Jinja text.
      arguments: what the chat template is given beside the messages.
      date: day that the chat template writes, such as "2026-11-26"; today by default.

    Raises:
      ModelError: there is no tokenizer, or no chat template that renders a dialogue.
    """
    tokenizer = read_tokenizer(folder)
    if not getattr(tokenizer, "is_fast", False):
        raise hub.ModelError(
            f"{folder}: the tokenizer cannot say where its tokens stand in a text, which tells the "
            "answer from its prompt; the folder needs a tokenizer.json."
        )
    try:
        if template:
            tokenizer.chat_template = named_templates.resolve(template)
        if tokenizer.chat_template is None:
            raise ChatTemplateError(
                "the tokenizer has no chat template, as is usual for a base model; name one with "
                f"chat_template: {', '.join(named_templates.NAMED)}, a file, or Jinja text."
            )
        chat_template.attach(
            tokenizer,
            arguments,
            date=_day(date),
            stop_ids=_end_tokens(folder),
            model=str(folder),
        )
        chat_template.of(tokenizer).write(PROBE, generation_prompt=True)
    except ChatTemplateError as error:
        raise hub.ModelError(f"{folder}: {error}") from error
    return tokenizer


def _day(date: datetime.date | str | None) -> datetime.date:
    """Returns the day that a date names; today without one.

    Raises:
      ChatTemplateError: it names none.
    """
    if not isinstance(date, str):
        return date or datetime.date.today()
    try:
        return datetime.date.fromisoformat(date) if date else datetime.date.today()
    except ValueError:
        raise ChatTemplateError(f"date='{date}': expected a day such as '2026-11-26'.") from None


def _end_tokens(folder: pathlib.Path) -> list[int]:
    """Returns the end tokens that `generation_config.json` and `config.json` name."""
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        named = hub.read_json(path).get("eos_token_id") if path.is_file() else None
        ids += named if isinstance(named, list) else [] if named is None else [named]
    return ids
