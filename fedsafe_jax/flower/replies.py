"""The schema of what sites send: a reply is parsed whole, with bounds, before any of it is used.

Whatever reading one site's reply raises concerns that site alone. `checked` turns it into a
`ReplyError`, one printable line that goes to the server's log.
"""

import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
from flwr.app import Message, RecordDict
from jax.flatten_util import ravel_pytree

from fedsafe_jax.filters.actions import FilterCounts
from fedsafe_jax.flower import wire
from fedsafe_jax.validation import one_line

LINE = 140  # characters of a line that come from a site; with what stands before, less than 200
MOST_TEXT = 65536  # characters of a description; one of this package has some 500
MOST = 2**31  # of anything that a site counts
MOST_LOSS = 1e6  # nats per token: more is no loss, and would drown the others' in the mean

Read = TypeVar("Read")


class ReplyError(ValueError):
    """A reply is an error, a refusal, or not what a site of this package sends."""


class SiteUpdate(NamedTuple):
    """What a site sends after its local steps, checked.

    Attributes:
      update: float32 `[params]`, the change of the adapter, flat.
      control: change of SCAFFOLD's control variate, shaped like the factors; () without.
      losses: float32 `[steps]`, nats per target token, at least 0.
      active: float32 `[steps]`, 1 where a step had targets, else 0.
      tokens: tokens of its batches, padding not counted.
      finite: whether update and control are finite, and so is the sum of their squares in float32,
        as a simulation asks of its clients; nothing else is to be used where they are not.
    """

    update: np.ndarray
    control: Any
    losses: np.ndarray
    active: np.ndarray
    tokens: int
    finite: bool


def said(text: object) -> str:
    """Returns what a site said as one printable line of at most `LINE` characters.

    Args:
      text: the last line with something in it counts, as in a traceback.
    """
    if not isinstance(text, str):
        return f"(no text, but {type(text).__name__})"
    # Cut before anything is done with it: it may be as long as a message may.
    lines = [one for one in map(one_line, text[-64 * LINE :].splitlines()) if one]
    line = lines[-1] if lines else "(no reason given)"
    return line if len(line) <= LINE else line[: LINE - 1] + "…"


def checked(message: Message | ReplyError, parse: Callable[[RecordDict], Read]) -> Read:
    """Parses the reply of one site.

    Args:
      message: the reply, or Flower's report of an error, or why there is neither.
      parse: `content -> what it holds`, such as `read_description`.

    Raises:
      ReplyError: the site refused, or failed, or its reply does not hold what it should; the text
        is one printable line.
    """
    try:
        if isinstance(message, ReplyError):
            raise message
        if message.has_error():
            raise ReplyError(message.error.reason)
        if "refused" in message.content:
            raise ReplyError(wire.refusal(message.content.config_records["refused"]))
        return parse(message.content)
    except (ReplyError, wire.WireError) as error:
        raise ReplyError(said(error.args[0])) from None
    except Exception as error:  # whatever a forged reply makes a parser raise: its name says enough
        raise ReplyError(f"its reply cannot be read ({type(error).__name__})") from None


def read_description(content: RecordDict) -> dict:
    """Reads the reply of `Site.describe`, field by field.

    Args:
      content: reply of a site.

    Returns:
      `client`, the site's number; `examples`, its pairs after filtering; `learned`, the sum of
      their weights; `base`, the fingerprint of its base model; `counts`, a `FilterCounts`; `near`,
      pairs dropped near evaluation prompts.

    Raises:
      ReplyError: a field is missing, of another type or out of bounds.
      Exception: of any kind, where the JSON is none; see `checked`.
    """
    text = content.config_records["site"]["json"]
    if not isinstance(text, str) or len(text) > MOST_TEXT:
        raise ReplyError(f"its description is no text of at most {MOST_TEXT} characters")
    whole = json.loads(text)
    # Sites do not know which of their pairs are unsafe.
    hidden = {k: 0 for k in FilterCounts._fields if k.startswith("unsafe")}
    shown = {k: _count(_group(whole, "filter"), k) for k in FilterCounts._fields if k not in hidden}
    dropped = ("dropped_near_evaluation", "dropped_heldout")
    client, examples = _count(whole, "client"), _count(whole, "examples")
    learned, base = _number(whole, "learned"), whole.get("base")
    if not 0 <= learned <= examples * (1 + 1e-6):  # also false for NaN
        raise ReplyError(f"learned={learned}: expected 0 to {examples}, its number of pairs")
    if not isinstance(base, str):
        raise ReplyError(f"base={base!r:.40}: expected the fingerprint of a base model")
    return {
        "client": client,
        "examples": examples,
        "learned": learned,
        "base": base,
        "counts": FilterCounts(**shown, **hidden),
        "near": sum(_count(_group(whole, "data"), k) for k in dropped),
    }


def read_update(
    content: RecordDict, factors: Any, control: Any, steps: int, most_tokens: int
) -> SiteUpdate:
    """Reads the reply of a site's local steps. Lengths are measured, never read.

    Args:
      content: reply of a site.
      factors: LoRA factors of the server.
      control: SCAFFOLD's control variate; () without.
      steps: local steps of the round.
      most_tokens: most tokens that these steps can have.

    Raises:
      ReplyError: a number is missing, of another type or out of bounds.
      WireError: an array is missing, unknown, or of another shape, dtype or size.
      Exception: of any kind; see `checked`.
    """
    figures = np.zeros(steps, np.float32)
    like = {"update": factors, "control": control, "losses": figures, "active": figures}
    tree = wire.tree(content.array_records["update"], like)
    numbers = content.metric_records["numbers"]
    tokens = _count(numbers, "useful_tokens", most_tokens)
    # A site knows of more than it sends, such as its own state, and may leave itself out.
    finite = bool(_count(numbers, "finite", 1))
    update = np.asarray(ravel_pytree(tree["update"])[0])
    finite = finite and _measurable(update) and _measurable(ravel_pytree(tree["control"])[0])
    losses, active = tree["losses"], (tree["active"] > 0).astype(np.float32)
    if not finite:
        losses = active = figures
    elif not np.isfinite(losses).all():
        raise ReplyError("its losses are not finite, though its update is")
    losses = np.clip(losses, 0.0, np.float32(MOST_LOSS))
    return SiteUpdate(
        update=update,
        control=tree["control"],
        losses=losses,
        active=active,
        tokens=tokens,
        finite=finite,
    )


def _measurable(flat: np.ndarray) -> bool:
    """Tells whether the sum of squares is finite in float32: a length can then be computed."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(np.square(np.asarray(flat, np.float32)).sum(dtype=np.float32)))


def _group(whole: Any, name: str) -> dict:
    if not isinstance(whole, dict) or not isinstance(whole.get(name), dict):
        raise ReplyError(f"its description has no group {name!r}")
    return whole[name]


def _number(whole: dict, name: str) -> float:
    value = whole.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > MOST:
        raise ReplyError(f"{name}={value!r:.40}: expected 0 to {MOST}")
    return float(value)


def _count(whole: dict, name: str, most: int = MOST) -> int:
    value = _number(whole, name)
    if not (math.isfinite(value) and value == int(value) and 0 <= value <= most):
        raise ReplyError(f"{name}={value}: expected a whole number from 0 to {most}")
    return int(value)
