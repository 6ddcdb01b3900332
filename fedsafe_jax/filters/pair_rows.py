"""Pairs as an encoder reads them: the dialogue, then the response, in padded batches."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fedsafe_jax.data.examples import Example
from fedsafe_jax.data.shortening import shares, system_turns
from fedsafe_jax.filters import stream
from fedsafe_jax.filters.protocol import FilterError, warn_of_cuts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Texts are cut to this many characters per token of a row before they are tokenised: few tokens are
# longer, and tokenising the rest of a very long answer would be wasted time.
CHARACTERS_PER_TOKEN = 24


class Encoded(NamedTuple):
    """Tokens of a pair, and the index at which the response begins."""

    ids: list[int]
    response_start: int


class PairBatch(NamedTuple):
    """A padded batch of pairs, each array `[rows, width]`.

    Attributes:
      tokens: int32 token ids.
      types: int32, 0 in the request and 1 in the response.
      valid: bool, False on padding.
    """

    tokens: np.ndarray
    types: np.ndarray
    valid: np.ndarray


@functools.lru_cache
def frame(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int], list[int]]:
    """Returns what the tokenizer puts before, between and behind a pair, such as [CLS] and [SEP].

    Args:
      tokenizer: Hugging Face tokenizer.
    """
    if tokenizer.cls_token_id is None:
        return [], [], []
    first, second = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("a", "b"))
    pair = tokenizer("a", "b")["input_ids"]
    start = next(i for i in range(len(pair)) if pair[i : i + len(first)] == first)
    middle = start + len(first)
    behind = next(i for i in range(middle, len(pair)) if pair[i : i + len(second)] == second)
    return pair[:start], pair[middle:behind], pair[behind + len(second) :]


def encode_pairs(
    tokenizer: "PreTrainedTokenizerBase", pairs: Sequence[Example], max_length: int
) -> list[Encoded]:
    """Tokenises pairs: the end of the request, then the beginning of the response.

    Request and response each get half of the room, and whatever the other leaves free. A dialogue
    of several turns is read whole, each turn behind its role; where it is too long, the oldest
    turns go first, and its system prompt keeps half of the request's room.

    Args:
      tokenizer: Hugging Face tokenizer.
      pairs: pairs to encode.
      max_length: most tokens of a pair, special tokens included.

    Raises:
      FilterError: max_length leaves too little room.
    """
    before, between, behind = frame(tokenizer)
    room = max_length - len(before) - len(between) - len(behind)
    if room < 8:
        raise FilterError(f"filter.max_length={max_length}: too short for a pair; use 64 or more.")
    limit = CHARACTERS_PER_TOKEN * max_length

    def tokens(texts):
        return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    systems, turns = zip(*(_request(e) for e in pairs), strict=True) if pairs else ((), ())
    systems = tokens([text[:limit] for text in systems])
    requests = tokens([text[-limit:] for text in turns])
    responses = tokens([e.response[:limit] for e in pairs])
    rows, cut = [], 0
    for system, turn, response in zip(systems, requests, responses, strict=True):
        whole = len(system) + len(turn) + len(response)
        front, rest = shares(len(system), len(turn), room=max(room // 2, room - len(response)))
        request = [*system[:front], *turn[len(turn) - rest :]]
        response = response[: room - len(request)]
        cut += len(request) + len(response) < whole
        start = len(before) + len(request) + len(between)
        rows.append(Encoded([*before, *request, *between, *response, *behind], start))
    warn_of_cuts(cut, len(pairs), max_length)
    return rows


def _request(pair: Example) -> tuple[str, str]:
    """The text of the system prompt, "" where there is none, and that of the other turns."""
    count = system_turns(pair.messages)
    if len(pair.messages) == 1:
        return "", pair.messages[0][1]
    front, rest = (
        "\n\n".join(f"{role}: {text}" for role, text in turns)
        for turns in (pair.messages[:count], pair.messages[count:])
    )
    return front + "\n\n" * bool(front), rest


def pad(rows: Sequence[Encoded], width: int, count: int) -> PairBatch:
    """Pads rows to a batch.

    Args:
      rows: encoded pairs.
      width: tokens of a padded row.
      count: rows of the batch; those past the last pair are empty.
    """
    tokens = stream.stack([r.ids for r in rows], width, count)
    lengths = np.zeros((count, 1), np.int32)
    starts = np.zeros((count, 1), np.int32)
    for i, row in enumerate(rows):
        lengths[i], starts[i] = len(row.ids), row.response_start
    places = np.arange(width)
    valid = places < lengths
    return PairBatch(tokens, ((places >= starts) & valid).astype(np.int32), valid)
