"""Everything a run reads: model, pools of examples, evaluation sets; checked before training."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from jax.sharding import Mesh
from ml_collections import ConfigDict

from fedsafe_jax.cai import constitution
from fedsafe_jax.cai.constitution import Constitution, ConstitutionError
from fedsafe_jax.cai.revise import Record
from fedsafe_jax.data import chat, chat_template, partition, template_check
from fedsafe_jax.data.chat_template import ChatTemplateError
from fedsafe_jax.data.examples import Example, SourceError
from fedsafe_jax.data.poisoning import POISONS
from fedsafe_jax.evals import sentence_vectors
from fedsafe_jax.evals.task import EvalSet
from fedsafe_jax.federated import mesh, participation
from fedsafe_jax.filters import rewriting
from fedsafe_jax.filters.kinds import FILTER_KINDS
from fedsafe_jax.filters.store import check_folders
from fedsafe_jax.inference.language_model import LanguageModel
from fedsafe_jax.inference.pretrained import load_pretrained
from fedsafe_jax.inference.tokenizer import PROBE, load_tokenizer
from fedsafe_jax.models import attention, hub, lora
from fedsafe_jax.models.base_model import model_folder
from fedsafe_jax.pipeline.arms import any_filter, arms_of
from fedsafe_jax.pipeline.pools import POOLS, read_pools
from fedsafe_jax.pipeline.safe_lora_step import Alignment
from fedsafe_jax.random_streams import Purpose, generator
from fedsafe_jax.runtime import multihost
from fedsafe_jax.runtime.devices import announce

SIMULATION = ("safe", "unsafe", "filter_pairs", "red_team", "replay", "harmless")


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
      site, safe, unsafe, filter_pairs, red_team, replay, harmless: the pools of `pools.POOLS`; []
        for none.
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
    harmless: list[Example]
    constitution: Constitution
    evals: dict[str, EvalSet]
    counts: dict


def load_inputs(config: ConfigDict, roles: Sequence[str] = SIMULATION) -> RunInputs:
    """Reads model, data and constitution; drops training prompts that overlap an evaluation set.

    Args:
      config: config of the run.
      roles: which of `pools.POOLS` to read.

    Raises:
      SourceError, TaskError, PartitionError, FilterError, ConstitutionError, ModelError: naming
        what is wrong.
    """
    read = read_pools(config, roles)
    pools = read.examples
    clients, asked = {}, {}
    if "safe" in pools:  # dealt out before the model loads, as that may fail
        for seed in config.seeds:
            clients[seed], asked[seed] = deal(config, pools["safe"], pools["unsafe"], seed)
    if any_filter(config):
        check_folders(config.filter.load, config.filter.encoder)
        rewriting.load_instruction(config.filter.instruction)
    if config.eval.encoder:
        sentence_vectors.check(config.eval.encoder)
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
    if config.federated.unaligned:
        Alignment(config)  # wrong before compute
    check_turns(config, pools, read.evals)
    announce()  # after what may be wrong, and before the weights, which may take minutes
    lm, base = load_base(config, devices)
    return RunInputs(
        lm=lm,
        base=base,
        mesh=devices,
        lora=shape,
        clients=clients,
        asked=asked,
        given=read.given,
        constitution=principles,
        evals=read.evals,
        counts=read.counts,
        **{role: pools.get(role, []) for role in POOLS},
    )


def packaged_beside_own(config: ConfigDict) -> list[str]:
    """Names the server's fields that are packaged data beside clients' own data.

    Unlike harmful pairs at clients, these do no harm; they may just not fit.
    """
    if any(":package/" in source for source in config.safe_sources):
        return []
    cai = any(arm.cai for arm in arms_of(config))
    server = (
        ("filter.sources", any_filter(config), config.filter.sources),
        (
            "cai.red_team_sources",
            cai or config.federated.attribution > 0,
            config.cai.red_team_sources,
        ),
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
    poison = POISONS[config.attack.data]
    planted = malicious if poison.harmful else ()
    shares = [
        config.attack.harmful_share if i in planted else config.harmful_share
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
    if poison.change is not None:
        for i in malicious:
            own = generator(Purpose.POISON, seed, i)
            dealt[i] = poison.change(
                dealt[i], config.attack.harmful_share, config.attack.trigger, rng=own
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


def _load_constitution(c: ConfigDict) -> Constitution:
    loaded = constitution.load(c.constitution, c.few_shot_file)
    if c.few_shots > len(loaded.few_shots):
        raise ConstitutionError(
            f"cai.few_shots={c.few_shots}: {c.constitution} has {len(loaded.few_shots)}; lower it, "
            "or give cai.few_shot_file."
        )
    if c.replace_dropped and not loaded.refusals:
        raise ConstitutionError(
            f"cai.replace_dropped: {c.constitution} has no refusals; add some, or turn it off."
        )
    return loaded
