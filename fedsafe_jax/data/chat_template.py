"""A tokenizer's chat template, with what a run fixes for it: arguments, date, end tokens.

These travel with the tokenizer, see `attach`, so that training, evaluation, Constitutional AI and
filters write a dialogue in the same way.
"""

import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from fedsafe_jax.data import control_tokens, template_sandbox

Turns = Sequence[tuple[str, str]]  # (role, text)

# What a template may raise on turns that it does not foresee, beside its own refusals.
_FAILURES = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError)
# Directives of strftime that do not depend on the time of the day, or stand for midnight.
_DIRECTIVES = "aAbBcdDeFGhHIjmMpSTuUVwWxXyYZz"
_UNPADDED = "dHIjmMSUWy"  # those that also come as `%-d`, without a leading zero
_OPEN_THOUGHT = re.compile(r"<think>\s*$")


class ChatTemplateError(ValueError):
    """A chat template is broken, refuses turns, or teaches nothing; the message says which."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is fixed for a tokenizer's chat template.

    Attributes:
      arguments: JSON text of what the template is given beside the messages.
      date: day that `strftime_now` writes; None for the day on which a dialogue is rendered.
      stop_ids: end tokens that the model's configs name.
      model: name for messages.
    """

    arguments: str = "{}"
    date: datetime.date | None = None
    stop_ids: tuple[int, ...] = ()
    model: str = ""


def attach(
    tokenizer: Any,
    arguments: Mapping[str, Any] | None = None,
    date: datetime.date | None = None,
    stop_ids: Sequence[int] = (),
    model: str = "",
) -> None:
    """Fixes what a tokenizer's dialogues are rendered with; see `Settings` for the arguments.

    Raises:
      ChatTemplateError: an argument is not of JSON's types.
    """
    try:
        text = json.dumps(dict(arguments or {}), sort_keys=True)
    except TypeError as error:
        raise ChatTemplateError(
            f"chat_template_kwargs: {error}; use text, numbers, bool."
        ) from None
    tokenizer.chat_settings = Settings(text, date, tuple(stop_ids), model)


def of(tokenizer: Any) -> "ChatTemplate":
    """Returns the chat template of a tokenizer, under its settings.

    Raises:
      ChatTemplateError: the tokenizer has no template.
    """
    settings = getattr(tokenizer, "chat_settings", Settings())
    try:
        text = tokenizer.get_chat_template()
    except ValueError as error:
        raise ChatTemplateError(
            f"{settings.model or 'the tokenizer'} has no chat template; give chat_template."
        ) from error
    return _template(tokenizer, text, settings)


@functools.lru_cache(maxsize=16)
def _template(tokenizer: Any, text: str, settings: Settings) -> "ChatTemplate":
    return ChatTemplate(tokenizer, text, settings)


class ChatTemplate:
    """A chat template under its settings.

    Args:
      tokenizer: a fast Hugging Face tokenizer.
      text: the template, in Jinja.
      settings: see `Settings`.
    """

    def __init__(self, tokenizer: Any, text: str, settings: Settings):
        self.tokenizer = tokenizer
        self.control = control_tokens.names(tokenizer, text)
        self._settings = settings
        self._text = text if settings.date is None else dated(text, settings.date)
        self._arguments = json.loads(settings.arguments)
        # Thinking is off unless it is asked for; another template would not know the word.
        if "enable_thinking" in text:
            self._arguments.setdefault("enable_thinking", False)
        asked = any(self._arguments.get(name) for name in ("enable_thinking", "thinking"))
        # Whether answers come without a thought, from a model that may have one.
        self.closes_thoughts = "think>" in text and not asked

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"the chat template of {self._settings.model or 'the tokenizer'}"

    def write(self, turns: Turns, generation_prompt: bool = False) -> str:
        """Renders turns.

        Args:
          turns: (role, text), with control tokens broken up.
          generation_prompt: whether the assistant's header follows. Where it opens a thought, and
            none is asked for, the thought is closed.

        Raises:
          ChatTemplateError: the template refuses the turns.
        """
        try:
            text = template_sandbox.render(
                self._text,
                {
                    "messages": [{"role": role, "content": text} for role, text in turns],
                    "tools": None,
                    "documents": None,
                    "add_generation_prompt": generation_prompt,
                    **self.tokenizer.special_tokens_map,
                    **self._arguments,
                },
            )
        except template_sandbox.TooMuchError as error:
            raise ChatTemplateError(f"{self.name} is refused: {error}.") from None
        except _FAILURES as error:
            roles = ", ".join(role for role, _ in turns)
            said = " ".join(str(error).split())[:300]
            raise ChatTemplateError(
                f"{self.name} refuses the turns {roles[:200]}: {said}"
            ) from error
        if generation_prompt and self.closes_thoughts and self.opens_thought(text):
            text = text.rstrip() + "\n\n</think>\n\n"
        return text

    @staticmethod
    def opens_thought(text: str) -> bool:
        """Returns whether a text ends at the beginning of a thought."""
        return bool(_OPEN_THOUGHT.search(text))

    def tokenise(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokenises rendered turns, see `control_tokens.tokenise`."""
        return control_tokens.tokenise(self.tokenizer, text)

    def is_control(self, token: int) -> bool:
        """Returns whether a token is a control token."""
        return self.tokenizer.convert_ids_to_tokens(token) in self.control

    @functools.cached_property
    def end_token(self) -> int | None:
        """The token that ends an answer; None where the template writes none."""
        try:
            text = self.write([("user", "Hi"), ("assistant", control_tokens.MARK)])
        except ChatTemplateError:
            return None
        behind = text.rpartition(control_tokens.MARK)[2]
        ids, _ = self.tokenise(behind)
        own = {self.tokenizer.eos_token_id, *self._settings.stop_ids}
        named = [i for i in ids if i in own]
        control = [i for i in ids if self.is_control(i)]
        return next(iter([*named, *control]), None)

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: of the configs, of the tokenizer, and of the template."""
        ids = [*self._settings.stop_ids, self.tokenizer.eos_token_id, self.end_token]
        return tuple(dict.fromkeys(i for i in ids if i is not None))


def dated(text: str, date: datetime.date) -> str:
    """Returns a template whose `strftime_now` writes a fixed date, at midnight.

    The function is shadowed by a macro, as templates are given plain data and no functions.
    """
    if "strftime_now" not in text:
        return text
    day = datetime.datetime.combine(date, datetime.time())
    written = {f"%-{d}": str(int(day.strftime(f"%{d}"))) for d in _UNPADDED}
    written |= {f"%{d}": day.strftime(f"%{d}") for d in _DIRECTIVES}
    steps = "".join(f".replace({name!r}, {value!r})" for name, value in written.items())
    # Jinja removes the line break behind the macro, so the template begins on a line of its own.
    return f"{{%- macro strftime_now(format) %}}{{{{ format{steps} }}}}{{% endmacro %}}\n{text}"
