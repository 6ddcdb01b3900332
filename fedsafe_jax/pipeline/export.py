"""Hugging Face export of an arm: the PEFT adapter and the merged model, each with its card."""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from fedsafe_jax import whole_files
from fedsafe_jax.config import ConfigError, unsafe_sources
from fedsafe_jax.federated.mesh import spans_hosts
from fedsafe_jax.inference.language_model import LanguageModel
from fedsafe_jax.inference.pretrained import save_pretrained
from fedsafe_jax.models import base_model, lora
from fedsafe_jax.models.adapter_hash import adapter_hash
from fedsafe_jax.models.base_model import model_folder
from fedsafe_jax.pipeline import evaluation, ledger_lines, rounds
from fedsafe_jax.pipeline.arms import PlannedArm, planned_arms
from fedsafe_jax.pipeline.inputs import RunInputs
from fedsafe_jax.pipeline.workdir import HASH, ArmFiles
from fedsafe_jax.report import model_card
from fedsafe_jax.runtime import fingerprints, multihost
from fedsafe_jax.whole_files import WorkdirError

NOT_EXPORTED = "nothing whole was exported, and the same command does it again"


@contextlib.contextmanager
def local_folder(folder: epath.Path) -> Iterator[epath.Path]:
    """Gives a local folder to write to, whose files end in `folder`.

    Safetensors writes local files only, so a bucket gets copies when everything is written.
    """
    if "://" not in str(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as name:
        yield epath.Path(name)
        for path in pathlib.Path(name).rglob("*"):
            if path.is_file():
                target = folder / path.relative_to(name).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                epath.Path(path).copy(target, overwrite=True)


def write_adapter(adapter: lora.Adapter, folder: epath.Path, card: str) -> None:
    """Writes an adapter that peft and vLLM load from the folder itself.

    Args:
      adapter: the adapter, which names its base.
      folder: a local folder, created if missing.
      card: text of the model card.
    """
    lora.save_adapter(adapter, folder)
    base = base_model.loadable(adapter.base_model)
    card = model_card.for_library(card, "peft", base)
    _write_card(folder, card)


def write_merged(lm: LanguageModel, folder: epath.Path, card: str) -> None:
    """Writes a model with its adapter merged, for transformers and vLLM.

    Args:
      lm: the model with its adapter.
      folder: a local folder, created if missing.
      card: text of the model card.
    """
    save_pretrained(lm, folder)
    card = model_card.for_library(card, "transformers")
    _write_card(folder, card)


def _write_card(folder: epath.Path, card: str) -> None:
    with whole_files.replaced(folder / "README.md") as new:
        new.write_text(card, encoding="utf-8")


def export(
    lm: LanguageModel, adapter: lora.Adapter, folder: epath.Path, card: str
) -> dict[str, str]:
    """Writes `adapter/` (peft loads it on the base) and `merged/` (transformers loads it).

    Where the base spans processes, all of them call this, and the first one writes.

    Args:
      lm: the base model.
      adapter: adapter to export.
      folder: receives the two folders.
      card: text of the model card, written to both.

    Returns:
      SHA-256 of each file written, by its name below `folder`; {} in all processes but the first.
    """
    if not multihost.is_primary():
        save_pretrained(lm.with_adapter(adapter), folder / "merged")
        return {}
    with local_folder(folder) as written:
        write_adapter(adapter, written / "adapter", card)
        write_merged(lm.with_adapter(adapter), written / "merged", card)
        files = sorted(path for path in pathlib.Path(written).rglob("*") if path.is_file())
        return {p.relative_to(written).as_posix(): fingerprints.of_file(p) for p in files}


def export_arm(
    config: ConfigDict,
    inputs: RunInputs,
    workdir: epath.Path,
    factors: dict[str, Any],
    results: dict,
) -> bool | None:
    """Exports the adapter of `export_arm` (first algorithm, first seed), if the arm was run.

    All processes call this.

    Args:
      config, inputs: config and inputs of the run.
      workdir: folder of the run, which receives `export/`.
      factors: final LoRA factors by the id of the arm.
      results: content of `results.json`, for the card; {} in other processes than the first.

    Returns:
      Whether there was an adapter to export; None in a process that took no part.

    Raises:
      StorageError: the storage does not take a file.
      WorkdirError: the adapter is not the one that was evaluated.
    """

    def write() -> bool:
        with whole_files.storage(workdir / "export", NOT_EXPORTED):
            return _export_arm(config, inputs, workdir, factors=factors, results=results)

    multihost.barrier("export")
    if spans_hosts(inputs.mesh):  # no process has the whole base: all fetch it together
        exported = write()
        multihost.barrier("reported")
        return exported
    return multihost.first(write)


def _export_arm(
    config: ConfigDict,
    inputs: RunInputs,
    workdir: epath.Path,
    factors: dict[str, Any],
    results: dict,
) -> bool:
    """Exports as `export_arm` says; the others take part where the base spans processes."""
    planned = exported_arm(config)
    if planned is None:
        return False
    own = multihost.local(factors[planned.id], inputs.mesh)
    adapter = lora.Adapter(own, lora.config_of(own, inputs.lora), inputs.lm.name)
    card = ""
    if results:
        summary = results["arms"][planned.id]
        if (here := adapter_hash(own)) != summary[HASH][0]:
            raise WorkdirError(
                f"{workdir / 'results.json'} has the scores of adapter {summary[HASH][0]:.12}, and "
                f"{here:.12} was to be exported under them; nothing is. Please report this."
            )
        card = model_card.text(
            planned.id,
            _settings(config),
            summary=summary,
            sets=inputs.evals,
            license_fields=base_license(config.model),
            note=_with_privacy(config, _seeds_note(config)),
            harmful_share=_published_share(config, results, list(config.seeds)[0]),
            adapter_sha256=here,
        )
    exported = export(inputs.lm, adapter, workdir / "export", card)
    if exported:
        files = ArmFiles(workdir, planned, list(config.seeds)[0])
        ledger_lines.add_export(files, config.rounds, exported)
    return True


def exported_arm(config: ConfigDict) -> PlannedArm | None:
    """Returns the arm whose adapter of the first seed is exported, None where none is trained."""
    for planned in planned_arms(config):
        if planned.arm.name == config.export_arm and planned.arm.trains:
            return planned
    return None


def _seeds_note(config: ConfigDict) -> str:
    seeds = list(config.seeds)
    if len(seeds) == 1:
        return ""
    return f"This is the adapter of seed {seeds[0]}; the figures are over the seeds {seeds}."


def _with_privacy(config: ConfigDict, note: str, of_client: bool = False) -> str:
    statement = rounds.privacy_of(config).get("statement")
    if statement and of_client:
        statement = (
            "Not differentially private: a client's update is kept as it was sent, before any "
            "noise, and must not be published."
        )
    return "\n\n".join(filter(None, (note, statement)))


def card_of_seed(
    config: ConfigDict,
    workdir: epath.Path,
    planned: PlannedArm,
    seed: int,
    adapter_sha256: str,
    note: str = "",
    of_client: bool = False,
) -> str:
    """Returns the model card of one arm and seed of a run, from what its workdir holds.

    Args:
      config: config of the run.
      workdir: folder of the run.
      planned: the arm.
      seed: the seed, whose own figures the card has where it was evaluated.
      adapter_sha256: hash of the adapter that the card is for.
      note: a sentence on what this is, where it is not the arm's final model; the card has no
        figures then, as only final models are evaluated.
      of_client: whether it is what one client sent, which has no epsilon.

    Raises:
      WorkdirError: another adapter of the arm was evaluated.
    """
    path = workdir / "arms" / f"{planned.folder}_seed{seed}.json"
    outcome = {} if note else whole_files.read_json(path, rename=False) or {}
    if not isinstance(outcome, dict) or (outcome and outcome.get(HASH) != adapter_sha256):
        raise WorkdirError(
            f"{path} has the scores of another adapter than the checkpoint of the last round "
            f"holds ({adapter_sha256:.12}). Put that checkpoint back, or move the file away."
        )
    sets = {k: one for k, one in evaluation.chosen_sets(config).items() if k in outcome}
    written = whole_files.read_json(workdir / "results.json", rename=False) or {}
    if not note and not outcome:
        note = "The run had not evaluated it when this was written."
    return model_card.text(
        planned.id,
        _settings(config),
        summary=evaluation.summarise(sets, [outcome], evaluation.options_of(config)),
        sets=sets,
        license_fields=base_license(config.model),
        note=_with_privacy(config, note, of_client),
        harmful_share=_published_share(config, written, seed),
        adapter_sha256=adapter_sha256,
    )


def _settings(config: ConfigDict) -> dict:
    """Returns the config for a card, with the names of the harmful sources that were read."""
    try:
        names = unsafe_sources(config)
    except ConfigError:  # real sites hold their own pairs, and no such source was read
        names = ()
    return config.to_dict() | {"unsafe_sources": names}


def _published_share(config: ConfigDict, results: dict, seed: int) -> float | None:
    """Returns `held_share`; None under differential privacy, where it would be an exact figure of
    the clients' data beside the noise."""
    return None if rounds.privacy_of(config) else held_share(results, seed)


def held_share(results: dict, seed: int) -> float | None:
    """Returns the harmful share of the pairs that a seed's clients hold, from `results.json`.

    Args:
      results: content of the file; {} without one.
      seed: the seed.

    Returns:
      None where it is not known: of real sites, and before the run has ended.
    """
    shares = results.get("data", {}).get("harmful_share_held")
    return shares[results["seeds"].index(seed)] if shares else None


def base_license(name: str) -> dict[str, str]:
    """Returns the license fields of the base's model card, {} where they are not known.

    Args:
      name: the base as the config names it: a folder's `README.md`, or the Hub's, is read.
    """
    from huggingface_hub import ModelCard

    try:
        beside = model_folder(name) / "README.md"
        data = ModelCard.load(beside if beside.is_file() else name).data.to_dict()
    except Exception:  # A card may be missing, cut off or behind a network: then nothing is known.
        return {}
    fields = ("license", "license_name", "license_link")
    return {field: data[field] for field in fields if isinstance(data.get(field), str)}
