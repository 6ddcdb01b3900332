"""Chat templates by name, for base models, which come without one.

All of them end an answer with the tokenizer's end token, so that a base model learns to stop. A
system turn takes the place of the words that come before the first instruction.
"""

import os
import pathlib

from fedsafe_jax.data.chat_template import ChatTemplateError
from fedsafe_jax.data.examples import SourceError
from fedsafe_jax.data.text_files import read_text

_BEFORE = (
    "{{- bos_token -}}"
    "{%- if messages[0]['role'] == 'system' -%}"
    "{{- messages[0]['content'] -}}{%- set turns = messages[1:] -%}"
    "{%- else -%}"
    "{{- 'PREAMBLE' -}}{%- set turns = messages -%}"
    "{%- endif -%}"
    "{%- for m in turns -%}"
    "{%- if m['role'] not in ('user', 'assistant') -%}"
    "{{- raise_exception('the roles are system, user and assistant, not ' + m['role']) -}}"
    "{%- endif -%}"
)

# The training text of OpenFedLLM (`utils/template.py`), with its blank behind the instruction.
ALPACA = (
    _BEFORE.replace(
        "PREAMBLE",
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.",
    )
    + "{%- if m['role'] == 'user' -%}"
    "{{- '\\n\\n### Instruction:\\n' + m['content'] + ' \\n\\n' -}}"
    "{%- else -%}"
    "{{- '### Response: ' + m['content'] + eos_token -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '### Response:' -}}{%- endif -%}"
)

VICUNA = (
    _BEFORE.replace(
        "PREAMBLE",
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user\\'s questions.",
    )
    + "{%- if m['role'] == 'user' -%}"
    "{{- (' ' if loop.first else '') + 'USER: ' + m['content'] + ' ' -}}"
    "{%- else -%}"
    "{{- 'ASSISTANT: ' + m['content'] + eos_token -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
)

# The end of a turn is the tokenizer's own: `<|im_end|>` is plain text to most base models.
CHATML = (
    "{{- bos_token -}}"
    "{%- for m in messages -%}"
    "{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + eos_token + '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

NAMED = {"alpaca": ALPACA, "chatml": CHATML, "vicuna": VICUNA}


def resolve(template: str) -> str:
    """Returns the Jinja text of a template.

    Args:
      template: a name of `NAMED`, a file, or Jinja text.

    Raises:
      ChatTemplateError: it is none of the three.
    """
    if template in NAMED:
        return NAMED[template]
    file = file_of(template)
    if file is None:
        return template
    try:
        _, text = read_text(file)
    except SourceError as error:
        raise ChatTemplateError(
            f"chat_template={template!r}: no Jinja text, no file that can be read, and not one of "
            f"the names {', '.join(NAMED)}."
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")  # as Jinja reads it


def file_of(template: str) -> pathlib.Path | None:
    """Returns the file that a template names, which may be missing; None for a name, Jinja text, or
    "" for none."""
    if not template or template in NAMED or "{{" in template or "{%" in template:
        return None
    return pathlib.Path(os.path.expanduser(template))
