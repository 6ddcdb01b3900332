"""Rows and labels of decoupled refusal training, DeRTa (Yuan et al., 2024, arXiv 2407.09121).

A harmful and a safe answer to the same request make two rows: (a) the safe answer behind the first
words of the harmful one, so that a model can turn back after it has begun; (b) the harmful answer,
where at a random twentieth of its positions the first token of a refusal is learned, "reinforced
transition optimisation".
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fedsafe_jax.data import chat
from fedsafe_jax.data.chat import Encoded
from fedsafe_jax.data.examples import Messages
from fedsafe_jax.data.packing import Batch, assign_rows, fill

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

POSITIONS_PER_TRANSITION = 20  # 1 in 20 positions of a harmful answer gets the transition loss
ROWS_PER_BARE_ROW = 3  # 1 in 3 safe answers has no harmful prefix


class Triple(NamedTuple):
    """A request with a harmful and a safe answer, as text.

    Attributes:
      prompt: the request, which is the last turn of the user.
      harmful, safe: the answers.
      messages: all (role, text) turns before the answers; () where the prompt is all.
    """

    prompt: str
    harmful: str
    safe: str
    messages: Messages = ()

    @property
    def turns(self) -> Messages:
        """The dialogue that both answer."""
        return self.messages or (("user", self.prompt),)


def refusal_token(tokenizer: "PreTrainedTokenizerBase", word: str = " Sorry") -> int:
    """Returns the first token of `word` that is not blank.

    The word has a leading blank, since the token stands within a sentence.

    Raises:
      ValueError: the word has no token.
    """
    for token in tokenizer(word, add_special_tokens=False)["input_ids"]:
        if tokenizer.decode([token]).strip():
            return token
    raise ValueError(f"cai.refusal_word={word!r}: the tokenizer has no token for it.")


def prefixed(
    tokenizer: "PreTrainedTokenizerBase", triple: Triple, words: int, max_length: int
) -> Encoded | None:
    """Encodes the safe answer, learned, behind words of the harmful one, not learned.

    Args:
      tokenizer: a fast tokenizer (it gives offsets) with a chat template.
      triple: the request and its answers.
      words: number of words of the harmful answer.
      max_length: most tokens of the row.

    Returns:
      None when no learned token is left within `max_length`.
    """
    question = triple.turns
    prefix, safe = " ".join(triple.harmful.split()[:words]), triple.safe.strip()
    answer = f"{prefix} {safe}" if prefix else safe
    # The first token of the safe answer may begin at the blank before it.
    return chat.encode_behind(
        tokenizer, question, answer, max_length=max_length, unlearned=len(prefix)
    )


def transition(
    tokenizer: "PreTrainedTokenizerBase",
    triple: Triple,
    rng: np.random.Generator,
    refusal: int,
    max_length: int,
) -> Encoded | None:
    """Encodes the harmful answer; a random twentieth of its positions, at least one, learns
    `refusal`, see `refusal_token`."""
    whole = chat.encode(tokenizer, triple.turns, triple.harmful, max_length)
    if whole is None:
        return None
    places = np.flatnonzero(whole.loss_mask)
    kept = rng.choice(places, size=-(-len(places) // POSITIONS_PER_TRANSITION), replace=False)
    learned = np.zeros(len(whole.ids), bool)
    learned[kept] = True
    return whole._replace(loss_mask=learned, target=refusal)


def both_rows(
    tokenizer: "PreTrainedTokenizerBase",
    triple: Triple,
    rng: np.random.Generator,
    refusal: int,
    max_length: int,
    bare: bool,
) -> list[Encoded]:
    """Encodes the safe answer behind words of the harmful one, and the way from the latter.

    Args:
      tokenizer: a fast tokenizer (it gives offsets) with a chat template.
      triple: the request and its answers.
      rng: generator of the number of words, and of positions.
      refusal: refusal token, see `refusal_token`.
      max_length: most tokens of a row.
      bare: whether the safe answer stands alone, as for every third request upstream.

    Returns:
      The rows of which something is left to learn within `max_length`, at most two.
    """
    words = len(triple.harmful.split())
    # Upstream draws 1 to len - 2.
    length = 0 if bare or words <= 2 else int(rng.integers(1, words - 1))
    rows = (
        prefixed(tokenizer, triple, length, max_length),
        transition(tokenizer, triple, rng, refusal=refusal, max_length=max_length),
    )
    return [row for row in rows if row is not None]


def batch(
    tokenizer: "PreTrainedTokenizerBase",
    triples: Sequence[Triple],
    numbers: Sequence[int],
    refusal: int,
    seq: int,
    rng: np.random.Generator,
) -> Batch:
    """Packs one step's rows of both kinds.

    Args:
      tokenizer: a fast tokenizer (it gives offsets) with a chat template.
      triples: triples of this step.
      numbers: number of each triple in the order drawn, at least as many as triples; every third
        triple has no prefix.
      refusal: refusal token, see `refusal_token`.
      seq: tokens of a row.
      rng: generator of prefix lengths and positions.

    Returns:
      Packed rows whose mask is on at the learned positions and whose targets there are the safe
      answer's tokens, or `refusal` along harmful answers.
    """
    encoded = [
        row
        for number, triple in zip(numbers, triples, strict=False)
        for row in both_rows(
            tokenizer,
            triple,
            rng,
            refusal=refusal,
            max_length=seq,
            bare=number % ROWS_PER_BARE_ROW == 0,
        )
    ]
    rows = assign_rows([len(e.ids) for e in encoded], seq)
    return fill(encoded, rows, max(len(rows), 1), seq)
