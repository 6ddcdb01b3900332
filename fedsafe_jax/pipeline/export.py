"""Hugging Face export of an arm: the PEFT adapter and the merged model."""

import contextlib
import tempfile

from etils import epath

from fedsafe_jax.inference.language_model import LanguageModel, save_pretrained
from fedsafe_jax.models import lora


def export(lm: LanguageModel, adapter: lora.Adapter, folder: epath.Path, card: str) -> None:
    """Writes `adapter/` (peft loads it on the base) and `merged/` (transformers loads it).

    Args:
      lm: the base model.
      adapter: adapter to export.
      folder: receives the two folders.
      card: text of the model card, written to both.
    """
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
