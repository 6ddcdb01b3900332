"""Decoupled refusal training, DeRTa (Yuan et al., 2024, arXiv 2407.09121): its rows and labels.

From a harmful answer and a safe one to the same request: (a) the safe answer behind the first words
of the harmful one, so that a model can turn back after it has begun; (b) along the harmful answer,
at a random twentieth of its positions, the first token of a refusal, "reinforced transition
optimisation".
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedsafe_jax.data import chat
from fedsafe_jax.data.chat import Encoded
from fedsafe_jax.data.packing import Batch, assign_rows, fill

KEPT = 20  # one position in so many becomes a transition
EVERY = 3  # one row in so many has no harmful prefix


class Triple(NamedTuple):
    """A request with a harmful and a safe answer, tokenised when rows are drawn."""

    prompt: str
    harmful: str
    safe: str


def refusal_token(tokenizer, word: str = " Sorry") -> int:
    """The first token of `word` that says something; the leading blank is part of it."""
    for token in tokenizer(word, add_special_tokens=False)["input_ids"]:
        if tokenizer.decode([token]).strip():
            return token
    raise ValueError(f"cai.refusal_word={word!r}: the tokenizer has no token for it.")


def prefixed(tokenizer, triple: Triple, words: int, max_length: int) -> Encoded | None:
    """The safe answer, learned, behind the first `words` words of the harmful one, not learned.

    Returns:
      None when nothing learned is left within `max_length` tokens.
    """
    question = (("user", triple.prompt),)
    prefix, safe = " ".join(triple.harmful.split()[:words]), triple.safe.strip()
    if not prefix:
        return chat.encode(tokenizer, question, safe, max_length)
    answer = f"{prefix} {safe}"
    text = tokenizer.apply_chat_template(
        chat.to_dicts([*question, ("assistant", answer)]), tokenize=False
    )
    boundary = text.rindex(answer) + len(prefix)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    # A token may hold the blank before the safe answer, and begins at it.
    learned = np.array([start >= boundary for start, _ in found["offset_mapping"]], bool)
    ids, learned = np.asarray(found["input_ids"][:max_length], np.int32), learned[:max_length]
    return Encoded(ids, learned) if learned.any() else None


def transition(tokenizer, triple: Triple, rng, max_length: int) -> Encoded | None:
    """The harmful answer, a random twentieth (at least one) of whose positions is learned.

    What is learned there is not its own token: see `batch`.
    """
    question = (("user", triple.prompt),)
    whole = chat.encode(tokenizer, question, triple.harmful, max_length)
    if whole is None:
        return None
    places = np.flatnonzero(whole.loss_mask)
    kept = rng.choice(places, size=-(-len(places) // KEPT), replace=False)
    learned = np.zeros(len(whole.ids), bool)
    learned[kept] = True
    return Encoded(whole.ids, learned)


def batch(
    tokenizer, triples: Sequence[Triple], numbers: Sequence[int], refusal: int, seq: int, rng
) -> Batch:
    """One step's rows of both kinds, packed.

    Args:
      tokenizer: with a chat template, and offsets (a "fast" one).
      triples: of this step.
      numbers: of the triples in the order drawn, as many or more; every third has no prefix.
      refusal: see `refusal_token`.
      seq: tokens of a row.
      rng: numpy generator of prefix lengths and positions.

    Returns:
      Packed rows whose mask is on at the learned positions and whose targets there are the safe
      answer's tokens, or `refusal` along harmful answers.
    """
    encoded, turns = [], []
    for number, triple in zip(numbers, triples, strict=False):
        words = len(triple.harmful.split())
        # Upstream draws 1 to len - 2 and leaves every third row without a prefix.
        length = int(rng.integers(1, words - 1)) if number % EVERY and words > 2 else 0
        for found, turn in (
            (prefixed(tokenizer, triple, length, seq), False),
            (transition(tokenizer, triple, rng, seq), True),
        ):
            if found is not None:
                encoded.append(found)
                turns.append(turn)
    rows = assign_rows([len(e.ids) for e in encoded], seq)
    out = fill(encoded, rows, max(len(rows), 1), seq)
    for r, members in enumerate(rows):
        for segment, index in enumerate(members, 1):
            if turns[index]:
                mine = (out.segment_ids[r] == segment) & (out.mask[r] > 0)
                out.targets[r, mine] = refusal
    return out
