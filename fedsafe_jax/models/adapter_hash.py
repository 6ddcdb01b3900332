"""The hash of an adapter, by which scores say which adapter they are of."""

import hashlib

import numpy as np

from fedsafe_jax.models import lora


def adapter_hash(factors: dict) -> str:
    """Returns the SHA-256 of an adapter's tensors, in hexadecimal digits.

    It covers names, shapes and float32 numbers of `adapter_model.safetensors`, sorted by name: so
    it is the same of an adapter in memory, in a checkpoint, and read from its folder.

    Args:
      factors: see `lora.Adapter`.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(lora.peft_tensors(factors).items()):
        tensor = np.ascontiguousarray(tensor, "<f4")
        digest.update(f"{name} {list(tensor.shape)} F32\n".encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()
