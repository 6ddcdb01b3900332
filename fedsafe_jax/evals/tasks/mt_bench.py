"""MT-Bench (Zheng et al., 2023): two-turn questions graded 1 to 10, and pairwise win rates.

The grader is any callable from messages to text, such as `judges.ChatEndpoint`.
"""

import re
from collections.abc import Callable, Sequence

from fedsafe_jax.data import sources
from fedsafe_jax.data.examples import SourceError

GRADE = (
    "Please act as an impartial judge and rate the quality of the assistant's last answer. "
    "Consider helpfulness, relevance, accuracy and detail. Explain briefly, then rate it on a "
    'scale of 1 to 10 strictly in this format: "[[rating]]", for example "Rating: [[5]]".'
    "\n\n{dialogue}"
)
COMPARE = (
    "Please act as an impartial judge and compare two answers to the question. The order of the "
    'answers must not matter. Explain briefly, then give your verdict strictly as "[[A]]", "[[B]]" '
    'or "[[C]]" '
    "for a tie.\n\n[Question]\n{question}\n\n[Answer A]\n{a}\n\n[Answer B]\n{b}"
)


def load_questions(location: str, data_dir: str) -> list[list[str]]:
    """The turns of each question of `question.jsonl`."""
    out = []
    for place, row in sources.read_rows(location, data_dir):
        if not isinstance(row.get("turns"), list):
            raise SourceError(f"{place}: 'turns' must be a list of questions.")
        out.append(row["turns"])
    return out


def parse_rating(text: str) -> float | None:
    """The number in `[[...]]`, or None."""
    found = re.search(r"\[\[(\d+(?:\.\d+)?)\]\]", text)
    return float(found.group(1)) if found else None


def run(lm, questions: Sequence[Sequence[str]], judge: Callable, max_new_tokens: int):
    """Mean rating over turns, in [1, 10].

    Returns:
      `(ratings, unparsed)`: a number for every graded turn, and how many replies held none.
    """
    threads: list[list[tuple[str, str]]] = [[] for _ in questions]
    ratings, unparsed = [], 0
    for turn in range(max(len(q) for q in questions)):
        active = [i for i, q in enumerate(questions) if turn < len(q)]
        for i in active:
            threads[i].append(("user", questions[i][turn]))
        answers, _ = lm.answer_dialogues(
            [threads[i] for i in active], max_new_tokens, truncate=True
        )
        for i, answer in zip(active, answers, strict=True):
            threads[i].append(("assistant", answer))
            dialogue = "\n\n".join(f"[{role}]\n{text}" for role, text in threads[i])
            reply = judge([{"role": "user", "content": GRADE.format(dialogue=dialogue)}])
            rating = parse_rating(reply)
            if rating is None:
                unparsed += 1
            else:
                ratings.append(rating)
    return ratings, unparsed


def win_rate(questions, answers, base_answers, judge: Callable) -> list[float]:
    """1 for a win over the base's answer, 0 for a loss, 0.5 for a tie or a verdict that flips.

    Each pair is judged in both orders, since judges favour a position.
    """

    def verdict(question, a, b):
        reply = judge([{"role": "user", "content": COMPARE.format(question=question, a=a, b=b)}])
        found = re.search(r"\[\[([ABC])\]\]", reply)
        return {"A": 1.0, "B": 0.0}.get(found.group(1) if found else "C", 0.5)

    scores = []
    for question, ours, base in zip(questions, answers, base_answers, strict=True):
        forward = verdict(question, ours, base)
        backward = 1.0 - verdict(question, base, ours)
        scores.append(forward if forward == backward else 0.5)
    return scores
