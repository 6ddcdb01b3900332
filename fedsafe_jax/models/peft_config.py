"""PEFT's `adapter_config.json`: an allow-list of what a plain LoRA has there.

PEFT has dozens of variants of LoRA under one `peft_type`, some of which change the base model when
they are loaded. So a field is known to be plain at a value, or known to change nothing, or its
value asks for nothing; any other is refused by name, also when a later PEFT brings it.
"""

import math
import pathlib
from collections.abc import Collection
from typing import Any, NamedTuple

from fedsafe_jax.models import expressions
from fedsafe_jax.models.config_fields import is_empty
from fedsafe_jax.models.decoder_config import ModelError
from fedsafe_jax.models.model_files import read_json

# Fields that are read.
READ = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "use_rslora",
    "base_model_name_or_path",
)
# Fields that say more than yes or no, and their plain values; beside these, what asks for nothing.
PLAIN: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM",),
    "bias": ("none",),
    # How factors were drawn before training; others than these take something out of the base.
    "init_lora_weights": (True, "gaussian", "orthogonal"),
}
# Fields that change nothing where the others are plain: notes, and details of what is not used.
HARMLESS = (
    "auto_mapping", "inference_mode", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "runtime_config",
)  # fmt: skip


# The largest rank and numerator of the scale that an adapter may claim, far above those in use.
MOST_RANK, MOST_ALPHA = 65_536, 1_000_000


class PeftConfig(NamedTuple):
    """What a plain LoRA's config tells.

    Attributes:
      rank: rank of all factors.
      alpha: numerator of their scale.
      rank_stabilized: whether the scale is rsLoRA's.
      dropout: rate of dropout on the adapter's inputs, while it was trained.
      targets: names of adapted modules, or an expression that matches whole names.
      base_model: the base's path or Hub id, "" for none.
    """

    rank: int
    alpha: float
    rank_stabilized: bool
    dropout: float
    targets: tuple[str, ...] | str
    base_model: str

    def adapted_of(self, modules: Collection[str]) -> set[str]:
        """Returns those of modules, such as `model.layers.0.mlp.up_proj`, that are to be adapted.

        Raises:
          ExpressionError: see `expressions.matching`.
        """
        if self.targets == "all-linear":
            return set(modules)
        if isinstance(self.targets, str):
            return expressions.matching(self.targets, modules)
        return {m for m in modules if any(_names(target, m) for target in self.targets)}


def read(folder: pathlib.Path) -> PeftConfig:
    """Reads `adapter_config.json`.

    Args:
      folder: an adapter's folder.

    Raises:
      ModelError: no such file, or no plain LoRA; the message names the field.
    """
    path = folder / "adapter_config.json"
    raw = read_json(path)
    for field in ("peft_type", "r", "lora_alpha", "target_modules"):
        if raw.get(field) is None:
            raise ModelError(f"{path}: field {field} is missing.")
    for field, value in raw.items():
        if field in PLAIN:
            known = is_empty(value) or value in PLAIN[field]
        else:
            known = field in READ or field in HARMLESS or is_empty(value)
        if not known:
            plain = repr(PLAIN[field][0]) if field in PLAIN else "none"
            raise ModelError(
                f"{path}: {field}={value!r:.200} is not supported; expected {plain} (a plain LoRA)."
            )
    rank, alpha, dropout = raw["r"], raw["lora_alpha"], raw.get("lora_dropout") or 0.0
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 < rank <= MOST_RANK:
        raise ModelError(f"{path}: r={rank!r:.60}; expected a positive integer to {MOST_RANK:,}.")
    if not _is_number(alpha) or not 0 < alpha <= MOST_ALPHA:
        raise ModelError(
            f"{path}: lora_alpha={alpha!r:.60}; expected a positive number to {MOST_ALPHA:,}."
        )
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise ModelError(
            f"{path}: lora_dropout={dropout!r:.60}; expected a number from 0 to below 1."
        )
    for field, kind in (("use_rslora", bool), ("base_model_name_or_path", str)):
        if not isinstance(raw.get(field), (kind, type(None))):
            raise ModelError(f"{path}: {field}={raw[field]!r:.60}; expected a {kind.__name__}.")
    return PeftConfig(
        rank,
        alpha,
        rank_stabilized=bool(raw.get("use_rslora")),
        dropout=float(dropout),
        targets=_targets(path, raw["target_modules"]),
        base_model=raw.get("base_model_name_or_path") or "",
    )


def check_targets(
    config: PeftConfig, adapted: Collection[str], known: Collection[str], path: pathlib.Path
) -> None:
    """Checks that the modules with factors are those that the config names.

    Args:
      config: the adapter's config.
      adapted: names of the modules with factors, such as `model.layers.0.mlp.up_proj`.
      known: names of all projections of the layers that have factors.
      path: the file of tensors, for messages.

    Raises:
      ModelError: a module has factors and is not named, or the reverse.
    """
    try:
        named = config.adapted_of({*adapted, *known})
    except expressions.ExpressionError as error:
        raise ModelError(
            f"{path.with_name('adapter_config.json')}: target_modules={config.targets!r:.80} is no "
            f"regular expression of use ({error}); name the projections."
        ) from None
    if extra := sorted(set(adapted) - named):
        raise ModelError(
            f"{path}: has factors of {extra[0]}, which adapter_config.json's target_modules="
            f"{config.targets!r:.200} does not name."
        )
    if missing := sorted((set(known) & named) - set(adapted)):
        raise ModelError(
            f"{path}: has no factors of {missing[0]}, which adapter_config.json's target_modules="
            f"{config.targets!r:.200} names."
        )
    for target in () if isinstance(config.targets, str) else config.targets:
        if not any(_names(target, module) for module in adapted):
            raise ModelError(
                f"{path}: has no factors of '{target}', which adapter_config.json's "
                "target_modules names."
            )


def _names(target: str, module: str) -> bool:
    """Whether an entry of PEFT's `target_modules` names a module."""
    return module == target or module.endswith(f".{target}")


def _targets(path: pathlib.Path, given: Any) -> tuple[str, ...] | str:
    """Reads `target_modules`: names, or one expression."""
    if isinstance(given, str) and given:
        return given  # tried by `check_targets`
    if not isinstance(given, list) or not given or not all(isinstance(x, str) for x in given):
        raise ModelError(f"{path}: target_modules={given!r:.200}; expected names of projections.")
    return tuple(given)


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value)
