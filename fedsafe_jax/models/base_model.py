"""The name of an adapter's base model, as peft, transformers and vLLM can load it."""

import os
import pathlib

from fedsafe_jax.models import gguf_folder
from fedsafe_jax.models.gguf_reader import is_gguf

PACKAGED = "package:model"
PACKAGED_FOLDER = pathlib.Path(__file__).resolve().parents[1] / "assets" / "model"


def loadable(name: str) -> str:
    """Returns a name that other libraries load: a Hub id, or the absolute path of a folder.

    Args:
      name: a name that `load_pretrained` takes: `package:model`, a local folder, a GGUF file (of
        which the folder in the user's cache is named), or a Hub id; "" where the base is not known.

    Example:
      >>> loadable("org/model")
      'org/model'
      >>> pathlib.Path(loadable("package:model"), "config.json").is_file()
      True
    """
    if name == PACKAGED:
        return str(PACKAGED_FOLDER)
    if is_gguf(name) and os.path.isfile(name):
        return str(gguf_folder.cached(name))
    return str(pathlib.Path(name).resolve()) if name and os.path.isdir(name) else name
