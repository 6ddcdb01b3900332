"""Federated LLM fine-tuning with safety built in, in JAX/Flax."""

from fedsafe_jax.language_model import LanguageModel, load_pretrained, save_pretrained
from fedsafe_jax.models.lora import load_adapter, save_adapter

__all__ = ["LanguageModel", "load_adapter", "load_pretrained", "save_adapter", "save_pretrained"]
