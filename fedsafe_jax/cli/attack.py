"""Attacks a model to measure its defence: how often it answers what it refuses when asked directly.

    fedsafe attack --model=FOLDER --method=gcg,prefill --prompts=SOURCE --output=FILE.json

It is a tool for research on defences: the model is the user's own, results are rates. Prompts are a
source, READER:LOCATION, whose answers are the targets, or a file of prompts. Methods that are
finished are in the output at once, and the same command goes on behind them. Several models, with
one adapter or nothing for each, are asked the same prompts. With `--decoding` or `--guardian` they
answer under guards; what searches for a prompt still reads the model itself.
"""

import functools
import json
import pathlib
import time

from absl import flags

from fedsafe_jax import random_streams, whole_files
from fedsafe_jax.attacks import ATTACKS, Settings, measurement
from fedsafe_jax.cli import attack_flags, guard_flags, judge_flags, template_flags
from fedsafe_jax.cli.attack_flags import methods_of, read_requests, targets_of
from fedsafe_jax.cli.command import Command, UsageError, check_file
from fedsafe_jax.data import chat_template, template_check
from fedsafe_jax.evals import answers, judges
from fedsafe_jax.inference.language_model import LanguageModel
from fedsafe_jax.pipeline.evaluation import guarding
from fedsafe_jax.random_streams import Purpose


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
    """Returns a line on a method: its attack success with interval, queries and tokens; of one that
    changes models its success by step."""
    if shown["asr"] is None:
        return f"{name}: n/a"
    low, high = shown["ci95"]
    loss = ", loss {:.3f} to {:.3f}".format(*shown["loss"]) if "loss" in shown else ""
    steps = [f"{one['step']}: {_percent(one['asr'])}" for one in shown.get("by_step", ())]
    by_step = f", by step {', '.join(steps)}" if steps else ""
    return (
        f"{name}: attack success {shown['asr']:.1f}% ({low:.1f}-{high:.1f}) of {shown['n']}, "
        f"{shown['queries']:.0f} queries a request, {shown['tokens']:.0f} tokens a prompt"
        f"{loss}{by_step}"
    )


def _percent(rate: float | None) -> str:
    return "n/a" if rate is None else f"{rate:.1f}%"


def describe(values: flags.FlagValues, settings: Settings) -> dict:
    """Returns everything that the figures depend on beside models, requests and judges."""
    sizes = [name for name in attack_flags.SIZES if name != "batch_size"]
    described = {name: values[name].value for name in (*sizes, "seed", "dtype", "finetune_rate")}
    trained_on = [
        [[one.messages, one.response] for one in pairs]
        for pairs in (settings.pairs, settings.benign_pairs)
    ]
    return described | {
        "templates_sha256": answers.hash_of(settings.templates),
        "shots_sha256": answers.hash_of([settings.shots, settings.shot_counts]),
        "attacker": values.attacker,
        "attacker_prompt_sha256": answers.hash_of([settings.attacker_prompt]),
        "pairs_sha256": answers.hash_of(trained_on),
        "finetune_steps": list(settings.finetune_steps),
        "chat_template": [values.chat_template, values.chat_template_kwargs, values.date],
    }


def main(values: flags.FlagValues) -> None:
    """Attacks by every method, and writes the rates after each."""
    from fedsafe_jax import load_pretrained
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
    guards = guard_flags.spec(values, values.guard)
    requests = read_requests("prompts", values.prompts, values)
    harmless = read_requests("harmless", values.harmless, values) if values.harmless else []
    targets = targets_of(requests, values.target)
    scores = tuple(map(measurement.scoring, told))
    settings = settings._replace(score=scores[0], scores=scores, harmless=tuple(harmless))
    for name in names:
        ATTACKS[name].check_requests(settings, requests)
    use_cores(values.batch_size)

    def work():
        began = time.monotonic()
        models, hashes = load_models(values)
        if guards.label:
            load_model = functools.partial(load_pretrained, dtype=values.dtype)
            guarded = guarding(guards, load_model)
            models = {name: guarded(lm) for name, lm in models.items()}
        for lm in models.values():
            asked = [(one.source or values.prompts, one) for one in (*requests, *harmless)]
            template_check.check(lm.tokenizer, asked)
        for name in names:
            ATTACKS[name].check_models(list(models.values()))
        devices.announce()
        described = describe(values, settings) | {
            "models": list(models),
            "adapters": hashes,
            "prompts": values.prompts,
            "prompts_sha256": answers.hash_of([[r.messages for r in requests], targets]),
            "guards": guards._asdict(),
            "harmless": values.harmless,
            "harmless_sha256": answers.hash_of([r.messages for r in harmless]),
            "judges": [judge.spec for judge in told],
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
                result["attacks"][name] = measurement.measure(
                    models, requests, attacked, options=options, harmless=harmless
                )
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


COMMAND = Command(attack_flags.define, main, required=("method", "prompts", "output"))
