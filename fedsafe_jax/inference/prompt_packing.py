"""Packs prompts for prefill, and computes where their tokens go in the cache."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedsafe_jax.data import packing
from fedsafe_jax.models import owned_lora

PACKED_TOKENS = 128  # length of the rows that short prompts are packed into
# The number of a cache's slots is a multiple of this, by platform; see `cache_length`. Decoding is
# compiled for each number: on an accelerator that takes longer than reading empty slots.
CACHE_STEP, ACCELERATOR_CACHE_STEP = {"cpu": 32}, 256


class Packed(NamedTuple):
    """Prompts packed into dense rows, so that reading them costs nothing for padding.

    Attributes:
      tokens, positions, segment_ids: int32 `[packed_rows, seq]`, as in `data.packing`.
      source: int32 `[rows, cache_len]`, for each slot of the cache the flat position of its token
        in the packed rows of its device. All prompts end in the same slot, and the longest begins
        in the first.
      valid: bool `[rows, cache_len]`, False for slots without a token.
      last: int32 `[rows]`, flat position of each prompt's last token.
      width: int32 `[]`, length of the longest prompt.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    source: np.ndarray
    valid: np.ndarray
    last: np.ndarray
    width: np.ndarray


def cache_length(tokens: int, platform: str) -> int:
    """Returns the number of slots of a cache for `tokens` tokens.

    Rounded up to a multiple of the platform's `CACHE_STEP`, for long caches of an eighth of a power
    of two: few lengths are compiled, and attention reads few empty slots.

    Args:
      tokens: tokens that the cache must hold.
      platform: platform of the devices, such as "cpu".
    """
    return packing.round_up(tokens, CACHE_STEP.get(platform, ACCELERATOR_CACHE_STEP))


def pack_prompts(
    prompts: Sequence[Sequence[int]], devices: int = 1, platform: str = "cpu", least: int = 0
) -> Packed:
    """Packs prompts for prefill, the prompts of each device into rows of its own.

    Args:
      prompts: token ids of every row; an empty one only fills up the batch.
      devices: number of devices that the rows are split over evenly.
      platform: platform of the devices, which `cache_length` asks for.
      least: tokens of a packed row at least, so that small batches are of one shape.
    """
    lengths = [len(p) for p in prompts]
    width = max(max(lengths), 1)
    slots = cache_length(width + 1, platform)
    count = len(prompts) // devices
    totals = [sum(lengths[d * count : (d + 1) * count]) for d in range(devices)]
    seq = max(packing.round_up(width), least, min(PACKED_TOKENS, packing.round_up(max(totals))))
    plans = []
    for d in range(devices):
        mine = [i for i in range(d * count, (d + 1) * count) if lengths[i]]
        rows = packing.assign_rows([lengths[i] for i in mine], seq)
        plans.append([[mine[i] for i in row] for row in rows])
    size = packing.bucket(max(len(plan) for plan in plans))
    tokens, positions, segments = (np.zeros((devices * size, seq), np.int32) for _ in range(3))
    source = np.zeros((len(prompts), slots), np.int32)
    valid = np.zeros((len(prompts), slots), bool)
    last = np.zeros(len(prompts), np.int32)
    for d, plan in enumerate(plans):
        for r, members in enumerate(plan):
            start = 0
            for segment, i in enumerate(members, 1):
                part = slice(start, start + lengths[i])
                tokens[d * size + r, part] = prompts[i]
                positions[d * size + r, part] = np.arange(lengths[i])
                segments[d * size + r, part] = segment
                source[i, width - lengths[i] : width] = r * seq + np.arange(start, part.stop)
                valid[i, width - lengths[i] : width] = True
                last[i] = r * seq + part.stop - 1
                start = part.stop
    return Packed(
        tokens,
        positions,
        segments,
        source=source,
        valid=valid,
        last=last,
        width=np.asarray(width, np.int32),
    )


def owner_of_tokens(packed: Packed, owners: np.ndarray, devices: int) -> np.ndarray:
    """Returns the adapter of each packed token, int32 `[packed_rows, seq]`.

    Args:
      packed: packed prompts.
      owners: int32 `[rows]`, the adapter of each prompt.
      devices: number of devices that the rows are split over.
    """
    owner = np.full(packed.tokens.shape, owned_lora.NOBODY, np.int32)
    by_device, count = owner.reshape(devices, -1), len(owners) // devices
    for i, adapter in enumerate(owners):
        by_device[i // count, packed.source[i][packed.valid[i]]] = adapter
    return owner
