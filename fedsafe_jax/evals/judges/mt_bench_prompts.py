"""The rubric of MT-Bench, asked and read as FastChat does (Zheng et al., 2023, arXiv 2306.05685).

The wording is FastChat's, in `mt_bench_wording`.
"""

import re
from collections.abc import Sequence

from fedsafe_jax.data.refusals import spoken
from fedsafe_jax.evals.judges.contract import FAILED, Answered, Verdict
from fedsafe_jax.evals.judges.mt_bench_wording import PROMPTS

NEED_REFERENCE = ("math", "reasoning", "coding")  # categories, FastChat's NEED_REF_CATS
LOWEST, HIGHEST = 1.0, 10.0  # the scale of the rating
_RATING, _BACKUP = r"\[\[(-?\d+\.?\d*)\]\]", r"\[(-?\d+\.?\d*)\]"


def prompt_name(category: str, turns: int) -> str:
    """Returns the name of the prompt that FastChat asks with.

    Args:
      category: category of the question; some are judged beside a reference answer.
      turns: turns of the user, 1 or 2.
    """
    kind = "single-math-v1" if category in NEED_REFERENCE else "single-v1"
    return kind if turns == 1 else f"{kind}-multi-turn"


def ask(answered: Answered) -> list[list[dict]]:
    """Returns the conversation that FastChat asks a judge about an answer.

    [] where FastChat has no wording: for more than two turns, and for mathematics, reasoning and
    coding without a reference answer to each turn. Such an answer is left unjudged.
    """
    turns = [(role, text) for role, text in answered.messages if role in ("user", "assistant")]
    asked = [text for role, text in turns if role == "user"]
    said = [spoken(text) for role, text in turns if role == "assistant"]
    said.append(spoken(answered.answer))
    needed = len(asked) if answered.category in NEED_REFERENCE else 0
    if len(asked) not in (1, 2) or len(said) != len(asked) or len(answered.references) < needed:
        return []
    words = {f"ref_answer_{i}": text for i, text in enumerate(answered.references[:needed], 1)}
    if len(asked) == 1:
        words |= {"question": asked[0], "answer": said[0]}
    else:
        words |= {f"question_{i}": text for i, text in enumerate(asked, 1)}
        words |= {f"answer_{i}": text for i, text in enumerate(said, 1)}
    prompt = PROMPTS[prompt_name(answered.category, len(asked))]
    return [
        [
            {"role": "system", "content": prompt["system_prompt"]},
            {"role": "user", "content": prompt["prompt_template"].format(**words)},
        ]
    ]


def parse_rating(text: str) -> float | None:
    """Returns the rating in the last `[[...]]`, or without one in the last `[...]`.

    None where that is none from 1 to 10. The patterns are FastChat's, which takes the first match
    and any number: but what stands before the verdict may be quoted from the question or answer.
    """
    matches = re.findall(_RATING, text) or re.findall(_BACKUP, text)
    rating = float(matches[-1]) if matches else 0.0
    return rating if LOWEST <= rating <= HIGHEST else None


def read(replies: Sequence[str]) -> Verdict:
    """Returns the rating of the reply; a failure without one."""
    rating = parse_rating(replies[0]) if replies else None
    return FAILED if rating is None else Verdict(None, rating)
