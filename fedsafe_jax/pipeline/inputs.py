"""Everything a run reads, loaded and checked before any training."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fedsafe_jax.cai import constitution as constitution_lib
from fedsafe_jax.data import chat, overlap, sources
from fedsafe_jax.data.sources import SAFE, UNSAFE, Choice, Example
from fedsafe_jax.federated import mesh
from fedsafe_jax.inference.language_model import LanguageModel, load_pretrained, model_folder
from fedsafe_jax.models import hub, lora
from fedsafe_jax.pipeline import rounds
from fedsafe_jax.pipeline.filtering import check_folders, undisputed
from fedsafe_jax.runtime import multihost

HELDOUT_SEED = 2025  # the evaluation sets are the same for every seed of the run


class EvalSets(NamedTuple):
    """What every arm is evaluated on."""

    advbench: list[str]
    over_refusal: list[str]
    hhh: list[Choice]
    heldout: list[Example]


class World(NamedTuple):
    """Model, pools and evaluation sets of a run."""

    lm: LanguageModel  # of this process, which generates and evaluates with it
    base: dict  # its parameters on the devices of all processes, to train on
    mesh: Mesh  # of these devices
    lora: lora.LoraConfig
    safe: list[Example]
    unsafe: list[Example]
    filter_pairs: list[Example]
    red_team: list[Example]
    replay: list[Example]
    constitution: constitution_lib.Constitution
    evals: EvalSets
    counts: dict  # examples read, kept and dropped, by role


def _pool(names, data_dir, labels=None) -> list[Example]:
    examples = [e for name in names for e in sources.load(name, data_dir)]
    return [e for e in examples if labels is None or e.label in labels]


def limit(items: list, count: int) -> list:
    """At most `count` items (0: all), drawn by a fixed seed and kept in order."""
    if not count or len(items) <= count:
        return items
    order = np.random.default_rng(HELDOUT_SEED).permutation(len(items))[:count]
    return [items[i] for i in sorted(order)]


def load_eval_sets(c: ConfigDict, data_dir: str, heldout: list[Example]) -> EvalSets:
    """The evaluation sets, each cut to `eval.max_prompts`."""
    return EvalSets(
        limit([e.prompt for e in sources.load(c.advbench, data_dir)], c.max_prompts),
        limit([e.prompt for e in sources.load(c.over_refusal, data_dir)], c.max_prompts),
        limit(sources.load_choices(c.hhh, data_dir), c.max_prompts),
        limit(heldout, c.max_heldout),
    )


ROLES = ("client, safe", "client, unsafe", "filter", "CAI red team", "CAI replay")


def load(config: ConfigDict, read: Sequence[str] = ROLES) -> World:
    """Reads model, data and constitution; drops training prompts that overlap an evaluation set.

    Args:
      config: of the run.
      read: which data; a simulation reads all. A site has "client" pairs of its own, whatever their
        labels, which `World.safe` then holds.

    Raises:
      ConfigError, SourceError, PartitionError, ConstitutionError, ModelError: naming what is wrong.
    """
    harmless = (SAFE, sources.UNKNOWN)
    known = {
        "client": (config.safe_sources, None),
        "client, safe": (config.safe_sources, harmless),
        "client, unsafe": (config.unsafe_sources, (UNSAFE,)),
        "filter": (config.filter.sources, (SAFE, UNSAFE)),
        "CAI red team": (config.cai.red_team_sources, None),
        "CAI replay": (config.cai.benign_sources, harmless),
    }
    roles = {role: _pool(known[role][0], config.data_dir, known[role][1]) for role in read}
    if config.heldout_sources:
        heldout = _pool(config.heldout_sources, config.data_dir)
    else:
        own = roles.get("client, safe", [])
        heldout = [e for e in own if sources.part_of(e.prompt) == "heldout"]
    evals = load_eval_sets(config.eval, config.data_dir, [e for e in heldout if e.response])
    forbidden = [*evals.advbench, *evals.over_refusal]
    forbidden += [choice.messages[-1][1] for choice in evals.hhh]
    exact = {overlap.normalise(e.prompt) for e in evals.heldout}
    counts = {}
    for role, pool in roles.items():
        disputed = 0
        read = len(pool)
        if role in ("client, unsafe", "filter"):
            pool, disputed = undisputed(pool)
        if role == "client, unsafe":
            pool = [e for e in pool if e.label == UNSAFE]
        kept, near = overlap.drop_overlap(pool, forbidden)
        # Held-out pairs come from the clients' distribution: templates make near-duplicates
        # unavoidable there, so only the same prompt is dropped.
        kept_exact = [e for e in kept if overlap.normalise(e.prompt) not in exact]
        counts[role] = {
            "read": read,
            "disputed": disputed,
            "dropped_near_evaluation": near,
            "dropped_heldout": len(kept) - len(kept_exact),
            "kept": len(kept_exact),
        }
        roles[role] = kept_exact
        if not kept_exact:
            raise sources.SourceError(f"{role} data: no example is left of {read} read.")
    # The split itself is checked here, before the model loads.
    if "client, safe" in roles:
        for seed in config.seeds:
            rounds.split(config, roles["client, safe"], roles["client, unsafe"], seed)
    if any("filter" in arm for arm in config.arms):
        check_folders(config.filter)
    if config.filter.kind in ("guard", "guardian") and not config.filter.load:
        hub.read_config(model_folder(config.filter.model), config.dtype)  # wrong before compute
    constitution = constitution_lib.load(config.cai.constitution, config.cai.few_shot_file)
    if config.cai.few_shots > len(constitution.few_shots):
        raise constitution_lib.ConstitutionError(
            f"cai.few_shots={config.cai.few_shots}: {config.cai.constitution} has "
            f"{len(constitution.few_shots)}; lower it, or give cai.few_shot_file."
        )
    targets = lora.expand_targets(config.lora_targets)
    lora_config = lora.LoraConfig(
        config.lora_rank, config.lora_alpha, targets, config.lora_rank_stabilized
    )
    devices = mesh.make_mesh(model_parallel=config.model_parallel)
    lm = load_pretrained(config.model, config.dtype, config.quantization, devices)
    lm.lora_scale = lora_config.scale
    lm.config = dataclasses.replace(lm.config, remat=config.remat)
    base = lm.params
    lm.params, lm.mesh = multihost.local(base, devices), multihost.local_mesh(devices)
    return World(
        lm,
        base,
        devices,
        lora_config,
        roles.get("client, safe", roles.get("client", [])),
        *(roles.get(role, []) for role in ROLES[1:]),
        constitution,
        evals,
        counts,
    )


def encode_all(
    world: World, examples: list[Example], seq_len: int
) -> tuple[list[chat.Encoded], int]:
    """Encodes (prompt, response) dialogues.

    Returns:
      `(encoded, lost)`: a dialogue whose prompt alone fills `seq_len` has nothing to learn, and is
      lost.
    """
    encoded = [chat.encode(world.lm.tokenizer, e.messages, e.response, seq_len) for e in examples]
    kept = [e for e in encoded if e is not None]
    return kept, len(encoded) - len(kept)
