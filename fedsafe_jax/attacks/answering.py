"""Answers to attacked prompts: in the chat's form or without it, with a beginning or without."""

from collections.abc import Sequence
from typing import NamedTuple

from fedsafe_jax.attacks.contract import AttackPrompt
from fedsafe_jax.data import chat, dialogue_notes
from fedsafe_jax.inference.language_model import LanguageModel


class Answers(NamedTuple):
    """Answers to attacked prompts, in their order.

    Attributes:
      own: what the model says itself.
      whole: the same behind the text that was put into its mouth.
      finished: whether each answer ended within its room.
      tokens: tokens of each prompt as the model reads it, the beginning included.
    """

    own: list[str]
    whole: list[str]
    finished: list[bool]
    tokens: list[int]


def answer(
    lm: LanguageModel, prompts: Sequence[AttackPrompt], max_new_tokens: int, batch_size: int
) -> Answers:
    """Answers attacked prompts, greedily; those too long for the context are cut.

    Args:
      lm: the model, under its adapter.
      prompts: the prompts.
      max_new_tokens: longest answer, without the beginning given.
      batch_size: rows decoded at once.
    """
    room = lm.config.max_length - max_new_tokens
    begun = [_ids(lm, prompt.begin) for prompt in prompts]
    read = [
        _prompt(lm, prompt, room - len(said)) for prompt, said in zip(prompts, begun, strict=True)
    ]
    dialogue_notes.warn(read, "prompts")
    ids = [[*one.ids, *said] for one, said in zip(read, begun, strict=True)]
    generated = lm.continue_rows(
        ids,
        [prompt.messages for prompt in prompts],
        begun,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    return Answers(
        own=[lm.text(said) for said in generated.ids],
        whole=[lm.text([*a, *b]) for a, b in zip(begun, generated.ids, strict=True)],
        finished=[bool(done) for done in generated.finished],
        tokens=[len(one) for one in ids],
    )


def _prompt(lm: LanguageModel, prompt: AttackPrompt, room: int) -> chat.Prompt:
    if prompt.chat:
        return chat.prompt(lm.tokenizer, prompt.messages, room)
    text = "\n\n".join(text for _, text in prompt.messages) + "\n"
    ids = _ids(lm, text)
    begin = [i for i in (lm.tokenizer.bos_token_id,) if i is not None]
    room -= len(begin)
    return chat.Prompt([*begin, *ids[:room]], (dialogue_notes.CUT,) if len(ids) > room else ())


def _ids(lm: LanguageModel, text: str) -> list[int]:
    return lm.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
