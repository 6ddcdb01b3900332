"""What a model's name stands for: its folder, and the name by which other libraries load it."""

import os
import pathlib

from fedsafe_jax.models import gguf_folder, hub
from fedsafe_jax.models.gguf_reader import is_gguf

PACKAGED = "package:model"
PACKAGED_FOLDER = pathlib.Path(__file__).resolve().parents[1] / "assets" / "model"


def model_folder(path_or_hub_id: str) -> pathlib.Path:
    """Returns the local folder of a model.

    That is the folder as given, the packaged one (`package:model`), what a GGUF file became in the
    user's cache, or a download.

    Args:
      path_or_hub_id: local folder or GGUF file, `package:model`, or a Hub id.

    Raises:
      ModelError: there is no such model, or it is a GGUF file that cannot be read.
      WorkdirError: the user's cache cannot be written to.
    """
    if path_or_hub_id == PACKAGED:
        return PACKAGED_FOLDER
    if is_gguf(path_or_hub_id) and not os.path.isdir(path_or_hub_id):
        return gguf_folder.cached(path_or_hub_id)
    return hub.resolve(path_or_hub_id)


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
