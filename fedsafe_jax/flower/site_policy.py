"""What the operator of a site sets, and what a server's config may then ask of the site.

A config comes from another organisation. It could name files of the site, addresses to fetch from,
or a filter that lets everything pass; and overrides of a run are not part of the bundle that Flower
signs. So every text of a config is a name out of a closed set, a word of `WORDS`, packaged with
`fedsafe_jax`, or on the operator's list; a new field is refused until somebody decides what it is.
"""

import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import ml_collections
from flax import traverse_util

from fedsafe_jax.cai.constitution import PACKAGED as PACKAGED_CONSTITUTION
from fedsafe_jax.config import ConfigError, default_config
from fedsafe_jax.data import named_templates
from fedsafe_jax.data.readers import READERS
from fedsafe_jax.evals.judges import JUDGES
from fedsafe_jax.evals.task import HELDOUT, TaskError
from fedsafe_jax.filters import store
from fedsafe_jax.filters.kinds import FILTER_KINDS
from fedsafe_jax.filters.protocol import FilterError
from fedsafe_jax.flower.wire import JUDGES_AT_SERVER, OPERATORS_OWN
from fedsafe_jax.models.base_model import PACKAGED as PACKAGED_MODEL
from fedsafe_jax.models.hub import ModelError, read_json
from fedsafe_jax.pipeline.arms import arms_of
from fedsafe_jax.pipeline.evaluation import chosen_sets
from fedsafe_jax.validation import choices

# Texts that are used as they are: none of them is opened, fetched or imported.
WORDS = {
    "date": "a day",
    "optimizer": "an optax alias, read as a literal",
    "lora_targets": "projections of the decoder",
    "attack.trigger": "a text behind a request",
    "filter.unsafe_labels": "labels of an encoder",
    "cai.refusal_word": "a word",
}


# Fields of judges: their names alone name no place, while a folder or an address behind them does.
JUDGE_FIELDS = ("eval.judges", "filter.judge", "cai.check", "cai.probe_judge")


class SettingsError(ConfigError):
    """The operator's settings of a site are wrong; the message names the key."""


class PolicyError(ConfigError):
    """A server's config asks for what the operator of the site does not allow."""


class SiteSettings(NamedTuple):
    """Settings of a site, which its operator chooses.

    Attributes:
      client: number of the site, 0 to `num_clients - 1`, each once in a federation.
      sources: sources of the site's pairs, as in `data.sources`.
      data_dir: folder that the sources' locations are relative to.
      workdir: folder of the site's filter scores, compiled programs and state.
      model: folder of the base model; "" for the model that the config names.
      filter: folder of a trained filter, which the server's config cannot replace, weaken or leave
        out; "" for the filter that the config describes.
      require_filter: whether a run must filter also without `filter`: then by the package's default
        filter, whatever the config describes.
      allow: locations and Hub ids, as the config writes them, that a config may name here beside
        what is packaged.
    """

    client: int
    sources: tuple[str, ...]
    data_dir: str
    workdir: str
    model: str = ""
    filter: str = ""
    require_filter: bool = False
    allow: tuple[str, ...] = ()


def settings_of(node_config: dict) -> SiteSettings:
    """Reads the settings of a site from `flower-supernode --node-config`.

    Args:
      node_config: values by key; Flower's simulation adds `partition-id` and `num-partitions`.

    Raises:
      SettingsError: a key is missing, unknown or of another type.
    """
    names = {field.replace("_", "-"): field for field in SiteSettings._fields}
    given = {k: v for k, v in node_config.items() if k not in ("partition-id", "num-partitions")}
    for key in given.keys() - names.keys():
        raise SettingsError(f"--node-config {key}: no such key; expected {', '.join(names)}.")
    for key in ("client", "sources", "data-dir", "workdir"):
        if key not in given:
            raise SettingsError(
                f"--node-config: {key} is missing; a site needs client (its number, from 0 on), "
                "sources, data-dir and workdir."
            )
    for key, value in given.items():
        kind, words = {
            "client": (int, "a number from 0 on"),
            "require-filter": (bool, "true or false"),
        }.get(key, (str, "text"))
        if type(value) is not kind:
            raise SettingsError(f"--node-config {key}={value!r}: expected {words}.")
    fields = {names[key]: value for key, value in given.items()}
    for key in ("sources", "allow"):
        if key in fields:
            fields[key] = tuple(one.strip() for one in fields[key].split(",") if one.strip())
    return SiteSettings(**fields)


def apply(config: ml_collections.ConfigDict, settings: SiteSettings) -> list[str]:
    """Sets what is the operator's in a server's config, and refuses what is not allowed.

    It opens no file but that of the operator's own filter, so that a refusal tells nothing about
    the site.

    Args:
      config: config of the run, as the server sent it; changed in place.
      settings: settings of the site.

    Returns:
      Lines about what was set otherwise than the server asked.

    Raises:
      PolicyError: naming the field, and what the operator may do.
      FilterError: the config trains without a filter that the operator demands.
    """
    said, own = config.filter.to_dict(), set(OPERATORS_OWN)
    for field in OPERATORS_OWN:
        config[field] = default_config()[field]
    if settings.model:
        config.model = settings.model
        own.add("model")
    if settings.filter or settings.require_filter:
        _bind_filter(config, settings.filter)
        own.add("filter.load")
    for field, text in _names(config):
        if field not in own and not _allowed(field, text, allow=settings.allow):
            raise PolicyError(
                f"{field}: the server's config names {text!r}, which is not packaged. A site reads "
                "and fetches what its operator lists in --node-config allow, or sets there."
            )
    changed = {k for k, v in config.filter.to_dict().items() if v != said[k]}
    if not changed:
        return []
    fields = ", ".join(sorted(f"filter.{k}" for k in changed))
    return [f"the operator's filter is used; the server's config asked for other {fields}"]


def _bind_filter(config: ml_collections.ConfigDict, folder: str) -> None:
    """Puts the operator's filter, or the package's default one, in place of the config's.

    Its whole section is replaced: with a threshold near 1, a simulated kind, an action that keeps
    pairs, or a training of no step, a filter is there and drops nothing.
    """
    for arm in arms_of(config):
        if arm.federated and not arm.filter:
            raise FilterError(
                f"arms={tuple(config.arms)}: the server trains without a filter, and the operator "
                "of this site demands one."
            )
    config.filter = default_config().filter
    if folder:
        config.filter.load = folder
        config.filter.kind = _kind_of(folder)


def _kind_of(folder: str) -> str:
    """Returns the kind of a filter's folder, never `simulated`, which has no folder."""
    store.check(folder)
    try:
        kind = read_json(pathlib.Path(folder) / store.NAME)["kind"]
        if FILTER_KINDS[kind].make is not None:
            return kind
    except (ModelError, ValueError, KeyError, TypeError):
        pass
    raise FilterError(f"{folder}: the filter is damaged; train it again.")


def text_fields(config: ml_collections.ConfigDict) -> set[str]:
    """Returns the fields of a config that hold text and are no choice out of a closed set."""
    flat = traverse_util.flatten_dict(config.to_dict(), sep=".")
    listed = {f: v if isinstance(v, tuple | list) else (v,) for f, v in flat.items()}
    some = {f for f, values in listed.items() if not values or any(map(_is_text, values))}
    return some - choices().keys()


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _names(config: ml_collections.ConfigDict) -> Iterator[tuple[str, str]]:
    """Yields `(field, text)` of everything in a config that may name a place."""
    flat = traverse_util.flatten_dict(config.to_dict(), sep=".")
    for field in sorted(text_fields(config)):
        if field in WORDS:
            continue
        if field == "eval.tasks":  # a task without a source has one of its own
            try:
                chosen = chosen_sets(config)
            except TaskError as error:
                raise ConfigError(f"eval.tasks: {error}") from None
            yield from ((field, one.source) for one in chosen.values() if one.source != HELDOUT)
        elif field == "chat_template":
            if named_templates.file_of(flat[field]) is not None:
                yield field, flat[field]
        else:
            texts = [flat[field]] if isinstance(flat[field], str) else flat[field]
            yield from ((field, str(text)) for text in texts)


def _allowed(field: str, text: str, allow: tuple[str, ...]) -> bool:
    """Tells whether a text of a server's config may be used at a site."""
    if text in ("", PACKAGED_MODEL, PACKAGED_CONSTITUTION):
        return True
    if field in JUDGE_FIELDS and text in (*JUDGES, *JUDGES_AT_SERVER):
        return True
    reader, _, location = text.partition(":")
    location = (location if reader in READERS else text).partition("#")[0]
    packaged = location.startswith("package/") and ".." not in pathlib.PurePath(location).parts
    return packaged or text in allow or location in allow
