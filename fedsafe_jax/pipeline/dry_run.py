"""`--config.dry_run`: what a run would load, hold and compute, without any of it."""

import dataclasses

import jax
from ml_collections import ConfigDict

from fedsafe_jax.config import default_config
from fedsafe_jax.evals.task import HELDOUT
from fedsafe_jax.models import hub, lora
from fedsafe_jax.models.decoder import DecoderConfig, num_parameters, param_shapes
from fedsafe_jax.models.known import KNOWN
from fedsafe_jax.models.quantize import num_bytes, quantize_params
from fedsafe_jax.pipeline.arms import arms_of
from fedsafe_jax.pipeline.evaluation import chosen_sets


def _decoder_config(config) -> DecoderConfig:
    if config.model in KNOWN:
        return dataclasses.replace(KNOWN[config.model], dtype=config.dtype)
    from fedsafe_jax.inference.language_model import model_folder

    return hub.read_config(model_folder(config.model), config.dtype)


def _base_bytes(shape: DecoderConfig, config) -> float:
    """Returns the bytes of the base model on one device."""

    def loaded(params):
        params = jax.tree.map(lambda x: x.astype(config.dtype), params)
        return quantize_params(params, config.quantization) if config.quantization else params

    return num_bytes(jax.eval_shape(loaded, param_shapes(shape))) / config.model_parallel


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
    shape = _decoder_config(config)
    devices, c = jax.device_count(), config.eval
    width = 2 if config.dtype == "bfloat16" else 4
    targets = lora.expand_targets(config.lora_targets)
    per_adapter = shape.num_layers * config.lora_rank * sum(
        sum(shape.projection_shape(name)) for name in targets
    )  # fmt: skip
    clients_here = -(-config.clients_per_round // max(devices // config.model_parallel, 1))
    kind = f" in {config.quantization}" if config.quantization else ""
    parallel = min(config.clients_in_parallel or clients_here, clients_here)
    rows = config.batch_size  # at most; packing needs fewer
    tokens_a_step = parallel * rows * config.seq_len
    activations = tokens_a_step * width * (
        shape.num_layers * shape.hidden_size + 3 * shape.intermediate_size
    )  # fmt: skip
    trained = [arm.name for arm in arms_of(config) if arm.trains]
    sets = chosen_sets(config)
    runs = len(config.seeds) * len(config.algorithms) * len(trained)
    examples = config.rounds * config.clients_per_round * config.local_steps * config.batch_size
    changed = _changed(config.to_dict() | {"dry_run": False}, default_config().to_dict())
    base = _base_bytes(shape, config)
    total = per_adapter * 4 * (4 * parallel + 2) + base + activations
    loaded = [
        *(config.model, config.filter.model, config.filter.encoder, config.filter.load),
        *(*config.safe_sources, *config.unsafe_sources, *config.heldout_sources),
        *(config.cai.constitution, config.cai.few_shot_file),
        *(*config.filter.sources, *config.cai.red_team_sources, *config.cai.benign_sources),
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
        f"total a device   about {_size(total)}, estimated from the arrays' sizes; compiled sizes:",
        "                 fedsafe compile --config=FILE --target=h100 (or v5e:2x2, ...)",
        f"runs             {runs} ({len(config.seeds)} seed(s), {', '.join(config.algorithms)}, "
        f"{', '.join(trained)}) and the base model",
        f"a run            {config.rounds} rounds, {examples:,} client examples, "
        f"<= {examples * config.seq_len:,} tokens",
        f"CAI a round      {config.cai.schedule}: {config.cai.red_team_prompts} + "
        f"{config.cai.benign_prompts} prompts, {1 + 2 * config.cai.revision_rounds} generations of "
        f"<= {config.cai.max_new_tokens} tokens, {config.cai.steps} steps of "
        f"{' + '.join(config.cai.losses)}",
        f"evaluation       {', '.join(sets)}, {c.max_prompts or 'all'} prompts each; answers of <= "
        f"{c.max_new_tokens} tokens to {', '.join(n for n, s in sets.items() if s.task.generates)}",
        "would load       " + "\n                 ".join(dict.fromkeys(filter(None, loaded))),
        f"not the default  {', '.join(changed)}",
    ]  # fmt: skip
    return "\n".join(lines)
