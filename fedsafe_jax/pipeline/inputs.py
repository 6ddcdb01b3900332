"""Everything a run reads: model, pools of examples, evaluation sets; checked before training."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fedsafe_jax.cai import constitution, given
from fedsafe_jax.cai.constitution import Constitution, ConstitutionError
from fedsafe_jax.cai.revise import DATA, Record
from fedsafe_jax.cai.schedule import SCHEDULES
from fedsafe_jax.config import asks_for_harm, unsafe_sources
from fedsafe_jax.data import chat, chat_template, overlap, partition, sources, template_check
from fedsafe_jax.data.chat_template import ChatTemplateError
from fedsafe_jax.data.examples import SAFE, UNKNOWN, UNSAFE, Example, SourceError
from fedsafe_jax.evals.task import HELDOUT, EvalSet
from fedsafe_jax.federated import mesh, participation
from fedsafe_jax.filters.kinds import FILTER_KINDS
from fedsafe_jax.filters.pairs import drop_mislabelled
from fedsafe_jax.filters.store import check_folders
from fedsafe_jax.inference.language_model import LanguageModel, load_pretrained, model_folder
from fedsafe_jax.inference.tokenizer import PROBE, load_tokenizer
from fedsafe_jax.models import attention, hub, lora
from fedsafe_jax.pipeline.arms import any_filter, arms_of
from fedsafe_jax.pipeline.evaluation import load_sets
from fedsafe_jax.random_streams import Purpose, generator
from fedsafe_jax.runtime import multihost
from fedsafe_jax.runtime.devices import announce


class Pool(NamedTuple):
    """A pool of examples, by what it is for.

    Attributes:
      title: name in `results.json` and in the report.
      sources: `config -> names of the sources`.
      labels: labels that are kept; None for all.
      drop_mislabelled: leaves out refusals that are labelled unsafe.
      answered: leaves out examples without an answer, which teach nothing but to stop.
    """

    title: str
    sources: Callable[[ConfigDict], Sequence[str]]
    labels: tuple[str, ...] | None = None
    drop_mislabelled: bool = False
    answered: bool = True


GIVEN = "CAI, given revisions"  # title of the records that files give
HARMLESS = (SAFE, UNKNOWN)
# A simulation reads all but `site`: the pairs of a real site, whatever their labels.
POOLS = {
    "site": Pool("client", lambda c: c.safe_sources),
    "safe": Pool("client, safe", lambda c: c.safe_sources, HARMLESS),
    "unsafe": Pool("client, unsafe", unsafe_sources, (UNSAFE,), drop_mislabelled=True),
    "filter_pairs": Pool(
        "filter", lambda c: c.filter.sources, (SAFE, UNSAFE), drop_mislabelled=True
    ),
    "red_team": Pool("CAI red team", lambda c: c.cai.red_team_sources, answered=False),
    "replay": Pool("CAI replay", lambda c: c.cai.benign_sources, HARMLESS),
}
SIMULATION = ("safe", "unsafe", "filter_pairs", "red_team", "replay")


class Asked(NamedTuple):
    """What the config asks the clients of a seed to hold.

    Attributes:
      pairs: pairs of all clients.
      harmful_share: share of them that is harmful, in [0, 1].
    """

    pairs: int
    harmful_share: float


class RunInputs(NamedTuple):
    """Model, pools and evaluation sets of a run.

    Attributes:
      lm: the base model, on this process's devices; generates and evaluates.
      base: its parameters on the devices of all processes, for training.
      mesh: the devices of all processes.
      lora: shape of the global adapter.
      clients: pairs of each client by seed, dealt out from `safe` and `unsafe`.
      asked: what the config asks clients to hold, by seed.
      given: records of Constitutional AI that files give; [] without.
      site, safe, unsafe, filter_pairs, red_team, replay: the pools, [] where not read; see `POOLS`.
      constitution: principles of Constitutional AI.
      evals: the evaluation sets by name.
      counts: examples read, kept and dropped, by the title of the pool.
    """

    lm: LanguageModel
    base: dict
    mesh: Mesh
    lora: lora.LoraConfig
    clients: dict[int, list[list[Example]]]
    asked: dict[int, Asked]
    given: list[Record]
    site: list[Example]
    safe: list[Example]
    unsafe: list[Example]
    filter_pairs: list[Example]
    red_team: list[Example]
    replay: list[Example]
    constitution: Constitution
    evals: dict[str, EvalSet]
    counts: dict


def load_inputs(config: ConfigDict, roles: Sequence[str] = SIMULATION) -> RunInputs:
    """Reads model, data and constitution; drops training prompts that overlap an evaluation set.

    Args:
      config: config of the run.
      roles: which of `POOLS` to read.

    Raises:
      SourceError, TaskError, PartitionError, FilterError, ConstitutionError, ModelError: naming
        what is wrong.
    """
    pools, without_answer = {}, {}
    for role in roles:
        pools[role], without_answer[role] = _read(POOLS[role], config)
    evals, heldout = _load_evals(config, pools)
    near, exact = _evaluated_prompts(evals, heldout)
    counts = {}
    for role, pool in pools.items():
        title = POOLS[role].title
        pools[role], counts[title] = _drop(POOLS[role], pool, near, exact)
        counts[title]["without_answer"] = without_answer[role]
        counts[title]["read"] += without_answer[role]
        if not pools[role] and _needs(role, config):
            raise SourceError(_nothing_left(POOLS[role], config, counts[title]))
    records: list[Record] = []
    if DATA[config.cai.data].given and "replay" in pools:
        records, counts[GIVEN] = _given(config, near, exact)
    clients, asked = {}, {}
    if "safe" in pools:  # dealt out before the model loads, as that may fail
        for seed in config.seeds:
            clients[seed], asked[seed] = deal(config, pools["safe"], pools["unsafe"], seed)
    if any_filter(config):
        check_folders(config.filter.load, config.filter.encoder)
    if FILTER_KINDS[config.filter.kind].needs_model and not config.filter.load:
        hub.read_config(model_folder(config.filter.model), config.dtype)  # wrong before compute
    principles = _load_constitution(config.cai)
    shape = lora.LoraConfig(
        config.lora_rank,
        config.lora_alpha,
        lora.expand_targets(config.lora_targets),
        rank_stabilized=config.lora_rank_stabilized,
        dropout=config.lora_dropout,
    )
    devices = mesh.make_mesh(model_parallel=config.model_parallel)
    hub.read_config(model_folder(config.model), config.dtype)
    check_turns(config, pools, evals)
    announce()  # after what may be wrong, and before the weights, which may take minutes
    lm, base = load_base(config, devices)
    return RunInputs(
        lm=lm,
        base=base,
        mesh=devices,
        lora=shape,
        clients=clients,
        asked=asked,
        given=records,
        constitution=principles,
        evals=evals,
        counts=counts,
        **{role: pools.get(role, []) for role in POOLS},
    )


def _load_evals(
    config: ConfigDict, pools: dict[str, list[Example]]
) -> tuple[dict[str, EvalSet], list[Example]]:
    """Loads the evaluation sets, and the pairs held out: of the safe pool, or of named sources."""
    if config.heldout_sources:
        heldout = _load_all(config.heldout_sources, config.data_dir)
    else:
        own = pools.get("safe", [])
        heldout = [e for e in own if sources.part_of(e.opening) == "heldout"]
    return load_sets(config, heldout), heldout


def read_client_pools(config: ConfigDict) -> tuple[list[Example], list[Example]]:
    """Reads the pools that clients are dealt from, without a model: safe and unsafe pairs.

    Raises:
      SourceError, TaskError: naming what is wrong.
    """
    pools = {role: _read(POOLS[role], config)[0] for role in ("safe", "unsafe")}
    near, exact = _evaluated_prompts(*_load_evals(config, pools))
    safe, unsafe = (_drop(POOLS[role], pool, near, exact)[0] for role, pool in pools.items())
    return safe, unsafe


def _needs(role: str, config: ConfigDict) -> bool:
    """Tells whether a run cannot do without a pool."""
    if role == "unsafe":
        return asks_for_harm(config)
    if DATA[config.cai.data].given:
        if role == "red_team":  # nothing is asked but by a probe
            return SCHEDULES[config.cai.schedule].steps_after_probe is not None
        if role == "replay":
            return config.cai.replay_examples > 0
    return True


def _given(config: ConfigDict, near: list[str], exact: set[str]) -> tuple[list[Record], dict]:
    """Returns the ready-made records that may be trained on, and the counts of the others."""
    everything = given.read(config.cai.records, config.data_dir)
    usable = [record for record in everything if not record.dropped]
    examples = given.examples_of(usable)
    kept, counts = _drop(Pool(GIVEN, lambda c: c.cai.records), examples, near, exact)
    if not kept:
        raise SourceError(f"{GIVEN}: none of {len(everything)} rows is left to train on.")
    places = {id(example) for example in kept}
    left = [r for r, e in zip(usable, examples, strict=True) if id(e) in places]
    blank = sum(record.dropped == given.NO_SAFE_ANSWER for record in everything)
    disputed = len(everything) - len(usable) - blank
    totals = {"read": len(everything), "disputed": disputed, "without_answer": blank}
    return left, counts | totals


def packaged_beside_own(config: ConfigDict) -> list[str]:
    """Names the server's fields that are packaged data beside clients' own data.

    Unlike harmful pairs at clients, these do no harm; they may just not fit.
    """
    if any(":package/" in source for source in config.safe_sources):
        return []
    cai = any(arm.cai for arm in arms_of(config))
    server = (
        ("filter.sources", any_filter(config), config.filter.sources),
        ("cai.red_team_sources", cai, config.cai.red_team_sources),
        ("cai.benign_sources", cai, config.cai.benign_sources),
    )
    return [
        field
        for field, used, names in server
        if used and names and all(":package/" in name for name in names)
    ]


def deal(
    config: ConfigDict, safe: list[Example], unsafe: list[Example], seed: int
) -> tuple[list[list[Example]], Asked]:
    """Deals the pools to the clients of a seed.

    Returns:
      The pairs of each client, and what was asked for: where the pools are too small, clients hold
      fewer pairs with the same harmful share, see `data.partition.partition`.

    Raises:
      PartitionError: the pools cannot be dealt out as the config asks.
    """
    rng = generator(Purpose.DEAL, seed)
    malicious = participation.malicious_clients(seed, config.num_clients, config.attack.clients)
    shares = [
        config.attack.harmful_share if i in malicious else config.harmful_share
        for i in range(config.num_clients)
    ]
    sizes = partition.client_sizes(
        config.num_clients, config.examples_per_client, config.size_sigma, rng
    )
    dealt = partition.partition(
        safe,
        unsafe,
        sizes,
        harmful_shares=shares,
        kind=config.partition,
        rng=rng,
        alpha=config.dirichlet_alpha,
    )
    unsafe_asked = sum(n * share for n, share in zip(sizes, shares, strict=True))
    return dealt, Asked(sum(sizes), unsafe_asked / sum(sizes))


def check_turns(
    config: ConfigDict, pools: dict[str, list[Example]], evals: dict[str, EvalSet]
) -> None:
    """Checks that the model's chat template takes all dialogues, before any compute.

    Roles and their order are what templates refuse, so one dialogue of each order is encoded.

    Raises:
      ModelError: the model has no tokenizer, or no chat template that teaches where to stop.
      SourceError: the template refuses a dialogue, also with its turns merged.
    """
    tokenizer = load_tokenizer(
        model_folder(config.model),
        config.chat_template,
        config.chat_template_kwargs.to_dict(),
        date=config.date,
    )
    if chat_template.of(tokenizer).end_token is None:
        chat.encode(tokenizer, PROBE, "Hello.", config.seq_len)  # raises, and says why
    orders = {}
    for role, pool in pools.items():
        for example in pool:
            order = tuple(speaker for speaker, _ in example.messages)
            orders.setdefault(order, (POOLS[role].title, example))
    for title, example in orders.values():
        try:
            chat.encode(tokenizer, example.messages, example.response, config.seq_len)
        except ChatTemplateError as error:
            raise refused(example, error, title) from error
    for name, one in evals.items():
        template_check.check(
            tokenizer, ((f"task '{name}', {one.source}", item) for item in one.items)
        )


def load_base(config: ConfigDict, devices: Mesh) -> tuple[LanguageModel, dict]:
    """Loads the base model: `(lm on this process's devices, parameters on those of all)`.

    Raises:
      ModelError: the folder is damaged, or the config's attention cannot be computed.
    """
    shape = hub.read_config(model_folder(config.model), config.dtype)
    shape = dataclasses.replace(shape, attention=config.attention, mesh=devices)
    # Before the weights are read, and not while the first round is traced.
    attention.choose_backend(shape, config.seq_len, config.seq_len)
    lm = load_pretrained(
        config.model,
        config.dtype,
        config.quantization,
        mesh=devices,
        chat_template=config.chat_template,
        chat_template_kwargs=config.chat_template_kwargs.to_dict(),
        date=config.date,
    )
    own = dataclasses.replace(
        lm.config,
        remat=config.remat,
        attention=config.attention,
        mesh=multihost.local_mesh(devices),
    )
    local = dataclasses.replace(lm, config=own, params=multihost.local(lm.params, devices))
    return local, lm.params


def refused(example: Example, error: ChatTemplateError, title: str) -> SourceError:
    """Returns the error of an example whose turns a chat template does not take."""
    return SourceError(f"{title} data, source {example.source}, '{example.prompt[:60]}': {error}")


def _load_all(names: Sequence[str], data_dir: str) -> list[Example]:
    return [e for name in names for e in sources.load(name, data_dir)]


def _read(pool: Pool, config: ConfigDict) -> tuple[list[Example], int]:
    """Returns the examples of a pool, and how many others were left out for a blank answer.

    Raises:
      SourceError: a source cannot be read, or none of its examples has the answer that is needed.
    """

    def labelled(examples: list[Example]) -> list[Example]:
        return [e for e in examples if pool.labels is None or e.label in pool.labels]

    if not pool.answered:
        return labelled(_load_all(pool.sources(config), config.data_dir)), 0
    kept, left_out = [], 0
    for name in pool.sources(config):
        answered, blank = sources.load_answered(name, config.data_dir)
        kept += labelled(answered)
        if count := len(labelled(blank)):
            left_out += count
            logging.warning(
                "%s data: %d examples of %s have no answer and are left out.",
                pool.title,
                count,
                name,
            )
    return kept, left_out


def _nothing_left(pool: Pool, config: ConfigDict, counts: dict[str, int]) -> str:
    """Says why no example of a pool is left, and what would leave some."""
    why = {
        "near an evaluation prompt": counts["dropped_near_evaluation"],
        "held out for evaluation": counts["dropped_heldout"],
        "labelled unsafe though they begin as a refusal": counts["disputed"],
        "without an answer": counts["without_answer"],
    }
    reasons = ", ".join(f"{n} {reason}" for reason, n in why.items() if n)
    labels = "" if pool.labels is None else f" with the label {' or '.join(pool.labels)}"
    return (
        f"{pool.title} data: no example is left of {counts['read']} read{labels}"
        f"{': ' + reasons if reasons else ''}. The sources are "
        f"{', '.join(pool.sources(config))}; add data of another origin than the evaluation's."
    )


def _evaluated_prompts(
    evals: dict[str, EvalSet], heldout: list[Example]
) -> tuple[list[str], set[str]]:
    """Returns prompts that training must not come near, and prompts that it must not copy.

    Held-out pairs come from the clients' distribution: templates make near-duplicates unavoidable
    there, so only dialogues with the same opening, normalised, are dropped. All that is held out
    is, also beyond `eval.max_heldout`: a later evaluation of `#heldout` may ask it.
    """
    near, exact = [], set()
    for one in evals.values():
        if one.source == HELDOUT:  # pairs: a conversation is known by how it begins
            exact |= {overlap.normalise(e.opening) for e in heldout}
        else:
            near += one.task.prompts(one.items)
    return near, exact - {""}


def _drop(pool: Pool, examples: list[Example], near: list[str], exact: set[str]):
    """Returns the examples of a pool that may be trained on, and the counts of the others.

    Args:
      pool: description of the pool.
      examples: examples of the pool.
      near, exact: see `_evaluated_prompts`.
    """
    left, disputed = drop_mislabelled(examples) if pool.drop_mislabelled else (examples, 0)
    kept, dropped = overlap.drop_overlap(left, near)
    kept_exact = [e for e in kept if overlap.normalise(e.opening) not in exact]
    return kept_exact, {
        "read": len(examples),
        "disputed": disputed,
        "dropped_near_evaluation": dropped,
        "dropped_heldout": len(kept) - len(kept_exact),
        "kept": len(kept_exact),
    }


def _load_constitution(c: ConfigDict) -> Constitution:
    loaded = constitution.load(c.constitution, c.few_shot_file)
    if c.few_shots > len(loaded.few_shots):
        raise ConstitutionError(
            f"cai.few_shots={c.few_shots}: {c.constitution} has {len(loaded.few_shots)}; lower it, "
            "or give cai.few_shot_file."
        )
    return loaded
