"""Federated LLM fine-tuning with safety built in, in JAX/Flax."""

from fedsafe_jax.runtime import native_notes

native_notes.import_jax()  # before anything below does

from fedsafe_jax.federated.mesh import make_mesh  # noqa: E402
from fedsafe_jax.finetune import finetune  # noqa: E402
from fedsafe_jax.inference.language_model import LanguageModel  # noqa: E402
from fedsafe_jax.inference.pretrained import load_pretrained, save_pretrained  # noqa: E402
from fedsafe_jax.models.lora import (  # noqa: E402
    Adapter,
    LoraConfig,
    load_adapter,
    save_adapter,
)

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "LanguageModel",
    "LoraConfig",
    "finetune",
    "load_adapter",
    "load_pretrained",
    "make_mesh",
    "save_adapter",
    "save_pretrained",
]
