"""Dialogues as a chat template takes them: as they are, or with turns merged."""

from collections.abc import Sequence

from fedsafe_jax.data.chat_template import ChatTemplate, ChatTemplateError
from fedsafe_jax.data.refusals import spoken

Turns = list[tuple[str, str]]


def accepted_form(
    chat: ChatTemplate, turns: Sequence[tuple[str, str]], generation_prompt: bool
) -> tuple[Turns, str, list[int] | None]:
    """Renders turns as they are, or merged where the template refuses or leaves out some.

    Turns of one role in a row become one, with a blank line between; only then does a system turn
    become part of the first request.

    Args:
      chat: the tokenizer's chat template.
      turns: (role, text) turns.
      generation_prompt: whether the assistant's header follows.

    Returns:
      `(turns, text, places)`; `places` are the new places of the turns, None where nothing was
      merged.

    Raises:
      ChatTemplateError: the template refuses the turns, also when they are merged.
    """
    turns = list(turns)
    tried: list[Turns] = []
    refusal = None
    for rename in (None, {}, {"system": "user"}):
        candidate, places = (turns, None) if rename is None else _merged(turns, rename)
        if candidate in tried:
            continue
        tried.append(candidate)
        try:
            text = chat.write(candidate, generation_prompt)
            _check_whole(chat, candidate, text)
        except ChatTemplateError as error:
            refusal = refusal or error
        else:
            return candidate, text, places
    raise refusal


def _merged(turns: Turns, rename: dict[str, str]) -> tuple[Turns, list[int]]:
    """Returns turns with those of one role in a row as one, and each turn's new place."""
    merged, places = [], []
    for role, text in turns:
        role = rename.get(role, role)
        if merged and merged[-1][0] == role and role != "tool":
            merged[-1] = (role, f"{merged[-1][1]}\n\n{text}")
        else:
            merged.append((role, text))
        places.append(len(merged) - 1)
    return merged, places


def _check_whole(chat: ChatTemplate, turns: Turns, text: str) -> None:
    """Checks that a template wrote what was said; of earlier answers it may drop the thought."""
    for role, content in turns:
        if role == "assistant":
            content = spoken(content)
        if role in ("system", "user", "assistant") and content.strip() not in text:
            raise ChatTemplateError(f"{chat.name} leaves out the words of the role {role}.")
