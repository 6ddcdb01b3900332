"""Flags of commands that put a model under guards."""

from absl import flags

from fedsafe_jax.cli.command import UsageError
from fedsafe_jax.evals.judges import JudgeError
from fedsafe_jax.guarding.contract import GuardError
from fedsafe_jax.guarding.decodings import DECODINGS, parse
from fedsafe_jax.guarding.spec import GuardSpec


def define(values: flags.FlagValues) -> None:
    """Defines the flags of all guards."""
    define_around(values)
    flags.DEFINE_string(
        "guard",
        "",
        "Judge of harm whose risk the decoding reads, such as guard:FOLDER.",
        flag_values=values,
    )


def define_around(values: flags.FlagValues) -> None:
    """Defines the flags of what is around a model, but for `--guard`."""

    def text(name: str, meaning: str) -> None:
        flags.DEFINE_string(name, "", meaning, flag_values=values)

    text(
        "decoding",
        f"Search in the place of plain decoding, {', '.join(DECODINGS)}; sizes behind a colon, as "
        "budget:candidates=16,budget=0.5.",
    )
    text(
        "guardian",
        "What answers in the model's place: folder of `fedsafe train-filter`, or guard:FOLDER.",
    )
    text("critic", "Folder of `fedsafe train-critic`, for a decoding with a budget.")


def spec(values: flags.FlagValues, guard: str) -> GuardSpec:
    """Returns the guards that the flags name.

    Args:
      values: the command's flags.
      guard: spec of the judge whose risk is read, where something reads it; "" for none.

    Raises:
      UsageError: one of them makes no sense.
    """
    guards = GuardSpec(values.decoding, guard, values.guardian, values.critic)
    try:
        guards.check()
    except (GuardError, JudgeError) as error:
        raise UsageError(str(error)) from None
    return guards


def reads_risk(values: flags.FlagValues) -> bool:
    """Returns whether `--decoding` reads a risk; False also where it cannot be read itself."""
    try:
        return bool(values.decoding) and parse(values.decoding).reads_risk
    except GuardError:
        return False
