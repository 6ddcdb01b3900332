"""Attacks a model to measure its defence: how often it answers what it refuses when asked directly.

    fedsafe attack --model=FOLDER --method=gcg,prefill --prompts=SOURCE --output=FILE.json

It is a tool for research on defences: the model is the user's own, results are rates. Prompts are a
source, READER:LOCATION, whose answers are the targets, or a file of prompts. Methods that are
finished are in the output at once, and the same command goes on behind them. Several models, with
one adapter or nothing for each, are asked the same prompts.
"""

import json
import pathlib
import sys
import time
from collections.abc import Sequence

from absl import flags

from fedsafe_jax import random_streams, whole_files
from fedsafe_jax.attacks import ATTACKS, AttackError, Settings, measurement, templates
from fedsafe_jax.cli import judge_flags, template_flags
from fedsafe_jax.cli.command import Command, UsageError, check_file
from fedsafe_jax.cli.prompts import read_prompts
from fedsafe_jax.data import chat_template, sources, template_check
from fedsafe_jax.data.examples import Example
from fedsafe_jax.evals import answers, judges
from fedsafe_jax.evals.task import subset
from fedsafe_jax.inference.language_model import LanguageModel
from fedsafe_jax.random_streams import Purpose
from fedsafe_jax.registry import unknown

SIZES = ("steps", "candidates", "top_k", "suffix_tokens", "buffer", "chunk")
SIZES += ("target_tokens", "prefill_tokens")
BARE = "direct"  # no attack: shown beside every method
# Flags that some methods need, and what these say.
NEEDED = {"templates": ("templates", "FILE"), "many_shot": ("shots", "SOURCE")}


def define_flags(values: flags.FlagValues) -> None:
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
    flags.DEFINE_multi_string(
        "target",
        ["Sure, here is"],
        "Beginning of an answer to a request whose source has none; may be given several times.",
        **here,
    )
    judge_flags.define(values, ["rules", "start"])
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of the models.", **here)
    whole("max_prompts", 0, "Requests taken of each source; 0 for all.", lower_bound=0, **here)
    whole("max_new_tokens", 64, "Longest answer.", lower_bound=1, **here)
    whole("batch_size", 64, "Rows generated at once.", lower_bound=1, **here)
    whole("seed", 0, "Seed of searches.", lower_bound=0, **here)
    whole("steps", default.steps, "Steps of a search.", lower_bound=1, **here)
    whole("candidates", default.candidates, "Suffixes scored in a step.", lower_bound=1, **here)
    whole("top_k", default.top_k, "Tokens tried at a place.", lower_bound=1, **here)
    whole("suffix_tokens", default.suffix_tokens, "Length of a suffix.", lower_bound=1, **here)
    whole("buffer", default.buffer, "Suffixes kept; 0 for none.", lower_bound=0, **here)
    whole("chunk", default.chunk, "Suffixes scored at once.", lower_bound=1, **here)
    whole("target_tokens", default.target_tokens, "Tokens of a target.", lower_bound=1, **here)
    whole("prefill_tokens", default.prefill_tokens, "Tokens put first.", lower_bound=1, **here)


def methods_of(values: flags.FlagValues) -> tuple[list[str], Settings]:
    """Returns the names of the methods, the direct requests first, and their settings.

    Raises:
      UsageError: a method is unknown or there twice, or lacks what it needs.
      SourceError: the file of templates cannot be read.
    """
    names = [name for name in values.method if name != BARE]
    for name in names:
        if name not in ATTACKS:
            raise UsageError(unknown("--method", name, ATTACKS))
        if names.count(name) > 1:
            raise UsageError(f"--method: '{name}' is there twice.")
    sizes = {name: values[name].value for name in SIZES}
    for name, (flag, _) in NEEDED.items():
        if values[flag].value and name not in names:
            raise UsageError(f"--{flag}: add {name} to --method, which reads it.")
    settings = Settings(
        **sizes,
        templates=templates.read(values.templates) if values.templates else (),
        shots=read_shots(values) if values.shots else (),
        shot_counts=read_counts(values.shot_counts),
        note=_note,
    )
    for name in names:
        try:
            ATTACKS[name].check(settings)
        except AttackError as error:
            flag = "=".join(NEEDED[name])
            raise UsageError(f"--method: {error} Give --{flag}.") from None
    return [BARE, *names], settings


def read_shots(values: flags.FlagValues) -> tuple[tuple[str, str], ...]:
    """Reads the pairs of `--shots`: `(request, answer)`.

    Raises:
      UsageError: it is no source, or none of its pairs has an answer.
      SourceError: it cannot be read.
    """
    if ":" not in values.shots:
        raise UsageError(f"--shots={values.shots}: expected READER:LOCATION, such as chat:FILE.")
    pairs = sources.load(values.shots, values.data_dir)
    shots = tuple((one.prompt, one.response) for one in pairs if one.response.strip())
    if not shots:
        raise UsageError(f"--shots={values.shots}: no pair has an answer.")
    return shots


def read_counts(texts: Sequence[str]) -> tuple[int, ...]:
    """Reads `--shot_counts`.

    Raises:
      UsageError: one is no whole number, at least 1, or there is none.
    """
    if not texts or not all(text.strip().isdecimal() and int(text) > 0 for text in texts):
        raise UsageError(f"--shot_counts={','.join(texts)}: expected whole numbers, at least 1.")
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


def load_models(values: flags.FlagValues) -> tuple[dict[str, LanguageModel], dict[str, str]]:
    """Loads the models under their adapters.

    Returns:
      The models by name, and the SHA-256 of the tensors of each adapter by the model's name.

    Raises:
      UsageError: a model is there twice.
      ModelError: one cannot be loaded.
      ChatTemplateError: one has no chat template.
    """
    import jax

    from fedsafe_jax import load_adapter, load_pretrained
    from fedsafe_jax.federated.mesh import make_mesh
    from fedsafe_jax.models.adapter_hash import adapter_hash

    template, local = template_flags.options(values), make_mesh(jax.local_devices())
    folders = values.adapter or [""] * len(values.model)
    names = [f"{m}:{a}" if a else m for m, a in zip(values.model, folders, strict=True)]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"--model: '{repeated[0]}' is there twice.")
    models, hashes = {}, {}
    for name, model, folder in zip(names, values.model, folders, strict=True):
        lm = load_pretrained(model, values.dtype, mesh=local, **template)
        chat_template.of(lm.tokenizer)
        if folder:
            adapter = load_adapter(folder)
            lm, hashes[name] = lm.with_adapter(adapter), adapter_hash(adapter.factors)
        models[name] = lm
    return models, hashes


def finished(path: pathlib.Path, settings: dict) -> dict:
    """Returns the output of an earlier command with the same settings; {} where there is none."""
    content = whole_files.read(path)
    try:
        stored = {} if content is None else json.loads(content)
    except ValueError:
        return {}
    return stored if isinstance(stored, dict) and stored.get("settings") == settings else {}


def in_words(name: str, shown: dict) -> str:
    """Returns a line on a method: its attack success with interval, queries and tokens."""
    if shown["asr"] is None:
        return f"{name}: n/a"
    low, high = shown["ci95"]
    loss = ", loss {:.3f} to {:.3f}".format(*shown["loss"]) if "loss" in shown else ""
    return (
        f"{name}: attack success {shown['asr']:.1f}% ({low:.1f}-{high:.1f}) of {shown['n']}, "
        f"{shown['queries']:.0f} queries a request, {shown['tokens']:.0f} tokens a prompt{loss}"
    )


def main(values: flags.FlagValues) -> None:
    """Attacks by every method, and writes the rates after each."""
    from fedsafe_jax.federated.mesh import use_cores
    from fedsafe_jax.runtime import devices, multihost, run_files

    check_file("output", values.output)
    names, settings = methods_of(values)
    made = judge_flags.make(values)
    told = measurement.measuring(made)
    if not told:
        raise UsageError(
            f"--judges: none tells whether a request was answered; add "
            f"{judges.EXAMPLES[judges.REFUSAL]} or {judges.EXAMPLES[judges.HARM]}."
        )
    if values.harmless and not measurement.measuring(made, harmless=True):
        raise UsageError(f"--harmless: add a judge of refusal, {judges.EXAMPLES[judges.REFUSAL]}.")
    if not values.model or values.adapter and len(values.adapter) != len(values.model):
        raise UsageError(
            f"--adapter: {len(values.adapter)} for {len(values.model)} models; give one, or "
            "nothing between two commas, for each."
        )
    template_flags.options(values)
    requests = read_requests("prompts", values.prompts, values)
    harmless = read_requests("harmless", values.harmless, values) if values.harmless else []
    targets = targets_of(requests, values.target)
    use_cores(values.batch_size)

    def work():
        began = time.monotonic()
        models, hashes = load_models(values)
        for lm in models.values():
            asked = [(one.source or values.prompts, one) for one in (*requests, *harmless)]
            template_check.check(lm.tokenizer, asked)
        for name in names:
            ATTACKS[name].check_models(list(models.values()))
        devices.announce()
        sizes = {name: values[name].value for name in (*SIZES, "max_new_tokens", "seed", "dtype")}
        described = sizes | {
            "models": list(models),
            "adapters": hashes,
            "prompts": values.prompts,
            "prompts_sha256": answers.hash_of([[r.messages for r in requests], targets]),
            "harmless": values.harmless,
            "harmless_sha256": answers.hash_of([r.messages for r in harmless]),
            "judges": [judge.spec for judge in told],
            "templates_sha256": answers.hash_of(settings.templates),
            "shots_sha256": answers.hash_of([settings.shots, settings.shot_counts]),
            "chat_template": [values.chat_template, values.chat_template_kwargs, values.date],
        }
        path = pathlib.Path(values.output)
        options = measurement.Options(told, values.max_new_tokens, values.batch_size)
        earlier = finished(path, described)
        result = {"attacks": earlier.get("attacks", {}), "harmonic_mean": {}, "over_refusal": None}
        result |= {"judges": described["judges"], "settings": described}
        result["over_refusal"] = earlier.get("over_refusal")
        key = random_streams.key(Purpose.ATTACK, values.seed)
        for name in names:
            if name in result["attacks"]:
                print(f"{name}: as {values.output} has it")
            else:
                attacked = ATTACKS[name].run(
                    list(models.values()), requests, targets, settings=settings, key=key
                )
                result["attacks"][name] = measurement.measure(models, requests, attacked, options)
            shown = result["attacks"]
            result["harmonic_mean"] = {
                one: measurement.harmonic_mean(shown[one]["by_model"]) for one in shown
            }
            run_files.write_json(path, result)
            print(in_words(name, shown[name]), flush=True)
        if harmless and result["over_refusal"] is None:
            refusing = options._replace(judges=measurement.measuring(made, harmless=True))
            result["over_refusal"] = measurement.refusal_of_harmless(models, harmless, refusing)
            run_files.write_json(path, result)
        if harmless and (shown := result["over_refusal"])["refused"] is not None:
            low, high = shown["ci95"]
            print(f"harmless requests: {shown['refused']:.1f}% refused ({low:.1f}-{high:.1f})")
        print(f"output: {values.output}, {time.monotonic() - began:.0f} s")

    multihost.on_first(work, "attacked")


COMMAND = Command(define_flags, main, required=("method", "prompts", "output"))
