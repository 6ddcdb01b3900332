"""Makes Constitutional AI data with any model: answers, critiques, revisions.

    fedsafe revise --model=FOLDER [--adapter=FOLDER] --prompts=FILE --constitution=FILE \\
        --output=FILE.jsonl

An instruct model is asked in its chat template, `--form=dialogue` asks a base model in the form of
Bai et al. (arXiv 2212.08073), for which `--few_shots` should be more than 0. Each line of the
output has the prompt, the initial answer, the last round's principle, critique and revision, and
why the revision is of no use ("" where it is of use). A prompt may be a whole dialogue, a list of
{role, content}: critique and revision go on in it, and the line keeps it as `messages`. The counts
and a few pairs are printed.
"""

import json
import time

from absl import flags

from fedsafe_jax import whole_files
from fedsafe_jax.cai.revise import Record
from fedsafe_jax.cli import template_flags
from fedsafe_jax.cli.command import Command, UsageError, check_file

SHOWN = 5  # pairs printed


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags."""
    text, whole, choice = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_enum
    here = {"flag_values": values}
    text("model", "package:model", "Model folder or Hub id.", **here)
    text("adapter", None, "PEFT adapter folder.", **here)
    template_flags.define(values)
    text("prompts", None, "Prompt file (txt, JSONL or CSV).", **here)
    text("column", "prompt", "Column or field that holds the text or the messages.", **here)
    text("constitution", "package:constitution", "JSON file.", **here)
    text("few_shot_file", "", "Examples in Anthropic's form.", **here)
    whole("few_shots", 0, "Examples before each prompt.", lower_bound=0, **here)
    whole("rounds", 1, "Rounds of critique and revision.", lower_bound=1, **here)
    choice("form", "chat", ["chat", "dialogue"], "How the model is asked.", **here)
    text("check", "none", "Judge of refusal: drop revisions that do not refuse; or none.", **here)
    flags.DEFINE_bool(
        "only_wrong", False, "Leave answers alone that the checks find right.", **here
    )
    flags.DEFINE_bool(
        "replace_dropped",
        False,
        "Put a refusal of the constitution's in the place of each revision that is dropped.",
        **here,
    )
    text("filter", None, "Filter folder: drop revisions that are not safer.", **here)
    text("output", None, "JSONL file to write.", **here)
    choice("dtype", "float32", ["float32", "bfloat16"], "Precision of the model.", **here)
    whole("max_new_tokens", 256, "Longest answer or critique.", lower_bound=1, **here)
    flags.DEFINE_float(
        "temperature", 0.0, "Temperature of the initial answers.", lower_bound=0.0, **here
    )
    whole("batch_size", 32, "Rows generated at once.", lower_bound=1, **here)
    whole("seed", 0, "Seed of principles and samples.", lower_bound=0, **here)


def make_checks(count: int, check: str, filter_folder: str | None) -> dict:
    """Returns what drops revisions, as keyword arguments of `cai.revise.revise`.

    Args:
      count: number of prompts; every one of them ought to be refused.
      check: value of `--check`.
      filter_folder: folder of a filter that judges the answers, or None.

    Raises:
      UsageError: there is no such judge.
    """
    from fedsafe_jax import load_pretrained
    from fedsafe_jax.cai import revise
    from fedsafe_jax.evals import judges
    from fedsafe_jax.evals.judges import JudgeError, Tools
    from fedsafe_jax.filters import store
    from fedsafe_jax.filters.protocol import answer_risk

    wanted: list[bool] = [True] * count
    checks: dict = {}
    if check != "none":
        try:
            checks["rules"] = revise.Rules(wanted, judges.refuses(check, Tools(load_pretrained)))
        except JudgeError as error:
            raise UsageError(f"--check: {error}") from None
    if filter_folder:
        judge = store.load(filter_folder, load_pretrained)
        checks["judge"] = revise.Judge(wanted, answer_risk(judge), judge.decision.threshold)
    return checks


def revise_prompts(values: flags.FlagValues) -> list[Record]:
    """Loads model and prompts, revises, and writes the records to `--output`."""
    import jax

    from fedsafe_jax import load_adapter, load_pretrained
    from fedsafe_jax.cai import constitution as constitution_lib
    from fedsafe_jax.cai import forms, revise
    from fedsafe_jax.cli.prompts import read_prompts, repeats
    from fedsafe_jax.data import template_check
    from fedsafe_jax.federated.mesh import make_mesh
    from fedsafe_jax.inference.chat_session import ChatSession
    from fedsafe_jax.pipeline.constitutional import make_generate_fn
    from fedsafe_jax.random_streams import Purpose
    from fedsafe_jax.runtime import devices

    prompts = read_prompts(values.prompts, values.column)
    if note := repeats(prompts):
        print(note)
    constitution = constitution_lib.load(values.constitution, values.few_shot_file)
    if values.replace_dropped and not constitution.refusals:
        raise UsageError(f"--replace_dropped: {values.constitution} has no refusals.")
    if values.few_shots > len(constitution.few_shots):
        raise UsageError(
            f"--few_shots={values.few_shots}: there are {len(constitution.few_shots)}; give "
            "--few_shot_file."
        )
    dialogue = values.form == "dialogue"
    template = template_flags.options(values)
    if dialogue:
        template["chat_template"] = forms.DIALOGUE
    lm = load_pretrained(
        values.model, values.dtype, mesh=make_mesh(jax.local_devices()), **template
    )
    if values.adapter:
        lm = lm.with_adapter(load_adapter(values.adapter))

    if not dialogue:
        template_check.check(lm.tokenizer, [(request.source, request) for request in prompts])
    devices.announce()
    talk = ChatSession(lm, values.batch_size)

    def speak(temperature: float):
        return make_generate_fn(
            values.max_new_tokens,
            (values.seed,),
            talk,
            temperature=temperature,
            chat_form=not dialogue,
            purpose=Purpose.REVISE_SAMPLES,
        )

    records = revise.revise(
        [request.messages for request in prompts],
        constitution,
        speak(values.temperature),
        reviser=speak(0.0),
        seed=(values.seed,),
        purpose=Purpose.REVISE_PRINCIPLES,
        rounds=values.rounds,
        num_few_shots=values.few_shots,
        **make_checks(len(prompts), values.check, values.filter),
        only_wrong=values.only_wrong,
        replace=values.replace_dropped,
    )
    lines = whole_files.to_json_lines(revise.to_row(record) for record in records)
    whole_files.write(values.output, lines)
    return records


def main(values: flags.FlagValues) -> None:
    """Revises and prints the counts and the first pairs."""
    from fedsafe_jax.cai.revise import tally
    from fedsafe_jax.data.examples import Example
    from fedsafe_jax.federated.mesh import use_cores
    from fedsafe_jax.runtime import multihost

    for name in ("only_wrong", "replace_dropped"):
        if values[name].value and values.check == "none" and not values.filter:
            raise UsageError(f"--{name}: nothing says what is wrong; give --check or --filter.")
    if values.form == "dialogue" and values.chat_template:
        raise UsageError("--chat_template and --form=dialogue: give one of them.")
    template_flags.options(values)  # wrong before any file is made
    check_file("output", values.output)
    use_cores(values.batch_size)
    started = time.monotonic()

    def work():
        records = revise_prompts(values)
        seconds = time.monotonic() - started
        print(f"{len(records)} prompts in {seconds:.0f} s: {json.dumps(tally(records))}")
        for record in [r for r in records if not r.dropped][:SHOWN]:
            print(f"\n{Example(record.turns, '').dialogue}")
            print(f"  before: {record.initial}\n  after:  {record.revision}")
        print(f"\nrecords: {values.output}")

    multihost.on_first(work, "revised")


COMMAND = Command(define_flags, main, required=("prompts", "output"))
