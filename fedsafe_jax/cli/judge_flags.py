"""Flags of commands that judge answers: which judges, and what those are given."""

import functools
import os
from collections.abc import Sequence

from absl import flags

from fedsafe_jax.cli.command import UsageError
from fedsafe_jax.evals import judges
from fedsafe_jax.evals.judges import Judge, JudgeError, Tools
from fedsafe_jax.evals.judges.endpoint import KEY


def define(values: flags.FlagValues, default: Sequence[str]) -> None:
    """Defines the flags, but for `--dtype`, which a command may share with its model.

    Args:
      values: the command's flags.
      default: the judges without `--judges`.
    """
    here = {"flag_values": values}
    flags.DEFINE_list(
        "judges",
        list(default),
        f"Judges, the headline's first, some of {', '.join(judges.forms())}; chat ones take their "
        f"key from {KEY}.",
        **here,
    )
    flags.DEFINE_string(
        "judge_cache", "", "Folder of chat judges' replies; '' to keep none.", **here
    )
    flags.DEFINE_integer(
        "judge_concurrent", 8, "Answers asked about at once.", lower_bound=1, **here
    )


def make(values: flags.FlagValues) -> tuple[Judge, ...]:
    """Makes the judges that the flags name; guards are read in the type `--dtype`.

    Raises:
      UsageError: a judge is unknown or cannot be made, or none is named.
    """
    from fedsafe_jax import load_pretrained

    tools = Tools(
        functools.partial(load_pretrained, dtype=values.dtype),
        cache=values.judge_cache,
        api_key=os.environ.get(KEY, ""),
        concurrent=values.judge_concurrent,
    )
    try:
        made = judges.make(values.judges, tools)
    except JudgeError as error:
        raise UsageError(f"--judges: {error}") from None
    if not made:
        raise UsageError(f"--judges: give some of {', '.join(judges.forms())}.")
    return made
