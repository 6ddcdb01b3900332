"""Trains a critic of a model's unfinished answers, for a search with a budget.

    fedsafe train-critic --model=FOLDER [--adapter=FOLDER] --sources=SOURCE,... --guard=guard:FOLDER
        [--decoding=budget] --output=FOLDER

The model answers every request of the sources several times; the critic learns from these answers,
as the guard reads them. It is a critic of this model under this adapter alone.
"""

from absl import flags

from fedsafe_jax.cli import template_flags
from fedsafe_jax.cli.command import Command, UsageError, check_folder
from fedsafe_jax.evals.judges import JudgeError
from fedsafe_jax.guarding import decodings
from fedsafe_jax.guarding.contract import GuardError
from fedsafe_jax.guarding.spec import GuardSpec


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags."""
    text, whole, here = flags.DEFINE_string, flags.DEFINE_integer, {"flag_values": values}
    text("model", "package:model", "Model folder or Hub id.", **here)
    text("adapter", None, "PEFT adapter folder.", **here)
    template_flags.define(values)
    flags.DEFINE_list("sources", None, "Sources whose requests are answered.", **here)
    text("data_dir", "", "Folder of the data, or 'hub'.", **here)
    text("guard", None, "Judge of harm, such as guard:FOLDER.", **here)
    text("decoding", "budget", "The search that it is for; its block and budget count.", **here)
    text("output", None, "Folder that the critic is written to.", **here)
    flags.DEFINE_enum(
        "dtype", "float32", ["float32", "bfloat16"], "Precision of the model.", **here
    )
    whole("max_prompts", 0, "Requests taken, drawn by the seed; 0 for all.", lower_bound=0, **here)
    whole("answers", 5, "Answers to each request.", lower_bound=1, **here)
    whole("max_new_tokens", 64, "Longest answer.", lower_bound=2, **here)
    whole("batch_size", 64, "Answers generated at once.", lower_bound=1, **here)
    whole("epochs", 50, "Passes over the answers.", lower_bound=1, **here)
    whole("seed", 0, "Seed of answers, weights and order.", lower_bound=0, **here)


def checked(values: flags.FlagValues) -> decodings.Search:
    """Returns the search that the critic is for.

    Raises:
      UsageError: flags make no sense; they are named.
    """
    check_folder("output", values.output)
    try:
        GuardSpec(values.decoding, values.guard).check()
        settings = decodings.parse(values.decoding)
    except (GuardError, JudgeError) as error:
        raise UsageError(str(error)) from None
    if not settings.budget:
        raise UsageError(f"--decoding={values.decoding}: a critic is for a search with a budget.")
    if not 0 < settings.block < values.max_new_tokens:
        raise UsageError(
            f"--decoding={values.decoding}: block={settings.block} leaves no unfinished answer of "
            f"--max_new_tokens={values.max_new_tokens} to learn from."
        )
    return settings


def main(values: flags.FlagValues) -> None:
    """Samples answers, trains the critic, and prints how it does on held-out requests."""
    from fedsafe_jax import load_adapter, load_pretrained
    from fedsafe_jax.data import sources
    from fedsafe_jax.evals.task import subset
    from fedsafe_jax.guarding import critic, trajectories
    from fedsafe_jax.models.adapter_hash import adapter_hash
    from fedsafe_jax.random_streams import Purpose
    from fedsafe_jax.runtime import devices

    settings = checked(values)
    pairs = [pair for name in values.sources for pair in sources.load(name, values.data_dir)]
    asked = list(dict.fromkeys(pair.messages for pair in pairs))
    asked = subset(asked, values.max_prompts, Purpose.CRITIC_DRAWS)
    lm = load_pretrained(values.model, values.dtype, **template_flags.options(values))
    notes = {"model": values.model, "guard": values.guard, "search": settings._asdict()}
    if values.adapter:
        adapter = load_adapter(values.adapter)
        lm, notes["adapter_sha256"] = lm.with_adapter(adapter), adapter_hash(adapter.factors)
    devices.announce()
    guards = GuardSpec(values.decoding, values.guard).load(load_pretrained)
    answered = trajectories.collect(
        lm,
        asked,
        settings,
        max_new_tokens=values.max_new_tokens,
        risk=guards.risk,
        answers=values.answers,
        seed=values.seed,
        batch_size=values.batch_size,
    )
    moments = critic.moments_of(lm, answered)
    print(f"{len(answered)} answers to {len(asked)} requests, {len(moments.prompt)} moments")
    made, trained = critic.train(moments, settings.budget, seed=values.seed, epochs=values.epochs)
    critic.save(made, values.output, notes | {"trained": trained._asdict()})
    print(
        f"held out: loss {trained.loss:.3f} (constants {trained.constant:.3f}), epoch "
        f"{trained.epoch} of {values.epochs}, {trained.moments[1]} moments, the budget lasts in "
        f"{100 * trained.lasts:.1f}%"
    )
    if trained.loss >= trained.constant:
        print("warning: it knows no more than constants do; give more requests or answers")
    print(f"critic: {values.output}")


COMMAND = Command(define_flags, main, required=("sources", "guard", "output"))
