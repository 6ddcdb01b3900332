"""Requests of OpenAI's API, checked field by field.

A field that would change the answer and that is not served is an error, not ignored. What only
names or files a request away is taken and not used.
"""

import secrets
from typing import Any, NamedTuple

from fedsafe_jax.inference.sampling import Sampling
from fedsafe_jax.serving.errors import malformed
from fedsafe_jax.serving.fields import Fields, check_text, is_whole, read_turn, shown

MOST_CHOICES = 128
MOST_STOPS = 32
MOST_STOP_LETTERS = 1000
MOST_TOP = 20  # likeliest tokens beside each token
LEAST_TEMPERATURE = 0.01  # below, logits divided by it leave float32
DEFAULT_TOKENS = {"chat": 256, "completion": 16}
SEEDS = 2**63


class Asked(NamedTuple):
    """A request.

    Attributes:
      kind: "chat" or "completion".
      model: name of the model.
      dialogue: (role, text) turns of a chat.
      prompts: texts or token ids of a completion.
      max_tokens: longest answer; 0 only scores the prompt; None for `DEFAULT_TOKENS`, or what the
        context has room for.
      n: answers to each prompt.
      sampling: how tokens are drawn.
      seed: seed of the samples.
      stop: texts that end an answer.
      top: likeliest tokens given beside the log-probability of each token; None for neither.
      echo: whether the prompt stands before its completion.
      stream: whether pieces are sent as they come.
      usage: whether a stream ends with the number of tokens.
    """

    kind: str
    model: str
    dialogue: tuple[tuple[str, str], ...]
    prompts: tuple[str | tuple[int, ...], ...]
    max_tokens: int | None
    n: int
    sampling: Sampling
    seed: int
    stop: tuple[str, ...]
    top: int | None
    echo: bool
    stream: bool
    usage: bool


def read_chat(content: dict[str, Any]) -> Asked:
    """Reads a request to `/v1/chat/completions`.

    Raises:
      ApiError: a field is missing, wrong, unknown or not served; it is named.
    """
    fields = _Asking(content)
    dialogue = _dialogue(fields.take("messages"))
    most = [fields.whole(name, None, 1) for name in ("max_completion_tokens", "max_tokens")]
    wanted = fields.flag("logprobs")
    top = fields.whole("top_logprobs", None, 0, most=MOST_TOP)
    if top is not None and not wanted:
        raise malformed("'top_logprobs' needs 'logprobs': true.", "top_logprobs")
    given = [x for x in most if x is not None]
    return fields.asked(
        kind="chat",
        dialogue=dialogue,
        prompts=(),
        max_tokens=given[0] if given else None,
        top=(top or 0) if wanted else None,
        echo=False,
    )


def read_completion(content: dict[str, Any]) -> Asked:
    """Reads a request to `/v1/completions`.

    Raises:
      ApiError: a field is missing, wrong, unknown or not served; it is named.
    """
    fields = _Asking(content)
    prompts = _prompts(fields.take("prompt"))
    most = fields.whole("max_tokens", None, 0)
    top, echo = fields.whole("logprobs", None, 0, most=MOST_TOP), fields.flag("echo")
    if most == 0 and not echo:
        raise malformed("'max_tokens' of 0 needs 'echo': true: nothing is asked.", "max_tokens")
    return fields.asked(
        kind="completion", dialogue=(), prompts=prompts, max_tokens=most, top=top, echo=echo
    )


class _Asking(Fields):
    """The fields that chats and completions share."""

    def _stop(self) -> tuple[str, ...]:
        stop = self.typed(
            "stop", [], lambda x: isinstance(x, (str, list)), what="a text or a list of texts"
        )
        stop = [stop] if isinstance(stop, str) else stop
        if len(stop) > MOST_STOPS:
            raise malformed(f"'stop' holds {len(stop)} texts; at most {MOST_STOPS}.", "stop")
        for i, text in enumerate(stop):
            check_text(text, f"stop[{i}]")
            if not 0 < len(text) <= MOST_STOP_LETTERS:
                raise malformed(f"'stop[{i}]' must have 1 to {MOST_STOP_LETTERS} letters.", "stop")
        return tuple(stop)

    def _sampling(self) -> Sampling:
        temperature = self.number(
            "temperature",
            1.0,
            lambda x: x == 0 or LEAST_TEMPERATURE <= x <= 2,
            what=f"0, or from {LEAST_TEMPERATURE} to 2",
        )
        top_p = self.number("top_p", 1.0, lambda x: 0 < x <= 1, what="above 0 and at most 1")
        min_p = self.number("min_p", 0.0, lambda x: 0 <= x < 1, what="from 0 to below 1")
        top_k = self.typed(
            "top_k", 0, lambda x: is_whole(x) and x >= -1, what="a whole number, 0 or -1 for all"
        )
        if not temperature:
            return Sampling()  # the rest is not read, and one program serves all
        return Sampling(temperature, min(max(top_k, 0), 2**20), top_p, min_p)

    def asked(self, **known: Any) -> Asked:
        model, sampling = self.take("model"), self._sampling()
        if not isinstance(model, str):
            raise malformed(f"'model' must be a text, not {shown(model)}.", "model")
        seed = self.typed("seed", None, is_whole, what="a whole number")
        n = self.whole("n", 1, 1, most=MOST_CHOICES)
        stream, stop = self.flag("stream"), self._stop()
        usage = self._usage(stream)
        self.check_rest()
        if stream and known["top"] is not None:
            raise malformed("'logprobs' are not served in a stream; leave one out.", "logprobs")
        return Asked(
            model=model,
            n=n,
            sampling=sampling,
            seed=secrets.randbelow(SEEDS) if seed is None else seed % SEEDS,
            stop=stop,
            stream=stream,
            usage=usage,
            **known,
        )

    def _usage(self, stream: bool) -> bool:
        options = self.typed("stream_options", {}, lambda x: isinstance(x, dict), what="an object")
        if options and not stream:
            raise malformed("'stream_options' needs 'stream': true.", "stream_options")
        inner = Fields({k: v for k, v in options.items() if k != "include_obfuscation"})
        usage = inner.flag("include_usage")
        inner.check_rest("stream_options.")
        return usage


def _prompts(given: Any) -> tuple[str | tuple[int, ...], ...]:
    """Returns the prompts of a completion: a text, token ids, or a list of either."""
    if isinstance(given, str) or (isinstance(given, list) and given and is_whole(given[0])):
        given = [given]
    if not isinstance(given, list) or not given:
        raise malformed("'prompt' must be a text, token ids, or a list of these.", "prompt")
    prompts: list[str | tuple[int, ...]] = []
    for i, one in enumerate(given):
        if isinstance(one, list):
            if not all(is_whole(x) and 0 <= x < 2**31 for x in one):
                raise malformed(f"'prompt[{i}]' must hold token ids, whole numbers.", "prompt")
            prompts.append(tuple(one))
        else:
            check_text(one, f"prompt[{i}]")
            prompts.append(one)
    return tuple(prompts)


def _dialogue(given: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(given, list) or not given:
        raise malformed("'messages' must be a list of {role, content}, not empty.", "messages")
    turns = [read_turn(one, f"messages[{i}]") for i, one in enumerate(given)]
    if turns[-1][0] != "user":
        raise malformed("'messages' must end with a user's message.", "messages")
    return tuple(turns)
