"""What the cases share: a small config, and the errors that end a command as one line."""

import pathlib

from fedsafe_jax.config import ConfigError, default_config
from fedsafe_jax.validation import input_errors

CASES = pathlib.Path(__file__).parent
BORDER = (ConfigError, *input_errors())  # what the command line prints as one line


def small_config(case: str = "", **changes):
    """A config of two clients and one round.

    Args:
      case: folder of the input files; "" for packaged ones alone.
      changes: of other fields; those of a group are written `eval__tasks`.
    """
    c = default_config()
    c.data_dir = str(CASES / case) if case else ""
    c.arms, c.export_arm = ("base", "fl"), "fl"
    c.rounds = c.local_steps = 1
    c.num_clients = c.clients_per_round = c.batch_size = 2
    c.examples_per_client = 4
    c.unsafe_sources = ("chat:package/clients_unsafe.jsonl",)
    c.eval.max_prompts = c.eval.max_heldout = 4
    c.eval.max_new_tokens = 8
    for name, value in changes.items():
        group, _, field = name.rpartition("__")
        (c[group] if group else c)[field] = value
    return c
