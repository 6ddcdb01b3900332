"""Templates: each request within texts of the user's own file; none is part of the project."""

from collections.abc import Sequence

import jax

from fedsafe_jax.attacks.contract import (
    Attack,
    Attacked,
    AttackError,
    AttackPrompt,
    Settings,
    reworded,
    without_search,
)
from fedsafe_jax.data import sources
from fedsafe_jax.data.examples import Example, SourceError
from fedsafe_jax.data.text_files import shorten
from fedsafe_jax.inference.language_model import LanguageModel

REQUEST = "{request}"


def read(path: str) -> tuple[tuple[str, str], ...]:
    """Reads the templates of a file, one a line, each with `{request}` where the request goes.

    Args:
      path: a txt file; of JSON lines or CSV the field `prompt`, which may have several lines.

    Returns:
      `(name, template)` of each, the name being its number.

    Raises:
      SourceError: the file cannot be read, or a line has no `{request}`; the line is named.
    """
    named = []
    for number, (place, row) in enumerate(sources.read_rows(path, ""), 1):
        text = row.get("prompt")
        if not isinstance(text, str) or REQUEST not in text:
            raise SourceError(f"{place}: no {REQUEST} in {shorten(text)}; the request goes there.")
        named.append((str(number), text))
    return tuple(named)


def attack(
    models: Sequence[LanguageModel],
    requests: Sequence[Example],
    targets: Sequence[Sequence[str]],
    settings: Settings,
    key: jax.Array,
) -> Attacked:
    """Returns each request within each template; arguments as in `Attack.run`."""
    del models, targets, key
    return without_search(
        [
            [
                AttackPrompt(
                    reworded(request.messages, text.replace(REQUEST, request.prompt)), variant=name
                )
                for name, text in settings.templates
            ]
            for request in requests
        ]
    )


def _check(settings: Settings) -> None:
    if not settings.templates:
        raise AttackError(
            f"'templates' needs a file with one template a line, {REQUEST} where the request goes."
        )


TEMPLATES = Attack(attack, _check)
