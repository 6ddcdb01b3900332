"""Safe LoRA at the server: the last round's aggregate, projected by two models' weights.

The run's base is the aligned model; `federated.unaligned` names the one that it was aligned from.
"""

import math
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from fedsafe_jax.config import ConfigError
from fedsafe_jax.federated import safe_lora
from fedsafe_jax.models import hub
from fedsafe_jax.models.base_model import model_folder
from fedsafe_jax.models.lora import expand_targets
from fedsafe_jax.models.model_files import Tensors

ALL = (slice(None), slice(None))


class Alignment:
    """What alignment changed in each adapted projection, read when it is asked for.

    Args:
      config: config of the run.

    Raises:
      ModelError: a model that cannot be read.
      ConfigError: the two models do not have the same weights, or no projection differs.
    """

    def __init__(self, config: ConfigDict):
        shape = hub.read_config(model_folder(config.model), config.dtype)
        self._aligned = Tensors(model_folder(config.model))
        self._unaligned = Tensors(model_folder(config.federated.unaligned))
        targets = expand_targets(config.lora_targets)
        self._names = {
            leaf.path[1:-1]: leaf.names
            for leaf in hub.leaves(shape)
            if leaf.path[-1] == "kernel" and leaf.path[-2] in targets
        }
        where = f"federated.unaligned='{config.federated.unaligned}'"
        there = self._unaligned.names()
        for name in (name for names in self._names.values() for name in names):
            expected = self._aligned.shape(name)
            theirs = self._unaligned.shape(name) if name in there else None
            if theirs != expected:
                raise ConfigError(
                    f"{where}: tensor '{name}' has shape {theirs and list(theirs)}, and that of "
                    f"model='{config.model}' {list(expected)}; name the model that it was aligned "
                    "from."
                )
            self._unaligned.check_dtype(name)
        places = ((path, i) for path, names in self._names.items() for i in range(len(names)))
        if not any(self.moved(path, i).any() for path, i in places):
            raise ConfigError(
                f"{where}: its {', '.join(targets)} are those of model='{config.model}', so there "
                "is no alignment to keep; name the model that it was aligned from."
            )

    def moved(self, path: tuple[str, ...], layer: int) -> np.ndarray:
        """Returns `W_aligned - W_unaligned` of a projection, float32 `[out, in]`.

        Args:
          path: keys of the projection in a layer, such as ("self_attn", "q_proj").
          layer: number of the layer, from 0.
        """
        name = self._names[path][layer]
        ours, theirs = (
            x.read(name, ALL).astype(np.float32) for x in (self._aligned, self._unaligned)
        )
        return ours - theirs


def run(config: ConfigDict, factors: Any) -> tuple[Any, dict]:
    """Projects the global adapter, see `safe_lora.project`.

    Args:
      config: config of the run.
      factors: LoRA factors, numpy leaves `[layers, ...]`.

    Returns:
      `(factors, figures)`; the figures are how many projections of how many were projected, and the
      mean cosine, None where nothing has one.

    Raises:
      What `Alignment` raises.
    """
    alignment, threshold = Alignment(config), config.federated.safe_lora_threshold
    cosines = []

    def one(path, pair):
        keys = tuple(key.key for key in path)[1:]
        b = np.array(pair["b"])
        for layer in range(len(b)):
            b[layer], cosine = safe_lora.project(
                np.asarray(pair["a"][layer]), b[layer], alignment.moved(keys, layer), threshold
            )
            cosines.append(cosine)
        return {"a": pair["a"], "b": b}

    projected = jax.tree_util.tree_map_with_path(one, factors, is_leaf=lambda node: "a" in node)
    known = [cosine for cosine in cosines if not math.isnan(cosine)]
    figures = {
        "projected": sum(cosine <= threshold for cosine in known),
        "projections": len(cosines),
        "mean_cosine": float(np.mean(known)) if known else None,
    }
    return projected, figures
