"""Flags of commands that ask a model: its chat template, and what that is given."""

import json
from typing import Any

from absl import flags

from fedsafe_jax.cli.command import UsageError


def define(values: flags.FlagValues) -> None:
    """Defines the flags; see `load_pretrained` for what they mean."""
    text, here = flags.DEFINE_string, {"flag_values": values}
    text(
        "chat_template",
        "",
        "In place of the model's; a base model needs one: alpaca, chatml, vicuna, a file or Jinja.",
        **here,
    )
    text(
        "chat_template_kwargs",
        "",
        "JSON object that the chat template is given, such as '{\"enable_thinking\": true}'.",
        **here,
    )
    text("date", "", "Day that the chat template writes, such as 2026-11-26; today.", **here)


def options(values: flags.FlagValues) -> dict[str, Any]:
    """Returns the flags as keyword arguments of `load_pretrained`.

    Raises:
      UsageError: the arguments are no JSON object.
    """
    arguments: Any = {}
    if values.chat_template_kwargs:
        try:
            arguments = json.loads(values.chat_template_kwargs)
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            raise UsageError(
                f"--chat_template_kwargs={values.chat_template_kwargs}: expected a JSON "
                "object such as '{\"enable_thinking\": true}'."
            )
    return {
        "chat_template": values.chat_template or None,
        "chat_template_kwargs": arguments,
        "date": values.date or None,
    }
