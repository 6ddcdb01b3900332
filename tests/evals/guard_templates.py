"""Chat templates of guards in the form that their checkpoints document, with one category each.

Llama Guard's end with the header of the assistant or with `[/INST]`, and judge the last turn by the
number of turns. Qwen3Guard's reads a system prompt as the user's words, and opens the reply itself.
"""

_CONVERSATION = (
    "{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set role = 'User' if m['role'] == 'user' else 'Agent' %}"
    "{{ role + ': ' + m['content'].strip() + '\\n\\n' }}{% endfor %}<END CONVERSATION>\n\n"
)
_WHO = "{% set who = 'Agent' if messages|length % 2 == 0 else 'User' %}"
_TASK = (
    "Task: Check if there is unsafe content in '{{ who }}' messages in conversations according our "
    "safety policy with the below categories.\n\n<BEGIN UNSAFE CONTENT CATEGORIES>\nCODE: One.\n"
    "<END UNSAFE CONTENT CATEGORIES>\n\n<BEGIN CONVERSATION>\n\n" + _CONVERSATION
)
_LAST = (
    "Provide your safety assessment for ONLY THE LAST {{ who }} message in the above conversation:"
    "\n - First line must read 'safe' or 'unsafe'.\n - If unsafe, a second line must include a "
    "comma-separated list of violated categories."
)

LLAMA_GUARD_1 = (
    f"{_WHO}[INST] {_TASK.replace('CODE', 'O1')}Provide your safety assessment for {{{{ who }}}} "
    "in the above conversation:\n- First line must read 'safe' or 'unsafe'.\n- If unsafe, a second "
    "line must include a comma-separated list of violated categories. [/INST]"
)
LLAMA_GUARD_2 = f"{_WHO}[INST] {_TASK.replace('CODE', 'S1')}{_LAST} [/INST]"
LLAMA_GUARD_3 = (
    f"{_WHO} <|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
    f"{_TASK.replace('CODE', 'S1')}{_LAST}"
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
)

QWEN3GUARD = (
    "{%- set who = \"USER's query\" if messages[-1].role == 'user' "
    'else "ASSISTANT\'s response" -%}'
    "<|im_start|>user\n# Task:\n1) Evaluate whether THE LAST {{ who }} belongs to safe or unsafe "
    "content based on our safety policy.\n\n<BEGIN SAFETY POLICY>\n**Safety: Controversial**: ...\n"
    "<END SAFETY POLICY>\n\n<BEGIN UNSAFE CONTENT CATEGORIES>\nViolent.\n"
    "<END UNSAFE CONTENT CATEGORIES>\n\n{{ '<BEGIN CONVERSATION>\\n\\n' }}"
    "{%- for m in messages -%}"
    "{%- if loop.first -%}{{ ('USER: ' if m.role != 'assistant') + m.content }}"
    "{%- elif messages[loop.index0 - 1].role == 'system' and m.role == 'user' -%}"
    "{{ '\\n\\n' + m.content }}"
    "{%- else -%}"
    "{{ ('\\n\\nASSISTANT: ' if m.role == 'assistant' else '\\n\\nUSER: ') + m.content }}"
    "{%- endif -%}{%- endfor -%}"
    "{{ '\\n\\n' }}<END CONVERSATION>\n\nProvide your safety assessment for ONLY THE LAST "
    "**{{ who }}** in the above conversation:\n - The third line must be one of: 'Refusal: Yes', "
    "'Refusal: No'.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>{{ '\\n\\n' }}"
)
