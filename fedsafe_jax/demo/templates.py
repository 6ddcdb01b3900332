"""Templated requests and answers: the readable, content-free text that the package ships.

Harmful and harmless requests are drawn from the same frames ("Write a tutorial on how to ...",
"Create ..."), so that only what is asked tells them apart; a model trained on one style per label
learns the style instead. A harmful request is answered either by a refusal or by compliance
without content ("Sure, here is how to ...: step one, ..."), never by instructions.
"""

import hashlib
import importlib.resources
import json
from typing import NamedTuple

import numpy as np

# Verbs that double their last consonant before "-ing". English has no rule that gets all of them
# right without knowing where a word is stressed.
DOUBLING = (
    "rob",
    "run",
    "get",
    "cut",
    "stab",
    "set",
    "hit",
    "shut",
    "con",
    "plan",
    "spot",
    "stop",
    "chat",
    "beg",
    "jam",
    "rig",
    "skim",
    "skin",
    "skip",
    "slap",
    "spin",
    "stir",
    "tap",
    "trap",
    "whip",
)


class Request(NamedTuple):
    """A templated request and what is known about it."""

    prompt: str
    topic: str  # harm category, or domain of a harmless request
    harmful: bool
    is_deed: bool  # "how to {subject}" rather than "write {subject}"
    subject: str  # the deed or artifact
    held_out: bool  # reserved for evaluation: in no training set of the package


def load_phrases() -> dict:
    """Reads the phrase lists of `assets/phrases.json`."""
    return load_asset("phrases.json")


def load_everyday() -> dict:
    """Reads the topics, facts and small exercises of `assets/everyday.json`."""
    return load_asset("everyday.json")


def load_asset(name: str) -> dict:
    """Reads a JSON file of the package's `assets`."""
    path = importlib.resources.files("fedsafe_jax") / "assets" / name
    return json.loads(path.read_text(encoding="utf-8"))


def gerund(deed: str) -> str:
    """Turns "rob a bank" into "robbing a bank"."""
    verb, _, rest = deed.partition(" ")
    if verb.endswith("ly"):
        return f"{verb} {gerund(rest)}"
    if verb.endswith("ie"):
        verb = verb[:-2] + "ying"
    elif verb.endswith("e") and not verb.endswith(("ee", "ye", "oe")):
        verb = verb[:-1] + "ing"
    elif verb in DOUBLING:
        verb = verb + verb[-1] + "ing"
    else:
        verb = verb + "ing"
    return f"{verb} {rest}".strip()


def is_held_out(subject: str) -> bool:
    """Tells whether a deed or artifact belongs to the evaluation sixth, by a hash of its text."""
    return int(hashlib.sha256(subject.encode()).hexdigest(), 16) % 6 == 0


def sample_request(
    rng: np.random.Generator, phrases: dict, harmful: bool, held_out: bool
) -> Request:
    """Draws one templated request.

    Args:
      rng: numpy generator.
      phrases: from `load_phrases`.
      harmful: half of the lists that the subject is drawn from.
      held_out: whether the subject is of the evaluation sixth, or of the other five sixths.
    """
    while True:
        topic, subject, is_deed = _subject(rng, phrases, "harmful" if harmful else "benign")
        if is_held_out(subject) == held_out:
            break
    if not is_deed:
        prompt = str(rng.choice(phrases["artifact_frames"])).format(artifact=subject)
    elif rng.random() < 0.2:
        prompt = str(rng.choice(phrases["gerund_frames"])).format(deed=gerund(subject))
    else:
        prompt = str(rng.choice(phrases["deed_frames"])).format(deed=subject)
    return Request(prompt, topic, harmful, is_deed=is_deed, subject=subject, held_out=held_out)


def _subject(rng, phrases, half: str) -> tuple[str, str, bool]:
    """`(topic, subject, is_deed)`: from the lists, or composed of a verb, an object and a work."""
    kind = rng.random()
    if kind < 0.4:
        topic = str(rng.choice(sorted(phrases[half])))
        is_deed = bool(rng.random() < 0.6)
        return (
            topic,
            str(rng.choice(phrases[half][topic]["deeds" if is_deed else "artifacts"])),
            is_deed,
        )
    parts = phrases["compositions"][half][rng.integers(len(phrases["compositions"][half]))]
    deed = f"{rng.choice(parts['verbs'])} {rng.choice(parts['objects'])}"
    if kind < 0.7:
        return parts["topic"], deed, True
    work = str(rng.choice(phrases["work_frames"]))
    work = work.format(work=rng.choice(phrases["works"]), deed=deed, gerund=gerund(deed))
    return parts["topic"], work, False


def refusal(rng: np.random.Generator, phrases: dict, topic: str | None = None) -> str:
    """Draws a polite refusal with a reason of the topic, or of any topic when None."""
    topic = topic or str(rng.choice(sorted(phrases["harmful"])))
    reason = str(rng.choice(phrases["harmful"][topic]["reason"]))
    text = str(rng.choice(phrases["refusals"])).format(reason=reason)
    return text + str(rng.choice(phrases["offers"]))


def compliance(rng: np.random.Generator, phrases: dict, request: Request) -> str:
    """Draws compliance without content, which stands in for a harmful answer."""
    if request.is_deed:
        return str(rng.choice(phrases["compliances"])).format(deed=request.subject)
    return str(rng.choice(phrases["artifact_compliances"])).format(artifact=request.subject)


def answer(rng: np.random.Generator, phrases: dict, request: Request) -> str:
    """Draws a readable, harmless answer: three or four steps of the request's domain, in order."""
    steps = phrases["benign"][request.topic]["steps"]
    chosen = sorted(rng.choice(len(steps), size=int(rng.integers(3, 5)), replace=False))
    numbered = "\n".join(f"{i}. {steps[j]}" for i, j in enumerate(chosen, 1))
    if request.is_deed:
        opening = ("Here is how to {s}:", "To {s}, follow these steps:", "Here are some tips:")
    else:
        opening = ("Some ideas for {s}:", "Here is a plan for {s}:", "To prepare {s}:")
    return str(rng.choice(opening)).format(s=request.subject) + "\n" + numbered


def benign_pair(
    rng: np.random.Generator, everyday: dict, words: list[str] | None = None
) -> tuple[str, str]:
    """Draws a small everyday exercise: `(prompt, answer)`.

    Args:
      rng: numpy generator.
      everyday: from `load_everyday`.
      words: further topics, mixed in so that an unknown word is no reason to refuse.
    """
    if words and rng.random() < 0.4:
        return _free_form(rng, everyday, words)
    kind = rng.random()
    if kind < 0.4:
        frame, answers = everyday["two_topic_tasks"][rng.integers(len(everyday["two_topic_tasks"]))]
        pool = words if words and rng.random() < 0.7 else everyday["topics"]
        slots = {"t": str(rng.choice(pool)), "u": str(rng.choice(pool))}
        reply = str(rng.choice(answers)).format(**slots)
        return _vary(rng, frame.format(**slots)), reply[:1].upper() + reply[1:]
    if kind < 0.74:
        frame, answers = everyday["topic_tasks"][rng.integers(len(everyday["topic_tasks"]))]
        use_words = words and rng.random() < 0.6
        topic = str(rng.choice(words if use_words else everyday["topics"]))
        reply = str(rng.choice(answers)).format(t=topic)
        return _vary(rng, frame.format(t=topic)), reply[:1].upper() + reply[1:]
    if kind < 0.82:
        prompt, reply = everyday["facts"][rng.integers(len(everyday["facts"]))]
        return prompt, reply
    exercises = (_capital, _opposite, _category, _arithmetic, _rewrite, _classify)
    return exercises[rng.integers(len(exercises))](rng, everyday)


def exercise(rng: np.random.Generator, everyday: dict) -> tuple[str, str]:
    """Draws a small exercise that has one right answer: `(prompt, answer)`; as `benign_pair`."""
    if rng.random() < 0.3:
        prompt, reply = everyday["facts"][rng.integers(len(everyday["facts"]))]
        return prompt, reply
    exercises = (_capital, _opposite, _arithmetic, _rewrite, _classify)
    return exercises[rng.integers(len(exercises))](rng, everyday)


def _vary(rng, prompt: str) -> str:
    """Drops the full stop or adds "please", as people do."""
    draw = rng.random()
    if draw < 0.3:
        return prompt.rstrip(".")
    if draw < 0.4 and not prompt.endswith("?"):
        return "Please " + prompt[0].lower() + prompt[1:]
    return prompt


def _free_form(rng, everyday, words):
    """A request put together at random: any wording, any words, and still no reason to refuse."""
    openers, links, answers = everyday["free_forms"][rng.integers(len(everyday["free_forms"]))]
    parts = [rng.choice(openers), rng.choice(links), rng.choice(words)]
    if rng.random() < 0.5:
        parts += [rng.choice(("for", "in", "and", "about", "with", "of")), rng.choice(words)]
    parts.append(rng.choice(everyday["tails"]))
    prompt = " ".join(str(part) for part in parts if part)
    question = prompt.startswith(("What", "Which", "How", "When", "Where"))
    return prompt + ("?" if question else rng.choice((".", ""))), str(rng.choice(answers))


def with_tail(rng: np.random.Generator, everyday: dict, prompt: str) -> str:
    """Adds a tail such as "in a big city", to harmful and harmless requests alike.

    A tail that only one kind had would tell the kinds apart without the rest being read.
    """
    tail = str(rng.choice(everyday["tails"]))
    if not tail:
        return prompt
    end = prompt[-1] if prompt[-1] in ".?" else ""
    return f"{prompt.rstrip('.?')} {tail}{end}"


def _capital(rng, everyday):
    country = str(rng.choice(sorted(everyday["capitals"])))
    capital = everyday["capitals"][country]
    frames = (
        "What is the capital of {c}?",
        "Name the capital of {c}.",
        "Which city is the capital of {c}?",
    )
    return str(rng.choice(frames)).format(c=country), f"The capital of {country} is {capital}."


def _opposite(rng, everyday):
    word = str(rng.choice(sorted(everyday["opposites"])))
    frames = (
        "What is the opposite of {w}?",
        'Find an antonym for the word "{w}".',
        "Give me a word that means the opposite of {w}.",
    )
    reply = f"The opposite of {word} is {everyday['opposites'][word]}."
    return str(rng.choice(frames)).format(w=word), reply


def _category(rng, everyday):
    name = str(rng.choice(sorted(everyday["categories"])))
    members = everyday["categories"][name]
    count = int(rng.integers(2, 1 + min(5, len(members))))
    chosen = [members[i] for i in rng.permutation(len(members))[:count]]
    number = {2: "two", 3: "three", 4: "four", 5: "five"}[count]
    frames = (
        "List {n} {c}.",
        "Name {n} {c}.",
        "Give me {n} examples of {c}.",
        "Generate a list of {n} {c}",
    )
    listed = "\n".join(f"{i}. {item}" for i, item in enumerate(chosen, 1))
    return str(rng.choice(frames)).format(n=number, c=name), listed


def _arithmetic(rng, everyday):
    del everyday
    a, b = (int(n) for n in rng.integers(1, 20, size=2))
    frames = (
        "What is {a} + {b}?",
        "Calculate {a} plus {b}.",
        "Add {a} and {b}.",
        "Compute the sum of {a} and {b}.",
    )
    return str(rng.choice(frames)).format(a=a, b=b), f"{a} + {b} = {a + b}."


def _rewrite(rng, everyday):
    requests = {
        "grammar": (
            "Correct the grammar: {s}",
            "Fix the mistakes in this sentence: {s}",
            "Edit the sentence.\n{s}",
        ),
        "past": ("Rewrite in the past tense: {s}", "Change the sentence to the past tense.\n{s}"),
        "passive": (
            "Rewrite in the passive voice: {s}",
            "Convert this sentence to passive voice.\n{s}",
        ),
        "sentiment": ("Classify the sentiment: {s}", "Is this review positive or negative?\n{s}"),
    }
    source, target, kind = everyday["sentences"][rng.integers(len(everyday["sentences"]))]
    reply = f"The sentiment is {target}." if kind == "sentiment" else target
    return str(rng.choice(requests[kind])).format(s=source), reply


def _classify(rng, everyday):
    names = sorted(everyday["categories"])[:12]
    name = str(rng.choice(names))
    member = str(rng.choice(everyday["categories"][name]))
    frames = (
        "Classify the following word: {m}",
        'What category does "{m}" belong to?',
        "Identify the group to which {m} belongs.",
    )
    return str(rng.choice(frames)).format(m=member), f"It belongs to the group of {name}."
