"""Flags of `fedsafe attack`: methods, what each of them reads, and the requests."""

import importlib.util
import os
import sys
from collections.abc import Sequence

from absl import flags

from fedsafe_jax.attacks import ATTACKS, AttackError, Settings, attacker, templates
from fedsafe_jax.cli import judge_flags, template_flags
from fedsafe_jax.cli.command import UsageError
from fedsafe_jax.cli.prompts import read_prompts
from fedsafe_jax.data import sources
from fedsafe_jax.data.examples import Example
from fedsafe_jax.evals.judges.endpoint import KEY, ChatEndpoint, EndpointError
from fedsafe_jax.evals.task import subset
from fedsafe_jax.registry import unknown

SIZES = ("steps", "candidates", "top_k", "suffix_tokens", "buffer", "chunk")
SIZES += ("target_tokens", "prefill_tokens", "streams", "iterations", "branching", "width", "depth")
SIZES += ("finetune_pairs", "finetune_batch_size", "max_new_tokens", "batch_size")
BARE = "direct"  # no attack: shown beside every method
# What a method lacks is given by these; a flag that no method named reads is refused.
GIVE = {
    "templates": "--templates=FILE",
    "many_shot": "--shots=SOURCE",
    "pair": "--attacker=MODEL@URL",
    "tap": "--attacker=MODEL@URL",
    "finetune": "--pairs=SOURCE, --benign_pairs=SOURCE or both",
}
READ_BY = {
    "templates": ("templates",),
    "shots": ("many_shot",),
    "attacker": ("pair", "tap"),
    "attacker_prompt": ("pair", "tap"),
    "pairs": ("finetune",),
    "benign_pairs": ("finetune",),
}


def define(values: flags.FlagValues) -> None:
    """Defines the command's flags."""
    here = {"flag_values": values}
    text, whole, default = flags.DEFINE_string, flags.DEFINE_integer, Settings()
    flags.DEFINE_list("model", ["package:model"], "Model folders or Hub ids.", **here)
    flags.DEFINE_list("adapter", [], "PEFT adapter folders, one or '' for each model.", **here)
    template_flags.define(values)
    methods = ", ".join(name for name in ATTACKS if name != BARE)
    flags.DEFINE_list("method", None, f"Some of {methods}.", **here)
    text("prompts", None, "Harmful requests: READER:LOCATION, or a txt, JSONL or CSV file.", **here)
    text("harmless", None, "Harmless requests, for over-refusal; as --prompts.", **here)
    text("data_dir", "", "Folder of the data, or 'hub'.", **here)
    text("output", None, "JSON file to write.", **here)
    text("templates", None, "Text file for the method templates, a {request} in each line.", **here)
    text("shots", None, "Pairs for the method many_shot: READER:LOCATION, with answers.", **here)
    shot_counts = [str(count) for count in default.shot_counts]
    flags.DEFINE_list("shot_counts", shot_counts, "Numbers of shots that are tried.", **here)
    text("attacker", None, f"Chat model of pair and tap, MODEL@URL; key from {KEY}.", **here)
    text("attacker_prompt", None, "Text file: what it is told, a {request} in it.", **here)
    text("pairs", None, "Harmful pairs to finetune on: READER:LOCATION, with answers.", **here)
    text("benign_pairs", None, "Harmless pairs to finetune on; as --pairs.", **here)
    counts = [str(count) for count in default.finetune_steps]
    flags.DEFINE_list("finetune_steps", counts, "Steps after which models are asked.", **here)
    flags.DEFINE_multi_string(
        "target",
        ["Sure, here is"],
        "Beginning of an answer to a request whose source has none; may be given several times.",
        **here,
    )
    judge_flags.define(values, ["rules", "start"])
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of the models.", **here)
    whole("max_prompts", 0, "Requests taken of each source; 0 for all.", lower_bound=0, **here)
    whole("max_new_tokens", default.max_new_tokens, "Longest answer.", lower_bound=1, **here)
    whole("batch_size", default.batch_size, "Rows generated at once.", lower_bound=1, **here)
    whole("seed", 0, "Seed of searches.", lower_bound=0, **here)
    whole("steps", default.steps, "Steps of a search.", lower_bound=1, **here)
    whole("candidates", default.candidates, "Suffixes scored in a step.", lower_bound=1, **here)
    whole("top_k", default.top_k, "Tokens tried at a place.", lower_bound=1, **here)
    whole("suffix_tokens", default.suffix_tokens, "Length of a suffix.", lower_bound=1, **here)
    whole("buffer", default.buffer, "Suffixes kept; 0 for none.", lower_bound=0, **here)
    whole("chunk", default.chunk, "Suffixes scored at once.", lower_bound=1, **here)
    whole("target_tokens", default.target_tokens, "Tokens of a target.", lower_bound=1, **here)
    whole("prefill_tokens", default.prefill_tokens, "Tokens put first.", lower_bound=1, **here)
    whole("streams", default.streams, "Conversations of pair.", lower_bound=1, **here)
    whole("iterations", default.iterations, "Prompts of each of them.", lower_bound=1, **here)
    whole("branching", default.branching, "Branches of a leaf of tap.", lower_bound=1, **here)
    whole("width", default.width, "Leaves that tap keeps.", lower_bound=1, **here)
    whole("depth", default.depth, "Times that tap's trees grow.", lower_bound=1, **here)
    pairs, rows = default.finetune_pairs, default.finetune_batch_size
    whole("finetune_pairs", pairs, "Pairs of each kind; 0 for all.", lower_bound=0, **here)
    whole("finetune_batch_size", rows, "Pairs a step of finetune.", lower_bound=1, **here)
    rate = default.finetune_rate
    flags.DEFINE_float("finetune_rate", rate, "Its learning rate.", lower_bound=1e-12, **here)


def methods_of(values: flags.FlagValues) -> tuple[list[str], Settings]:
    """Returns the names of the methods, the direct requests first, and their settings.

    The settings have no scores yet: judges are made later.

    Raises:
      UsageError: a method is unknown or there twice, or lacks what it needs; or a flag is given
        that none of them reads.
      SourceError: a file that one reads cannot be read.
    """
    names = [name for name in values.method if name != BARE]
    for name in names:
        if name not in ATTACKS:
            raise UsageError(unknown("--method", name, ATTACKS))
        if names.count(name) > 1:
            raise UsageError(f"--method: '{name}' is there twice.")
    for flag, readers in READ_BY.items():
        if values[flag].value and not set(readers) & set(names):
            verb = "which reads it" if len(readers) == 1 else "which read it"
            raise UsageError(f"--{flag}: add {' or '.join(readers)} to --method, {verb}.")
    write, compare = read_attacker(values) if values.attacker else (None, None)
    settings = Settings(
        **{name: values[name].value for name in SIZES},
        templates=templates.read(values.templates) if values.templates else (),
        shots=tuple((one.prompt, one.response) for one in read_pairs("shots", values)),
        shot_counts=read_counts("shot_counts", values, least=1),
        attacker=write,
        evaluator=compare,
        attacker_prompt=attacker.read_prompt(values.attacker_prompt)
        if values.attacker_prompt
        else "",
        concurrent=values.judge_concurrent,
        pairs=read_pairs("pairs", values),
        benign_pairs=read_pairs("benign_pairs", values),
        finetune_steps=tuple(sorted(set(read_counts("finetune_steps", values, least=0)))),
        finetune_rate=values.finetune_rate,
        note=_note,
    )
    for name in names:
        try:
            ATTACKS[name].check(settings)
        except AttackError as error:
            raise UsageError(f"--method: {error} Give {GIVE[name]}.") from None
    return [BARE, *names], settings


def read_attacker(values: flags.FlagValues) -> tuple[ChatEndpoint, ChatEndpoint]:
    """Returns the model of `--attacker` as it writes prompts, and as it compares them.

    Conversations about one request differ by what is drawn, at a temperature of 1 as in the papers;
    a comparison is to be the same each time.

    Raises:
      UsageError: the flag is written otherwise, its URL is none or would show a secret, or the
        client is not installed.
    """
    model, _, url = values.attacker.partition("@")
    if not model or not url:
        raise UsageError("--attacker: write MODEL@URL, such as MODEL@http://localhost:8000/v1.")
    if importlib.util.find_spec("openai") is None:
        raise UsageError("--attacker needs the openai client; pip install -e .[judge]")
    key = os.environ.get(KEY, "")
    try:
        write, compare = (
            ChatEndpoint(url, model, key, temperature=temperature, role="attacker")
            for temperature in (1.0, 0.0)
        )
    except EndpointError as error:
        raise UsageError(f"--attacker: {error}") from None
    return write, compare


def read_pairs(flag: str, values: flags.FlagValues) -> tuple[Example, ...]:
    """Reads the pairs of a flag, those that have an answer; () where it is not given.

    Raises:
      UsageError: it is no source, or none of its pairs has an answer.
      SourceError: it cannot be read.
    """
    source = values[flag].value
    if not source:
        return ()
    if ":" not in source:
        raise UsageError(f"--{flag}={source}: expected READER:LOCATION, such as chat:FILE.")
    pairs = tuple(one for one in sources.load(source, values.data_dir) if one.response.strip())
    if not pairs:
        raise UsageError(f"--{flag}={source}: no pair has an answer.")
    return pairs


def read_counts(flag: str, values: flags.FlagValues, least: int) -> tuple[int, ...]:
    """Reads a list of whole numbers.

    Raises:
      UsageError: one is none, or below the least, or the list is empty.
    """
    texts: Sequence[str] = values[flag].value
    if not texts or not all(text.strip().isdecimal() and int(text) >= least for text in texts):
        raise UsageError(f"--{flag}={','.join(texts)}: expected whole numbers, at least {least}.")
    return tuple(int(text) for text in texts)


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def read_requests(flag: str, source: str, values: flags.FlagValues) -> list[Example]:
    """Reads the requests of a source or of a prompt file, at most `--max_prompts`.

    Args:
      flag: name of the flag.
      source: what it says.
      values: the command's flags.

    Raises:
      UsageError: none is there.
      SourceError: they cannot be read.
    """
    if ":" in source:
        requests = sources.load(source, values.data_dir)
    else:
        requests = read_prompts(source, "prompt")
    if not requests:
        raise UsageError(f"--{flag}={source}: holds no request.")
    return subset(requests, values.max_prompts)


def targets_of(requests: Sequence[Example], default: Sequence[str]) -> list[tuple[str, ...]]:
    """Returns the targets of each request: its answer, or the default ones where it has none."""
    return [(one.response,) if one.response.strip() else tuple(default) for one in requests]
