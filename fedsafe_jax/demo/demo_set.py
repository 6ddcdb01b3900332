"""Writes the packaged demo set from the templates: `python -m fedsafe_jax.demo.demo_set`.

Every harmful answer is compliance without content. Evaluation files use the deeds and artifacts
that `templates.is_held_out` reserves; nothing else in the package is trained on those.
"""

import importlib.resources
import json
import pathlib

import numpy as np

from fedsafe_jax.data.examples import SAFE, UNSAFE
from fedsafe_jax.demo import templates


def _row(prompt: str, response: str, label: str, category: str) -> dict:
    messages = [{"role": "user", "content": prompt}]
    if response:
        messages.append({"role": "assistant", "content": response})
    return {"messages": messages, "label": label, "category": category}


def _harmful(rng, phrases, count, held_out=False, answer="comply"):
    rows = []
    for _ in range(count):
        request = templates.sample_request(rng, phrases, True, held_out)
        if answer == "comply":
            response, label = templates.compliance(rng, phrases, request), UNSAFE
        elif answer == "refuse":
            response, label = templates.refusal(rng, phrases, request.topic), SAFE
        else:
            response, label = "", "unknown"
        rows.append(_row(request.prompt, response, label, request.topic))
    return rows


def _benign(rng, phrases, everyday, count, held_out=False):
    rows = []
    for i in range(count):
        if i % 2 or held_out:
            request = templates.sample_request(rng, phrases, False, held_out)
            response = templates.answer(rng, phrases, request)
            rows.append(_row(request.prompt, response, SAFE, request.topic))
        else:
            prompt, response = templates.benign_pair(rng, everyday)
            rows.append(_row(prompt, response, SAFE, "everyday"))
    return rows


def _exercises(rng, everyday, count):
    pairs = (templates.exercise(rng, everyday) for _ in range(count))
    return [_row(prompt, response, SAFE, "everyday") for prompt, response in pairs]


def _unique(rows):
    seen, out = set(), []
    for row in rows:
        prompt = row["messages"][0]["content"]
        if prompt not in seen:
            seen.add(prompt)
            out.append(row)
    return out


def build(seed: int = 0) -> dict[str, list[dict]]:
    """Draws the rows of each file of the demo set."""
    # Older than `random_streams`: with another generator seed 0 would not draw the packaged files.
    rng = np.random.default_rng(seed)
    phrases, everyday = templates.load_phrases(), templates.load_everyday()
    comparisons = []
    for i in range(120):
        harmful = i % 2 == 0
        request = templates.sample_request(rng, phrases, harmful, held_out=True)
        refusal = templates.refusal(rng, phrases, request.topic if harmful else None)
        if harmful:
            better, worse = refusal, templates.compliance(rng, phrases, request)
        else:
            better, worse = templates.answer(rng, phrases, request), refusal
        opening = f"\n\nHuman: {request.prompt}\n\nAssistant: "
        category = "harmless" if harmful else "helpful"
        comparisons.append(
            {
                "text_correct": opening + better,
                "text_incorrect": opening + worse,
                "category": category,
            }
        )
    return {
        "clients_safe.jsonl": _unique(_benign(rng, phrases, everyday, 700)),
        "clients_unsafe.jsonl": _unique(_harmful(rng, phrases, 320)),
        "filter.jsonl": _unique(
            _harmful(rng, phrases, 250)
            + _harmful(rng, phrases, 120, answer="refuse")
            + _benign(rng, phrases, everyday, 300)
        ),
        "cai_red_team.jsonl": _unique(_harmful(rng, phrases, 400, answer="none")),
        "cai_benign.jsonl": _unique(_benign(rng, phrases, everyday, 500)),
        "red_team_heldout.jsonl": _unique(
            _harmful(rng, phrases, 130, held_out=True, answer="none")
        ),
        "benign_heldout.jsonl": _unique(_benign(rng, phrases, everyday, 130, held_out=True)),
        "hhh_heldout.jsonl": comparisons,
        # Drawn last, so that the others are drawn as they were before it.
        "exercises.jsonl": _unique(_exercises(rng, everyday, 200)),
    }


def main() -> None:
    """Writes all files into the package's `assets/demo`."""
    folder = pathlib.Path(str(importlib.resources.files("fedsafe_jax"))) / "assets" / "demo"
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in build().items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text(text, encoding="utf-8")
        print(f"{name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
