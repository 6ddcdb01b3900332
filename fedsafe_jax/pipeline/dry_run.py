"""`--config.dry_run`: what a run would load, hold and compute, without any of it."""

import dataclasses
from collections.abc import Sequence

import jax
from etils import epath
from ml_collections import ConfigDict

from fedsafe_jax.cai.revise import DATA, parse_check
from fedsafe_jax.config import default_config, unsafe_sources
from fedsafe_jax.data import sources
from fedsafe_jax.data.examples import UNSAFE, SourceError
from fedsafe_jax.data.hub_rows import is_on_hub
from fedsafe_jax.evals.task import HELDOUT, TaskError
from fedsafe_jax.filters.kinds import FILTER_KINDS
from fedsafe_jax.models import hub, lora
from fedsafe_jax.models.decoder import DecoderConfig, num_parameters, param_shapes
from fedsafe_jax.models.known import KNOWN
from fedsafe_jax.models.quantize import num_bytes, quantize_params
from fedsafe_jax.pipeline import replay
from fedsafe_jax.pipeline.arms import any_filter, arms_of
from fedsafe_jax.pipeline.evaluation import chosen_sets
from fedsafe_jax.pipeline.inputs import deal
from fedsafe_jax.pipeline.pools import read_client_pools
from fedsafe_jax.pipeline.read_files import sources_of
from fedsafe_jax.pipeline.refusal_probe import PROBE_TOKENS
from fedsafe_jax.runtime import run_date


def _decoder_config(name: str, dtype: str) -> DecoderConfig:
    if name in KNOWN:
        return dataclasses.replace(KNOWN[name], dtype=dtype)
    from fedsafe_jax.models.base_model import model_folder

    return hub.read_config(model_folder(name), dtype)


def _adapter_size(shape: DecoderConfig, rank: int, targets: Sequence[str]) -> int:
    """Returns the number of parameters of an adapter."""
    per_layer = sum(sum(shape.projection_shape(name)) for name in targets)
    return shape.num_layers * rank * per_layer


def _activation_bytes(shape: DecoderConfig, tokens: int, width: int) -> int:
    """Returns an upper bound of the bytes that a step's backward pass keeps."""
    return tokens * width * (shape.num_layers * shape.hidden_size + 3 * shape.intermediate_size)


def _guard(config: ConfigDict) -> tuple[float, str]:
    """Returns the bytes of a guard on one device, while it is used, and what the plan says of it.

    It stands beside the base while it trains and scores, and whenever it judges revisions.
    """
    f = config.filter
    if not FILTER_KINDS[f.kind].needs_model or not any_filter(config):
        return 0.0, "none"
    if f.load:
        return 0.0, f"read from {f.load}, NOT COUNTED in the total"
    shape = _decoder_config(f.model, config.dtype)
    held, width = _base_bytes(shape, config), 2 if config.dtype == "bfloat16" else 4
    adapter = 4 * _adapter_size(shape, f.lora_rank, lora.expand_targets(config.lora_targets))
    working = _activation_bytes(shape, f.batch_size * f.max_length, width)
    used = adapter * (4 if f.epochs else 1) + working
    said = "with its adapter's training" if f.epochs else "untrained"
    text = (
        f"{f.model}: {num_parameters(shape):,} parameters, {_size(held)}, and {said} "
        f"<= {_size(used)}; beside the base while it trains and scores"
    )
    return held + used, text + (
        ", and judges revisions" if parse_check(config.cai.check).judge else ""
    )


def _held(config: ConfigDict) -> str:
    """Returns what the clients of the first seed would hold, as far as the data are here.

    Raises:
      PartitionError: they cannot hold what is asked for.
    """
    asked = f"{config.harmful_share:.1%} asked"
    try:
        if any(_is_on_hub(source, config) for source in sources_of(config)):
            return f"{asked}; the data are read from the Hub when it runs"
        pools = read_client_pools(config)
    except (SourceError, TaskError) as error:
        return f"{asked}; not known: {error}"
    dealt, wanted = deal(config, *pools, config.seeds[0])
    unsafe = sum(e.label == UNSAFE for examples in dealt for e in examples)
    pairs = sum(map(len, dealt))
    return (
        f"{unsafe / pairs:.1%} of {pairs:,} pairs, {wanted.harmful_share:.1%} of {wanted.pairs:,} "
        f"asked; there are {len(pools[0]):,} safe and {len(pools[1]):,} unsafe ones"
    )


def _is_on_hub(source: str, config: ConfigDict) -> bool:
    try:
        location = sources.parse_source(source)[1]
    except SourceError:  # a task's own form
        location = source
    return is_on_hub(location, config.data_dir)


def _base_bytes(shape: DecoderConfig, config) -> float:
    """Returns the bytes of the base model on one device."""

    def loaded(params):
        params = jax.tree.map(lambda x: x.astype(config.dtype), params)
        return quantize_params(params, config.quantization) if config.quantization else params

    return num_bytes(jax.eval_shape(loaded, param_shapes(shape))) / config.model_parallel


def _cai_data(config: ConfigDict) -> str:
    c = config.cai
    if DATA[c.data].given:
        return f"revisions of {', '.join(c.records)}, nothing generated"
    return (
        f"{c.red_team_prompts} + {c.benign_prompts} prompts, {1 + 2 * c.revision_rounds} "
        f"generations of <= {c.max_new_tokens} tokens"
    )


def _own_answers(config: ConfigDict) -> str:
    """Returns how many harmless requests the base would answer; "" for none."""
    c = config.cai
    if not c.harmless_sources or not any(arm.cai for arm in arms_of(config)):
        return ""
    if any(_is_on_hub(source, config) for source in c.harmless_sources):
        return "the base answers harmless requests that are read from the Hub when it runs"
    try:
        asked = sum(len(sources.load(name, config.data_dir)) for name in c.harmless_sources)
    except SourceError as error:
        return f"not known: {error}"
    return f"the base answers <= {asked:,} harmless requests once, by <= {c.max_new_tokens} tokens"


def _attribution(config: ConfigDict) -> str:
    """Returns what attribution asks in a round; "" where it is off."""
    if not (prompts := config.federated.attribution):
        return ""
    return (
        f"a round: models of {config.clients_per_round} clients and the global one answer <= "
        f"{prompts} red-team prompts by <= {PROBE_TOKENS} tokens"
    )


def _unlearning(config: ConfigDict) -> str:
    """Returns the clients left out, and whose rounds are taken over; "" without any.

    Raises:
      WorkdirError: `federated.replay` is not that run.
    """
    f = config.federated
    if not f.exclude:
        return ""
    said = f"without client(s) {', '.join(map(str, f.exclude))}"
    if not f.replay:
        return f"{said}; all rounds are repeated"
    real = config.copy_and_resolve_references()
    real.dry_run, real.date = False, run_date.date_of(epath.Path(f.replay), config.date)
    replay.check(real)
    return f"{said}; rounds before one of them was drawn are taken from {f.replay}"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def _changed(values: dict, defaults: dict, prefix: str = "") -> list[str]:
    """Returns the names of the fields that are not the default, such as "cai.steps"."""
    names = []
    for name, value in sorted(values.items()):
        if isinstance(value, dict):
            names += _changed(value, defaults.get(name, {}), f"{prefix}{name}.")
        elif value != defaults.get(name):
            names.append(prefix + name)
    return names


def describe(config: ConfigDict) -> str:
    """Returns the plan as text: shapes, memory a device, tokens, and what would be loaded.

    Memory is arithmetic over the arrays named, not a measurement; activations are an upper bound
    that counts one layer's inputs a layer, and the widest intermediate once.
    """
    shape = _decoder_config(config.model, config.dtype)
    devices, c = jax.device_count(), config.eval
    width = 2 if config.dtype == "bfloat16" else 4
    targets = lora.expand_targets(config.lora_targets)
    per_adapter = _adapter_size(shape, config.lora_rank, targets)
    clients_here = -(-config.clients_per_round // max(devices // config.model_parallel, 1))
    kind = f" in {config.quantization}" if config.quantization else ""
    parallel = min(config.clients_in_parallel or clients_here, clients_here)
    rows = config.batch_size  # at most; packing needs fewer
    tokens_a_step = parallel * rows * config.seq_len
    activations = _activation_bytes(shape, tokens_a_step, width)
    trained = [arm.name for arm in arms_of(config) if arm.trains]
    sets = chosen_sets(config)
    runs = len(config.seeds) * len(config.algorithms) * len(trained)
    examples = config.rounds * config.clients_per_round * config.local_steps * config.batch_size
    changed = _changed(config.to_dict() | {"dry_run": False}, default_config().to_dict())
    base = _base_bytes(shape, config)
    guard, guard_text = _guard(config)
    # Clients do not train while a guard is here.
    total = base + max(per_adapter * 4 * (4 * parallel + 2) + activations, guard)
    loaded = [
        *(config.model, config.filter.model, config.filter.encoder, config.filter.load),
        *(config.filter.instruction, config.eval.encoder),
        *(*config.safe_sources, *unsafe_sources(config), *config.heldout_sources),
        *config.cai.records,
        *(config.cai.constitution, config.cai.few_shot_file),
        *(*config.filter.sources, *config.cai.red_team_sources, *config.cai.benign_sources),
        *config.cai.harmless_sources,
        *(one.source for one in sets.values() if one.source != HELDOUT),
    ]
    lines = [
        f"model            {config.model}: {num_parameters(shape):,} parameters, {config.dtype}",
        f"base on a device {_size(base)}{kind}, frozen, shared by all clients",
        f"adapter          rank {config.lora_rank} on {', '.join(targets)}: {per_adapter:,} "
        f"parameters, {_size(4 * per_adapter)} in float32",
        f"batch            clients {config.clients_per_round} x steps {config.local_steps} x "
        f"rows <= {rows} x tokens {config.seq_len}",
        f"clients at once  {parallel} on each of {devices} device(s)",
        f"client memory    {_size(per_adapter * 4 * 4 * parallel)} "
        "(adapter, gradient, two moments)",
        f"activations      <= {_size(activations)}",
        f"guard            {guard_text}",
        f"total a device   about {_size(total)}, estimated from the arrays' sizes; compiled sizes:",
        "                 fedsafe compile --config=FILE --target=h100 (or v5e:2x2, ...)",
        f"runs             {runs} ({len(config.seeds)} seed(s), {', '.join(config.algorithms)}, "
        f"{', '.join(trained)}) and the base model",
        f"a run            {config.rounds} rounds, {examples:,} client examples, "
        f"<= {examples * config.seq_len:,} tokens",
        f"clients hold     harmful share {_held(config)}",
        f"CAI a round      {config.cai.schedule}: {_cai_data(config)}, {config.cai.steps} steps of "
        f"{' + '.join(config.cai.losses)}",
        *([f"own answers      {own}"] if (own := _own_answers(config)) else []),
        *([f"unlearning       {gone}"] if (gone := _unlearning(config)) else []),
        *([f"attribution      {asked}"] if (asked := _attribution(config)) else []),
        f"evaluation       {', '.join(sets)}, {c.max_prompts or 'all'} prompts each; answers of <= "
        f"{c.max_new_tokens} tokens to {', '.join(n for n, s in sets.items() if s.task.generates)}",
        "would load       " + "\n                 ".join(dict.fromkeys(filter(None, loaded))),
        f"not the default  {', '.join(changed)}",
    ]  # fmt: skip
    return "\n".join(lines)
