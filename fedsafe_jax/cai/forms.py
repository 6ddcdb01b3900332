"""Forms in which a model is asked for critique and revision, and in which its text is read back.

Threads are (role, text) turns whose roles are the keys of `LABELS`. An instruct model sees them as
a chat of user and assistant; a base model as one text in the form of Bai et al. (2022, arXiv
2212.08073), which `DIALOGUE` writes as a chat template.
"""

import re
from collections.abc import Sequence

from fedsafe_jax.data.refusals import spoken

LABELS = {
    "user": "Human",
    "assistant": "Assistant",
    "critique_request": "CritiqueRequest",
    "critique": "Critique",
    "revision_request": "RevisionRequest",
    "revision": "Revision",
}
ANSWERED_BY = {
    "user": "assistant",
    "tool": "assistant",
    "critique_request": "critique",
    "revision_request": "revision",
}

DIALOGUE = (
    "{%- set labels = " + repr(LABELS) + " -%}"
    "{%- set answers = " + repr(ANSWERED_BY) + " -%}"
    "{%- for m in messages -%}"
    # The form has no word for a system prompt, which stands bare at the top, or for a tool.
    "{{ '\n\n' + ('' if m['role'] == 'system' else "
    "labels.get(m['role'], m['role'] | capitalize) + ': ') + m['content'] }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{ '\n\n' + labels[answers[messages[-1]['role']]] + ':' }}"
    "{%- endif -%}"
)

# White space is read once, from where it begins: at each of its line breaks anew, a text of line
# breaks alone would take a time that grows as its square.
_NEXT_TURN = re.compile(
    r"(?<!\s)(?=[^\S\n]*+\n)\s++(?:Human|Assistant|(?:Critique|Revision)(?:Request)?):"
)
_LABEL = (
    r"(?:Critique|Revision|(?:[Tt]he )?[Rr]evised (?:[Rr]esponse|[Aa]nswer|[Vv]ersion)[^\n:]{0,40})"
)
_SENTENCE = r"(?:Here (?:is|are)|Here's)\b[^\n:]{0,80}"
_LEAD = re.compile(
    r"^(?:(?:Sure|Certainly|Of course|Okay)[,.!]?\s+)?(?:"
    rf"(?:{_LABEL}|{_SENTENCE}):"
    # In Markdown: bold, the colon inside or outside, or a heading, where it may be left out.
    rf"|([*_]{{1,3}})(?:(?:{_LABEL}|{_SENTENCE})(?::\1|\1 *:)|{_LABEL}\1 *\n)"
    rf"|#{{1,6}} +[*_]{{0,3}}(?:{_LABEL}:?|{_SENTENCE}:)[*_]{{0,3}} *\n"
    r")\s*"
)
_QUOTES = {'"': '"', "“": "”"}


def as_chat(thread: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Rewrites a thread as turns of user and assistant."""
    spoken = {"critique_request": "user", "revision_request": "user"}
    spoken |= {"critique": "assistant", "revision": "assistant"}
    return [(spoken.get(role, role), text) for role, text in thread]


def clean(text: str) -> tuple[str, bool]:
    """Removes from a model's text whatever is not the answer itself.

    That is a thought in front, a label or a sentence that announces the text ("Here is the
    revised response:"), quotes around it, and everything from where the model goes on as another
    speaker.

    Returns:
      `(text, ended)`: ended when the model went on as another speaker, so that the
      text is complete.
    """
    text = spoken(text).strip()
    text = _LEAD.sub("", text, count=1)
    parts = _NEXT_TURN.split("\n" + text, maxsplit=1)
    text, ended = parts[0].strip(), len(parts) > 1
    # Only where they enclose the whole: an answer may begin and end with different quotations.
    if len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    return text, ended
