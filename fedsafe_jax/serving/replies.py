"""Replies in the shapes of OpenAI's API."""

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from fedsafe_jax.serving.answer_text import token_texts
from fedsafe_jax.serving.calls import Call, Choice
from fedsafe_jax.serving.schema import Asked
from fedsafe_jax.serving.served_models import ServedModels

LEAST = -9999.0  # JSON has no infinity
OBJECTS = {"chat": "chat.completion", "completion": "text_completion"}
IDS = {"chat": "chatcmpl", "completion": "cmpl"}


class Replies:
    """Writes the replies to one request.

    Args:
      asked: the request.
      models: what is served, for the texts of tokens.
      echoes: the text of each prompt, which stands before its completions where `asked.echo`.
    """

    def __init__(self, asked: Asked, models: ServedModels, echoes: Sequence[str] = ()):
        self._asked, self._models, self._echoes = asked, models, echoes
        self._is_chat, self._begun = asked.kind == "chat", set()
        self._id = f"{IDS[asked.kind]}-{secrets.token_hex(12)}"
        self._created = int(time.time())

    def whole(self, call: Call) -> dict[str, Any]:
        """Returns the reply to a request that is not streamed."""
        choices = []
        for choice in call.choices:
            out = {"index": choice.index, "finish_reason": choice.finish, "logprobs": None}
            if self._is_chat:
                message = {"role": "assistant", "content": choice.text.text, "refusal": None}
                out["message"] = message
                if choice.scores is not None:
                    out["logprobs"] = {"content": self._chat_logprobs(choice), "refusal": None}
            else:
                out["text"] = self._echo(choice) + choice.text.text
                if choice.scores is not None:
                    out["logprobs"] = self._logprobs(choice)
            choices.append(out)
        return self._frame(OBJECTS[self._asked.kind], choices) | {"usage": _usage(call)}

    def piece(self, choice: Choice, new: str) -> dict[str, Any]:
        """Returns one chunk of a stream.

        Args:
          choice: whose text it is.
          new: the text.
        """
        is_first = choice.index not in self._begun
        self._begun.add(choice.index)
        out = {"index": choice.index, "logprobs": None, "finish_reason": choice.finish or None}
        if self._is_chat:
            out["delta"] = ({"role": "assistant"} if is_first else {}) | {"content": new}
        else:
            out["text"] = (self._echo(choice) if is_first else "") + new
        return self._frame(self._chunk, [out])

    def usage(self, call: Call) -> dict[str, Any]:
        """Returns the chunk of a stream that counts tokens."""
        return self._frame(self._chunk, []) | {"usage": _usage(call)}

    @property
    def _chunk(self) -> str:
        return "chat.completion.chunk" if self._is_chat else "text_completion"

    def _frame(self, kind: str, choices: list[dict]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._asked.model,
            "choices": choices,
        }

    def _echo(self, choice: Choice) -> str:
        return self._echoes[choice.index // self._asked.n] if self._asked.echo else ""

    def _named(self, ids: Sequence[int]) -> str:
        return self._models.decode(ids, skip_special_tokens=False)

    def _scored(self, choice: Choice) -> tuple[list[int], list[str], list[float | None], list]:
        """Returns ids, texts, log-probabilities and likeliest (id, value) of the tokens shown."""
        ids, scores, shown = [*choice.prompt, *choice.text.ids], choice.scores, slice(None)
        own = [None, *(max(float(x), LEAST) for x in scores.log_probs)]
        count = self._asked.top or 0
        tops: list = [None]
        for row, values in zip(scores.top_ids, scores.top_log_probs, strict=True):
            pairs = zip(row[:count].tolist(), values[:count].tolist(), strict=True)
            tops.append([(i, max(x, LEAST)) for i, x in pairs])
        if not self._asked.echo:
            shown = slice(len(choice.prompt), None)
        texts = token_texts(self._named, ids)
        return ids[shown], texts[shown], own[shown], tops[: len(ids)][shown]

    def _logprobs(self, choice: Choice) -> dict[str, Any]:
        ids, texts, own, tops = self._scored(choice)
        offsets, by_text = [], []
        begin = 0 if self._asked.echo else len(self._echoes[choice.index // self._asked.n])
        for token, text, value, top in zip(ids, texts, own, tops, strict=True):
            offsets.append(begin)
            begin += len(text)
            if top is None or value is None:
                by_text.append(None)
                continue
            likeliest: dict[str, float] = {}
            for i, x in [*top, (token, value)]:  # the token itself belongs to them
                likeliest.setdefault(self._named([i]), x)
            by_text.append(likeliest)
        return {
            "tokens": texts,
            "token_logprobs": own,
            "top_logprobs": by_text if self._asked.top else None,
            "text_offset": offsets,
        }

    def _chat_logprobs(self, choice: Choice) -> list[dict[str, Any]]:
        ids, texts, own, tops = self._scored(choice)
        return [
            _token(text, value) | {"top_logprobs": [_token(self._named([i]), x) for i, x in top]}
            for _, text, value, top in zip(ids, texts, own, tops, strict=True)
        ]


def event(content: dict[str, Any] | str) -> str:
    """Returns a server-sent event."""
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return f"data: {text}\n\n"


def _token(text: str, value: float) -> dict[str, Any]:
    return {"token": text, "logprob": value, "bytes": list(text.encode())}


def _usage(call: Call) -> dict[str, int]:
    prompt, completion = call.prompt_tokens, call.completion_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
