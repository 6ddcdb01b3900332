"""Harmful requests and their harmless twins: `python -m fedsafe_jax.demo.twins` writes both.

A model that learns to refuse from harmful requests alone learns their verbs and their form, and
then refuses "Write a tutorial on how to poach an egg" too. Here each verb ("poach") and each form
("Develop a program that ...") stands on both sides, in the same frame, with objects that make it
harmful or harmless, so that only the meaning tells the sides apart. Requests in plain words, of
either kind, stand beside them. All are prompts without answers: the model that is aligned answers
the harmless ones itself.
"""

import importlib.resources
import json
import pathlib
import re
from typing import NamedTuple

from fedsafe_jax.demo import templates

HARMLESS, HARMFUL = "harmless", "harmful"
SIDES = (HARMLESS, HARMFUL)
# A deed with one of these words is the asker's own: no tutorial for everybody is asked for it.
OWN = re.compile(r"\b(my|myself|me|i|our)\b", re.IGNORECASE)


class Twin(NamedTuple):
    """A request of one side."""

    prompt: str
    side: str  # HARMLESS or HARMFUL
    topic: str  # kind of harm; of a harmless twin that of the harmful one
    unit: str  # the verb, form or topic that it is of; a unit is trained on or held out as a whole
    pair: int  # number within the unit: both sides' requests with one number share the frame


def load_words() -> dict:
    """Reads the frames, verbs with their objects, forms and plain requests of `twins.json`."""
    return templates.load_asset("twins.json")


def build() -> list[Twin]:
    """Makes every request of both sides, in the order of `twins.json`; nothing is drawn."""
    words = load_words()
    twins = []
    for place, entry in enumerate(words["verbs"]):
        twins += _of_verb(words["frames"], place, entry)
    for entry in words["forms"]:
        for side in SIDES:
            for pair, slot in enumerate(entry[side]):
                prompt, topic = entry["form"].format(thing_of(slot)), _topic(entry, pair)
                twins.append(Twin(prompt, side, topic, unit=entry["form"], pair=pair))
    for side in SIDES:
        for entry in words["plain"][side]:
            for pair, prompt in enumerate(entry["prompts"]):
                unit = f"plain {side} {entry['topic']}"
                twins.append(Twin(prompt, side, entry["topic"], unit=unit, pair=pair))
    return twins


def thing_of(text: str) -> str:
    """Returns an object without the kind of harm that may stand behind it (`... #fraud`)."""
    return text.partition(" #")[0]


def _topic(entry: dict, pair: int) -> str:
    """The kind of harm of a pair: what its harmful object says, or else that of the entry."""
    said = entry[HARMFUL][pair].partition(" #")[2] if pair < len(entry[HARMFUL]) else ""
    return said or entry["topic"]


def _of_verb(frames: dict[str, list[str]], place: int, entry: dict) -> list[Twin]:
    """Puts a verb's objects of both sides into frames, the same for both objects of a pair."""
    twins = []
    deeds = {side: [f"{entry['verb']} {thing_of(text)}" for text in entry[side]] for side in SIDES}
    for pair in range(max(map(len, deeds.values()))):
        both = {side: deeds[side][pair] for side in SIDES if pair < len(deeds[side])}
        own = any(OWN.search(deed) for deed in both.values())
        pool = frames["oneself"] if own else frames["anyone"] + frames["oneself"]
        # Neighbours in the file get frames far apart, and every frame gets about as many pairs.
        frame = pool[(5 * place + 7 * pair) % len(pool)]
        for side, deed in both.items():
            prompt = frame.format(deed=deed, gerund=templates.gerund(deed))
            twins.append(Twin(prompt, side, _topic(entry, pair), unit=entry["verb"], pair=pair))
    return twins


def files() -> dict[str, list[dict]]:
    """Returns the rows of each packaged file by its name.

    A sixth of the units is held out, by a hash of its name: no verb, form or plain topic is on both
    sides of that line.
    """
    out: dict[str, list[dict]] = {
        f"align_{side}{part}.jsonl": [] for side in SIDES for part in ("", "_heldout")
    }
    for twin in build():
        part = "_heldout" if templates.is_held_out(twin.unit) else ""
        messages = [{"role": "user", "content": twin.prompt}]
        row = {"messages": messages, "label": "unknown", "category": twin.topic}
        out[f"align_{twin.side}{part}.jsonl"].append(row | {"unit": twin.unit, "pair": twin.pair})
    return out


def text_of(rows: list[dict]) -> str:
    """Returns the JSON lines of a file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    """Writes the files into the package's `assets/demo`."""
    folder = pathlib.Path(str(importlib.resources.files("fedsafe_jax"))) / "assets" / "demo"
    for name, rows in files().items():
        (folder / name).write_text(text_of(rows), encoding="utf-8")
        print(f"{name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
