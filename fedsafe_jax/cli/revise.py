"""Makes Constitutional AI data with any model: answers, critiques, revisions.

    python -m fedsafe_jax.revise --model=FOLDER [--adapter=FOLDER] --prompts=FILE \\
        --constitution=FILE --output=FILE.jsonl

An instruct model is asked in its chat template, `--form=dialogue` asks a base model in the form of
Bai et al. (2022), for which `--few_shots` should be more than 0. Each line of the output has the
prompt, the initial answer, the last round's principle, critique and revision, and why the revision
is of no use ("" where it is). Ends with the counts and a few pairs.
"""

import json
import pathlib
import time

from absl import app, flags, logging

from fedsafe_jax.data.examples import SourceError
from fedsafe_jax.filters.protocol import answer_risk

_MODEL = flags.DEFINE_string("model", "package:model", "Model folder or Hub id.")
_ADAPTER = flags.DEFINE_string("adapter", None, "PEFT adapter folder.")
_PROMPTS = flags.DEFINE_string("prompts", None, "Prompt file (txt, JSONL or CSV).")
_COLUMN = flags.DEFINE_string("column", "prompt", "Column or field that holds the text.")
_CONSTITUTION = flags.DEFINE_string("constitution", "package:constitution", "JSON file.")
_SHOT_FILE = flags.DEFINE_string("few_shot_file", "", "Examples in Anthropic's form.")
_SHOTS = flags.DEFINE_integer("few_shots", 0, "Examples before each prompt.", lower_bound=0)
_ROUNDS = flags.DEFINE_integer("rounds", 1, "Of critique and revision.", lower_bound=1)
_FORM = flags.DEFINE_enum("form", "chat", ["chat", "dialogue"], "How the model is asked.")
_CHECK = flags.DEFINE_enum(
    "check", "none", ["none", "rules"], "rules: drop revisions that do not begin with a refusal."
)
_WRONG = flags.DEFINE_bool("only_wrong", False, "Leave answers alone that the checks find right.")
_FILTER = flags.DEFINE_string("filter", None, "Filter folder: drop revisions that are not safer.")
_OUTPUT = flags.DEFINE_string("output", None, "JSONL file to write.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the model.")
_NEW = flags.DEFINE_integer("max_new_tokens", 256, "Of an answer or critique.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "Of the initial answers.", lower_bound=0.0)
_BATCH = flags.DEFINE_integer("batch_size", 32, "Rows generated at once.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of principles and samples.")
SHOWN = 5  # pairs printed


def read_prompts(path: str, column: str) -> list[str]:
    """Texts of a prompt file.

    Raises:
      SourceError: the file cannot be read, or a row lacks the column.
    """
    from fedsafe_jax.data import sources

    file = pathlib.Path(path)
    prompts = []
    for place, row in sources.read_rows(file.name, str(file.parent)):
        if not str(row.get(column) or "").strip():
            raise SourceError(
                f"{place}: no text in column '{column}'; found {sorted(row)}. Set --column."
            )
        prompts.append(str(row[column]))
    return prompts


def checks(count: int) -> dict:
    """What drops revisions, by the flags."""
    from fedsafe_jax import load_pretrained
    from fedsafe_jax.cai import revise
    from fedsafe_jax.data.refusals import start_refusal
    from fedsafe_jax.filters import store

    wanted, found = [True] * count, {}
    if _CHECK.value == "rules":
        found["rules"] = revise.Rules(wanted, start_refusal)
    if _FILTER.value:
        judge = store.load(_FILTER.value, load_pretrained)
        risk = answer_risk(judge)
        found["judge"] = revise.Judge(wanted, risk, judge.decision.threshold)
    return found


def run() -> list:
    """Loads, revises, writes; returns the records."""
    from fedsafe_jax import load_adapter, load_pretrained
    from fedsafe_jax.cai import constitution as constitution_lib
    from fedsafe_jax.cai import forms, revise
    from fedsafe_jax.federated.mesh import make_mesh, use_cores
    from fedsafe_jax.inference.chat_session import ChatSession
    from fedsafe_jax.pipeline.constitutional import make_generate_fn
    from fedsafe_jax.runtime.run_files import replace_lines

    prompts = read_prompts(_PROMPTS.value, _COLUMN.value)
    constitution = constitution_lib.load(_CONSTITUTION.value, _SHOT_FILE.value)
    if _SHOTS.value > len(constitution.few_shots):
        raise constitution_lib.ConstitutionError(
            f"--few_shots={_SHOTS.value}: there are {len(constitution.few_shots)}; give "
            "--few_shot_file."
        )
    use_cores(_BATCH.value)
    dialogue = _FORM.value == "dialogue"
    template = forms.DIALOGUE if dialogue else None
    lm = load_pretrained(_MODEL.value, _DTYPE.value, mesh=make_mesh(), chat_template=template)
    if _ADAPTER.value:
        lm = lm.with_adapter(load_adapter(_ADAPTER.value))

    talk = ChatSession(lm, _BATCH.value)

    def speak(temperature):
        return make_generate_fn(_NEW.value, [_SEED.value, 17], talk, temperature, not dialogue)

    found = revise.revise(
        prompts,
        constitution,
        speak(_TEMPERATURE.value),
        reviser=speak(0.0),
        seed=[_SEED.value, 18],
        rounds=_ROUNDS.value,
        num_few_shots=_SHOTS.value,
        **checks(len(prompts)),
        only_wrong=_WRONG.value,
    )
    replace_lines(
        pathlib.Path(_OUTPUT.value), lambda old: True, [record._asdict() for record in found]
    )
    return found


def main(argv):
    del argv
    if not _PROMPTS.value or not _OUTPUT.value:
        raise SystemExit("error: --prompts and --output: give both.")
    if _WRONG.value and _CHECK.value == "none" and not _FILTER.value:
        raise SystemExit(
            "error: --only_wrong: nothing says what is wrong; give --check or --filter."
        )
    from fedsafe_jax.cai.revise import tally
    from fedsafe_jax.runtime.libraries import quiet_libraries
    from fedsafe_jax.validation import input_errors

    quiet_libraries()
    logging.set_verbosity(logging.WARNING)
    started = time.monotonic()
    try:
        found = run()
    except input_errors() as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{len(found)} prompts in {time.monotonic() - started:.0f} s: {json.dumps(tally(found))}")
    for record in [r for r in found if not r.dropped][:SHOWN]:
        print(f"\n{record.prompt}\n  before: {record.initial}\n  after:  {record.revision}")
    print(f"\nrecords: {_OUTPUT.value}")


if __name__ == "__main__":
    app.run(main)
