"""Which files a config has a run read, by names that stay the same wherever the files lie."""

import json
import os
import pathlib
from collections.abc import Iterator, Sequence

from ml_collections import ConfigDict

from fedsafe_jax.cai import constitution
from fedsafe_jax.config import unsafe_sources
from fedsafe_jax.data import labelled_answers, named_templates, sources
from fedsafe_jax.data.examples import SourceError
from fedsafe_jax.data.hub_rows import is_on_hub
from fedsafe_jax.evals.task import HELDOUT
from fedsafe_jax.filters import store
from fedsafe_jax.filters.kinds import FILTER_KINDS
from fedsafe_jax.models.base_model import model_folder
from fedsafe_jax.pipeline.arms import any_filter
from fedsafe_jax.pipeline.evaluation import chosen_sets

ASSETS = pathlib.Path(__file__).resolve().parents[1] / "assets"
# What is read of a folder with a model, an encoder or a filter.
MODEL_FILES = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.safetensors",
    "*.txt",
    "additional_chat_templates/*.jinja",
)


def files_of(config: ConfigDict) -> dict[str, pathlib.Path | str]:
    """Returns the files of data, models, filter and constitution, by name.

    Args:
      config: config of the run.

    Returns:
      Paths by names such as `model/config.json`, and texts where there is no file: the rows of a
      data set of the Hub. A file that is missing is left out: what reads it says so.

    Raises:
      ModelError: a model is no folder, and the Hub does not have it.
      SourceError: a source is not written as one, or the Hub does not have the data set.
    """
    files = {}
    for source in dict.fromkeys(sources_of(config)):
        files |= _source_files(source, config.data_dir)
    labels = [labelled_answers.parse(source)[2] for source in config.eval.labels]
    for location in (*config.cai.records, *labels):
        files |= _source_files(location, config.data_dir)
    for field, folder in _folders(config):
        for path in _files_in(folder):
            files[f"{field}/{path.relative_to(folder).as_posix()}"] = path
    for field in ("constitution", "few_shot_file"):
        given = config.cai[field]
        path = ASSETS / "constitution.json" if given == constitution.PACKAGED else given
        if path and os.path.isfile(path):
            files[f"cai.{field}"] = pathlib.Path(path)
    if any_filter(config) and os.path.isfile(path := config.filter.instruction):
        files["filter.instruction"] = pathlib.Path(path)
    if (file := named_templates.file_of(config.chat_template)) and file.is_file():
        files["chat_template"] = file
    return files


def sources_of(config: ConfigDict) -> Iterator[str]:
    """Yields the sources of a config's data and tasks, as they are written there."""
    pools: Sequence[Sequence[str]] = (
        config.safe_sources,
        unsafe_sources(config),
        config.heldout_sources,
        config.filter.sources,
        config.cai.red_team_sources,
        config.cai.benign_sources,
        config.cai.harmless_sources,
    )
    for names in pools:
        yield from names
    for chosen in chosen_sets(config).values():
        if chosen.source and chosen.source != HELDOUT:
            yield chosen.source


def _source_files(source: str, data_dir: str) -> dict[str, pathlib.Path | str]:
    try:
        location = sources.parse_source(source)[1]
    except SourceError:  # a task's own form, or wrong: what reads it says so
        location = source.partition("#")[0]
    name = f"data/{location}"
    if location.startswith("package/"):
        path = ASSETS / "demo" / location.removeprefix("package/")
    elif is_on_hub(location, data_dir):
        rows = [row for _, row in sources.read_rows(location, data_dir)]
        return {name: json.dumps(rows, ensure_ascii=False, default=str)}
    else:
        path = pathlib.Path(data_dir) / location
    if os.path.isdir(path):
        return {f"{name}/{p.relative_to(path).as_posix()}": p for p in _files_in(path, ("**/*",))}
    return {name: path} if os.path.isfile(path) else {}


def _folders(config: ConfigDict) -> Iterator[tuple[str, pathlib.Path]]:
    yield "model", model_folder(config.model)
    if config.federated.unaligned:
        yield "federated.unaligned", model_folder(config.federated.unaligned)
    if config.eval.encoder:
        yield "eval.encoder", pathlib.Path(config.eval.encoder)
    section = config.filter
    if not any_filter(config):
        return
    for field in ("load", "encoder"):
        if section[field]:
            yield f"filter.{field}", pathlib.Path(section[field])
    if section.load and (base := store.base_of(section.load)):
        yield "filter.load's base", model_folder(base)
    elif FILTER_KINDS[section.kind].needs_model and section.model:
        yield "filter.model", model_folder(section.model)


def _files_in(folder: pathlib.Path, patterns: Sequence[str] = MODEL_FILES) -> list[pathlib.Path]:
    matching = {p for pattern in patterns for p in folder.glob(pattern)}
    return sorted(p for p in matching if p.is_file())
