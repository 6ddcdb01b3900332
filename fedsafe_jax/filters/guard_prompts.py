"""Prompts of a guard: a pair in the template that asks for the verdict, as token ids.

A guard reads the whole dialogue. Its template is never cut: the oldest turns are.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fedsafe_jax.data import chat
from fedsafe_jax.data.examples import Example, Messages
from fedsafe_jax.data.shortening import beginning_of, end_of, shorten, without_middle
from fedsafe_jax.filters import policy
from fedsafe_jax.filters.pair_rows import CHARACTERS_PER_TOKEN
from fedsafe_jax.filters.protocol import FilterError, warn_of_cuts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHORTEST = 8  # tokens of request and response each, below which a verdict means nothing


def verdict_ids(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, int]:
    """Returns the first token of "safe" and of "unsafe".

    Raises:
      FilterError: the tokenizer gives both the same first token.
    """
    safe, unsafe = (
        tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("safe", "unsafe")
    )
    if safe == unsafe:
        raise FilterError("filter.model: 'safe' and 'unsafe' begin with the same token.")
    return safe, unsafe


def template_of(tokenizer: "PreTrainedTokenizerBase", max_length: int) -> str:
    """Chooses the template of a guard.

    `own` where the chat template carries the task (Llama Guard); else `policy` with all categories,
    or `short` where the categories would fill more than half of a row.
    """
    if policy.MARKER in (tokenizer.chat_template or ""):
        return "own"
    bare = tokenizer(policy.task((("user", ""),), ""), add_special_tokens=False)["input_ids"]
    return "policy" if 2 * len(bare) <= max_length else "short"


def alternating(messages: Messages) -> Messages:
    """Rewrites a dialogue as turns of user and assistant by turns, the user's first and last.

    Llama Guard's template knows these two alone, and reads from the number of turns whose words it
    is to judge: with one more turn it would judge the request. What the system or a tool says is
    read as the user's.
    """
    turns: list[tuple[str, str]] = []
    for role, text in messages:
        role = "assistant" if role == "assistant" else "user"
        if turns and turns[-1][0] == role:
            turns[-1] = (role, f"{turns[-1][1]}\n\n{text}")
        else:
            turns += [("user", "")] * (role == "assistant" and not turns)
            turns.append((role, text))
    return tuple(turns)


def render_pairs(
    tokenizer: "PreTrainedTokenizerBase", pairs: Sequence[Example], max_length: int, template: str
) -> list[list[int]]:
    """Tokenises each pair in the guard's template, up to where the verdict comes.

    Args:
      tokenizer: Hugging Face tokenizer of the guard.
      pairs: pairs to render; the response, and a request that stands alone, are each cut to half
        of the room that the template leaves. Of a longer dialogue the oldest turns are left out
        first, and its system prompt last; see `data.shortening.shorten`.
      max_length: most tokens of a row.
      template: `own`, `policy` or `short`, see `template_of`.

    Raises:
      FilterError: the template leaves too little room.
    """
    # Llama Guard 3's first token is a blank line.
    lead = tokenizer("\n\n", add_special_tokens=False)["input_ids"] if template == "own" else []

    def wrap(messages, response):
        turns = [*alternating(messages), ("assistant", response)]
        if template != "own":
            turns = [("user", policy.task(messages, response, template == "short"))]
        return [*chat.render(tokenizer, turns, add_generation_prompt=True), *lead]

    rows, cut = fit_pairs(tokenizer, pairs, max_length, wrap)
    warn_of_cuts(cut, len(pairs), max_length)
    return rows


def fit_pairs(
    tokenizer: "PreTrainedTokenizerBase",
    pairs: Sequence[Example],
    max_length: int,
    wrap: Callable[[Messages, str], list[int]],
) -> tuple[list[list[int]], int]:
    """Tokenises each pair in a guard's wording, cut until it fits.

    Args:
      tokenizer: Hugging Face tokenizer of the guard.
      pairs: pairs to render, cut as `render_pairs` says.
      max_length: most tokens of a row.
      wrap: `(messages, response) -> token ids` of the whole row.

    Returns:
      `(rows, how many of the pairs were cut)`.

    Raises:
      FilterError: the wording leaves too little room.
    """
    # Cut texts may re-tokenise to a few tokens more than they were cut to.
    half = (max_length - len(wrap((("user", ""),), ""))) // 2 - 4
    if half < SHORTEST:
        raise FilterError(
            f"filter.max_length={max_length}: the guard's template leaves no room for the pair; "
            f"use at least {max_length + 2 * (SHORTEST - half)}."
        )

    limit, rows, cut = CHARACTERS_PER_TOKEN * max_length, [], 0
    for pair in pairs:
        response = beginning_of(tokenizer, pair.response[:limit], half)
        # Few tokens are longer than the limit: tokenising what cannot stay would be wasted time.
        if len(pair.messages) == 1:
            ((role, text),) = pair.messages
            messages = ((role, end_of(tokenizer, text[-limit:], half)),)
        else:
            messages = tuple(
                (role, text[:limit] if role == "system" else without_middle(text, limit))
                for role, text in pair.messages
            )
        row = wrap(messages, response)
        if len(row) > max_length:

            def fits(turns: Sequence[tuple[str, str]], said: str = response) -> bool:
                return len(wrap(turns, said)) <= max_length

            # The last turn alone where the names of very many turns would fill the row.
            shorter = shorten(messages, fits) or shorten(messages[-1:], fits)
            messages = tuple(shorter[0]) if shorter else messages
            row = wrap(messages, response)
        cut += messages != tuple(pair.messages) or response != pair.response
        rows.append(row)
    return rows, cut
