"""Hugging Face export of an arm: the PEFT adapter and the merged model, each with its card."""

import contextlib
import tempfile
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from fedsafe_jax.inference.language_model import LanguageModel, save_pretrained
from fedsafe_jax.models import lora
from fedsafe_jax.pipeline.arms import planned_arms
from fedsafe_jax.pipeline.inputs import RunInputs
from fedsafe_jax.report import model_card
from fedsafe_jax.runtime import multihost


def export(lm: LanguageModel, adapter: lora.Adapter, folder: epath.Path, card: str) -> None:
    """Writes `adapter/` (peft loads it on the base) and `merged/` (transformers loads it).

    Where the base spans processes, all of them call this, and the first one writes.

    Args:
      lm: the base model.
      adapter: adapter to export.
      folder: receives the two folders.
      card: text of the model card, written to both.
    """
    if not multihost.is_primary():
        save_pretrained(lm.with_adapter(adapter), folder / "merged")
        return
    with contextlib.ExitStack() as stack:
        written = folder
        if "://" in str(folder):  # safetensors writes local files; a bucket gets copies
            written = epath.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        lora.save_adapter(adapter, written / "adapter")
        save_pretrained(lm.with_adapter(adapter), written / "merged")
        for name in ("adapter", "merged"):
            (written / name / "README.md").write_text(card)
        if written != folder:
            for path in written.glob("*/*"):
                target = folder / path.parent.name / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                path.copy(target, overwrite=True)


def export_arm(
    config: ConfigDict,
    inputs: RunInputs,
    workdir: epath.Path,
    factors: dict[str, Any],
    results: dict,
) -> bool:
    """Exports the adapter of `export_arm` (first algorithm, first seed), if the arm was run.

    The first process calls this; where the base spans processes, so do the others.

    Args:
      config, inputs: config and inputs of the run.
      workdir: folder of the run, which receives `export/`.
      factors: final LoRA factors by the id of the arm.
      results: content of `results.json`, for the card; {} in other processes than the first.

    Returns:
      Whether there was an adapter to export.
    """
    for planned in planned_arms(config):
        if planned.arm.name == config.export_arm and planned.arm.trains:
            own = multihost.local(factors[planned.id], inputs.mesh)
            adapter = lora.Adapter(own, inputs.lora, inputs.lm.name)
            card = ""
            if results:
                summary = results["arms"][planned.id]
                card = model_card.text(planned.id, config.to_dict(), summary, inputs.evals)
            export(inputs.lm, adapter, workdir / "export", card)
            return True
    return False
