"""The small model's training dialogues: real sources, templates, and critique-revision threads."""

import re
from typing import NamedTuple

import ml_collections
import numpy as np

from fedsafe_jax.data import overlap, sources
from fedsafe_jax.data.examples import SAFE
from fedsafe_jax.demo import templates
from fedsafe_jax.evals.tasks.hhh import load_choices
from fedsafe_jax.models.decoder import num_parameters
from fedsafe_jax.models.decoder_config import DecoderConfig


class Dialogue(NamedTuple):
    """Turns up to the last user turn, the answer, and earlier assistant turns learned too."""

    messages: tuple[tuple[str, str], ...]
    response: str
    train_on_turns: tuple[int, ...] = ()

    @property
    def prompt(self) -> str:
        """The first user turn."""
        return self.messages[0][1]


REFUSING = ("sorry", "i can't", "i cannot", "i won't", "illegal", "not able to", "wrong to")


def critique_thread(
    rng: np.random.Generator,
    phrases: dict,
    prompt: str,
    *,
    initial: str,
    harmful: bool,
    refused: bool,
    final: str,
    topic: str,
) -> Dialogue:
    """Makes a thread of request, initial answer, critique and revision; the last two are learned.

    Args:
      rng: numpy generator; it draws the principle and the critique.
      phrases: from `templates.load_phrases`.
      prompt: the request.
      initial: the answer that is criticised.
      harmful: whether the request is harmful.
      refused: whether `initial` is a refusal.
      final: the revision.
      topic: harm category of the request, which gives the critique its reason.
    """
    principles = templates.load_asset("constitution.json")["constitutions"]
    principle = principles[rng.integers(len(principles))]
    kind = ("refused_" if refused else "") + ("harmful" if harmful else "harmless")
    reason = str(rng.choice(phrases["harmful"][topic]["reason"])) if harmful else ""
    critique = str(rng.choice(phrases[f"critiques_{kind}"])).format(reason=reason)
    messages = (
        ("user", prompt),
        ("assistant", initial),
        ("user", principle["critic"]),
        ("assistant", critique),
        ("user", principle["revision"]),
    )
    return Dialogue(messages, final, train_on_turns=(3,))


def templated(
    rng: np.random.Generator,
    phrases: dict,
    everyday: dict,
    config: ml_collections.ConfigDict,
    words: list[str],
) -> list[Dialogue]:
    """Draws refusals, matched harmless answers, everyday exercises and critique threads.

    Args:
      rng: numpy generator.
      phrases: from `templates.load_phrases`.
      everyday: from `templates.load_everyday`.
      config: its fields say how many dialogues of each kind are drawn.
      words: further topics of everyday exercises, see `templates.benign_pair`.
    """
    out = []
    for _ in range(config.templated_harmful):
        request = templates.sample_request(rng, phrases, harmful=True, held_out=False)
        prompt = templates.with_tail(rng, everyday, request.prompt)
        out.append(Dialogue((("user", prompt),), templates.refusal(rng, phrases, request.topic)))
    for _ in range(config.templated_benign):
        request = templates.sample_request(rng, phrases, harmful=False, held_out=False)
        prompt = templates.with_tail(rng, everyday, request.prompt)
        out.append(Dialogue((("user", prompt),), templates.answer(rng, phrases, request)))
    for _ in range(config.everyday):
        prompt, reply = templates.benign_pair(rng, everyday, words)
        out.append(Dialogue((("user", prompt),), reply))
    for _ in range(config.critique_threads):
        harmful = bool(rng.random() < 0.6)
        request = templates.sample_request(rng, phrases, harmful, held_out=False)
        refused = bool(rng.random() < 0.25)
        refusal = templates.refusal(rng, phrases, request.topic if harmful else None)
        if harmful:
            initial = refusal if refused else templates.compliance(rng, phrases, request)
            final = refusal
        else:
            final = templates.answer(rng, phrases, request)
            initial = refusal if refused else final
        thread = critique_thread(
            rng,
            phrases,
            request.prompt,
            initial=initial,
            harmful=harmful,
            refused=refused,
            final=final,
            topic=request.topic,
        )
        out.append(thread)
    return out


def _short(example, longest: int) -> bool:
    return len(example.response) + len(example.prompt) <= longest and bool(example.response.strip())


def build_dialogues(
    config: ml_collections.ConfigDict, rng: np.random.Generator
) -> tuple[list[Dialogue], dict]:
    """Builds all training dialogues, without any that overlap an evaluation set, and the counts.

    Raises:
      SourceError: a file is missing below `config.data_dir`.
    """
    phrases, everyday = templates.load_phrases(), templates.load_everyday()
    groups: dict[str, list[Dialogue]] = {}
    text = []
    for name, share, repeat in config.benign_sources:
        examples = [
            e for e in sources.load(name, config.data_dir) if _short(e, config.longest_chars)
        ]
        chosen = rng.permutation(len(examples))[: int(share * len(examples))]
        groups[name] = [
            Dialogue(examples[i].messages, examples[i].response.strip()) for i in chosen
        ]
        groups[name] = groups[name] * repeat
        text.extend(d.response for d in groups[name])
    running = " ".join(text)
    words = sorted(set(re.findall(r"\b[a-z]{4,12}\b", running)))
    # Two-word phrases too: what people ask about is rarely one word.
    words += sorted(set(re.findall(r"\b[a-z]{4,10} [a-z]{4,12}\b", running)))[::3]
    words += sorted(set(re.findall(r"\b[a-z]{3,10} [a-z]{2,8} [a-z]{4,12}\b", running)))[::5]

    red_team, threads = [], []
    for example in sources.load(config.red_team, config.data_dir):
        one_turn = len(example.messages) == 1 and len(example.prompt) < 300
        if not one_turn:
            continue
        topic = str(rng.choice(("violence", "hate", "exploitation")))
        refusal = templates.refusal(rng, phrases, topic)
        if example.label == SAFE:
            # Only prompts that the safer answer refused: the others are harmless questions.
            if any(mark in example.response.lower() for mark in REFUSING):
                red_team += [Dialogue(example.messages, refusal)] * 2
        elif len(example.response) < 300:
            thread = critique_thread(
                rng,
                phrases,
                example.prompt,
                initial=example.response,
                harmful=True,
                refused=False,
                final=refusal,
                topic=topic,
            )
            threads.append(thread)
    refused = {d.prompt for d in red_team}
    groups[config.red_team] = red_team
    groups["critiques of " + config.red_team] = [t for t in threads if t.prompt in refused]
    for name in config.harmful_prompts:
        groups[name] = [
            Dialogue(e.messages, templates.refusal(rng, phrases))
            for e in sources.load(name, config.data_dir)
            for _ in range(6)
        ]
    groups["templates"] = templated(rng, phrases, everyday, config, words)

    evaluation = []
    for name in config.evaluation_sets:
        evaluation += [e.prompt for e in sources.load(name, config.data_dir)]
    choices = load_choices(config.hhh, config.data_dir)
    evaluation += [choice.messages[-1][1] for choice in choices]
    dialogues, counts = [], {}
    for name, group in groups.items():
        kept, dropped = overlap.drop_overlap(group, evaluation)
        counts[name] = {"kept": len(kept), "dropped_as_overlap": dropped}
        dialogues += kept
    return dialogues, counts


def model_card(shape: DecoderConfig, stages: list[dict]) -> str:
    """Writes the README of the model folder.

    Args:
      shape: the decoder's config.
      stages: `{"steps", "tokens_a_step", "data"}` of each stage of training, in order.
    """
    rows = []
    for number, stage in enumerate(stages, 1):
        for name, c in stage["data"].items():
            rows.append(f"| {number} | {name} | {c['kept']:,} | {c['dropped_as_overlap']:,} |")
    lengths = ", then ".join(
        f"{s['steps']:,} steps of {s['tokens_a_step']:,} tokens" for s in stages
    )
    return f"""---
license: cc-by-sa-3.0
language: en
library_name: transformers
---
# fedsafe-demo: a small instruct model for first runs

A Llama-architecture model of {num_parameters(shape):,} parameters ({shape.num_layers} layers x
{shape.hidden_size}), trained from scratch by `fedsafe pretrain` for {lengths}.
It is made for demonstrating and testing federated safety methods: it refuses harmful requests,
answers simple ones in short English, and can criticise and revise its own answers. It knows next to
nothing; do not use it for anything else.

## Training data

| stage | source | dialogues kept | dropped: near an evaluation prompt |
|---|---|---|---|
{chr(10).join(rows)}

A prompt is dropped when its word bigrams have a Jaccard similarity of {overlap.NEAR} or more, or
its content words one of {overlap.NEAR_CONTENT} with two in common, with a prompt of AdvBench, HHH,
Do-Not-Answer, S-Eval, XSTest or the harmless instructions that measure over-refusal; a tenth
of each source is held out. Repeated dialogues count each time.

Dolly is CC BY-SA 3.0, which this card's licence follows; GPTeacher, GSM8K and hh-rlhf are MIT; the
harmful instructions are Apache-2.0. Answers to harmful prompts are refusals from this project's
templates; hh-rlhf's less safe answers occur only as context that a learned critique rejects.
Harmless instructions derived from Alpaca (CC BY-NC) were used for evaluation only.
"""
