"""Prompts of a guard: a pair in the template that asks for the verdict, as token ids."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedsafe_jax.data import chat
from fedsafe_jax.data.examples import Example
from fedsafe_jax.filters import policy
from fedsafe_jax.filters.classifier import CHARACTERS_PER_TOKEN
from fedsafe_jax.filters.protocol import FilterError

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
    bare = tokenizer(policy.task("", ""), add_special_tokens=False)["input_ids"]
    return "policy" if 2 * len(bare) <= max_length else "short"


def render_pairs(
    tokenizer: "PreTrainedTokenizerBase", pairs: Sequence[Example], max_length: int, template: str
) -> list[list[int]]:
    """Tokenises each pair in the guard's template, up to where the verdict comes.

    Args:
      tokenizer: Hugging Face tokenizer of the guard.
      pairs: pairs to render; request and response are each cut to half of the room that the
        template leaves.
      max_length: most tokens of a row.
      template: `own`, `policy` or `short`, see `template_of`.

    Raises:
      FilterError: the template leaves too little room.
    """
    # Llama Guard 3's first token is a blank line.
    lead = tokenizer("\n\n", add_special_tokens=False)["input_ids"] if template == "own" else []

    def wrap(request, response):
        turns = [("user", request), ("assistant", response)]
        if template != "own":
            turns = [("user", policy.task(request, response, template == "short"))]
        return [*chat.render(tokenizer, turns, add_generation_prompt=True), *lead]

    # Cut texts may re-tokenise to a few tokens more than they were cut to.
    half = (max_length - len(wrap("", ""))) // 2 - 4
    if half < SHORTEST:
        raise FilterError(
            f"filter.max_length={max_length}: the guard's template leaves no room for the pair; "
            f"use at least {max_length + 2 * (SHORTEST - half)}."
        )

    def cut(text, keep):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return text if len(ids) <= half else tokenizer.decode(ids[keep])

    limit, rows = CHARACTERS_PER_TOKEN * max_length, []
    for pair in pairs:
        request = cut(pair.prompt[-limit:], slice(-half, None))
        rows.append(wrap(request, cut(pair.response[:limit], slice(half)))[-max_length:])
    return rows
