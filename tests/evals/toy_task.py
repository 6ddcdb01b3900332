"""A toy evaluation in one file: how many answers say anything at all."""

from fedsafe_jax.data import sources
from fedsafe_jax.evals import TASKS, Column, Task, statistics


def load(source, data_dir):
    return [example.prompt for example in sources.load(source, data_dir)]


def run(lm, prompts, options):
    answers = lm.generate(prompts, max_new_tokens=options.max_new_tokens)
    return {"spoke": [bool(answer.strip()) for answer in answers]}


def summarise(outcomes, options):
    del options
    mean, interval = statistics.rate([outcome["spoke"] for outcome in outcomes])
    return {"spoken": mean, "ci95": interval}


TASKS["toy"] = Task(
    name="toy",
    version=1,
    title="toy prompts",
    source="chat:package/benign_heldout.jsonl",
    columns=(Column("said something", "spoken", "up"),),
    load=load,
    prompts=list,
    run=run,
    summarise=summarise,
    values=lambda outcome, options: {"spoken": outcome["spoke"]},
)
