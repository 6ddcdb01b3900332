"""Language models as users hold them, and batched generation with a KV cache.

`language_model` is the entry: it renders dialogues and answers them through `generation`, which
packs prompts (`prompt_packing`) and runs the compiled programs of `decoding` with the settings of
`sampling`. `chat_session` answers dialogues turn by turn with a prefix cache.
"""

from fedsafe_jax.inference.chat_session import ChatSession
from fedsafe_jax.inference.language_model import LanguageModel
from fedsafe_jax.inference.pretrained import load_pretrained, save_pretrained
from fedsafe_jax.inference.sampling import GREEDY, Sampling

__all__ = [
    "GREEDY",
    "ChatSession",
    "LanguageModel",
    "Sampling",
    "load_pretrained",
    "save_pretrained",
]
