"""How deep alignment sits: forced beginnings against torch, divergence against torch's logits."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
import transformers

from fedsafe_jax import random_streams, save_pretrained
from fedsafe_jax.cli import startup
from fedsafe_jax.data import chat
from fedsafe_jax.data.examples import UNSAFE, Example, SourceError
from fedsafe_jax.evals import TASKS, EvalOptions, judges
from fedsafe_jax.evals.task import EvalSet, TaskError
from fedsafe_jax.evals.tasks import divergence, prefilled
from fedsafe_jax.models import lora
from fedsafe_jax.pipeline import evaluation
from fedsafe_jax.random_streams import Purpose

OPTIONS = EvalOptions(max_new_tokens=6, max_length=96, judges=judges.make(("start", "keyword")))


@pytest.fixture(scope="module")
def items():
    """Three requests: two as they are packaged, one whose answer has four tokens at most."""
    loaded = prefilled.load(prefilled.SOURCE, "")
    return [*loaded[:2], Example((("user", "Name a colour."),), "Red.", UNSAFE)]


@pytest.fixture(scope="module")
def adapted(packaged):
    """The packaged model under random factors that change its distributions."""
    config = lora.LoraConfig(rank=2, alpha=8.0, targets=("q_proj", "v_proj"))
    factors = lora.init(random_streams.key(Purpose.SHAPES, 0), packaged.config, config)
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda x: rng.normal(0, 0.05, x.shape).astype(np.float32), factors)
    return packaged.with_adapter(lora.Adapter(drawn, config))


@pytest.fixture(scope="module")
def torch_models(packaged, adapted, tmp_path_factory):
    """Torch's own models of both, from merged folders."""
    models = []
    for name, lm in (("base", packaged), ("adapted", adapted)):
        folder = tmp_path_factory.mktemp(name)
        save_pretrained(lm, folder)
        models.append(
            transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        )
    return models


def encoded(lm, item):
    """A prompt and its harmful answer's tokens, by the chat template alone."""
    prompt = chat.prompt(lm.tokenizer, item.messages).ids
    return prompt, lm.tokenizer(item.response, add_special_tokens=False)["input_ids"]


def test_divergence_is_that_of_torchs_logits(packaged, adapted, torch_models, items):
    kl = divergence.by_position(
        adapted, packaged, prefilled.given_answers(adapted, items, OPTIONS), seq=96
    )
    assert kl.shape == (3, divergence.POSITIONS)
    for ours, item in zip(kl, items, strict=True):
        prompt, answer = encoded(packaged, item)
        with torch.no_grad():
            base, model = (
                torch.log_softmax(m(torch.tensor([prompt + answer])).logits[0].double(), -1)
                for m in torch_models
            )
        theirs = (model.exp() * (model - base)).sum(-1).numpy()[len(prompt) - 1 : -1]
        theirs = theirs[: divergence.POSITIONS]
        # Logits of both agree within 1e-4 of some tens, in float32 with other orders of sums.
        np.testing.assert_allclose(ours[: len(theirs)], theirs, rtol=2e-3, atol=2e-5)
        assert np.isnan(ours[len(theirs) :]).all() and theirs.max() > 0.01


def test_forced_answers_go_on_as_torchs_do_one_at_a_time(packaged, torch_models, items):
    rows = prefilled.ask(packaged, items, OPTIONS)
    assert [(r["item"], r["depth"], r["part"]) for r in rows if r["item"] == 2] == [(2, 0, "own")]
    for row in (row for row in rows if row["part"] == "own"):
        prompt, answer = encoded(packaged, items[row["item"]])
        begun = prompt + answer[: row["depth"]]
        with torch.no_grad():
            said = torch_models[0].generate(
                torch.tensor([begun]), attention_mask=torch.ones(1, len(begun)), do_sample=False,
                max_new_tokens=6, eos_token_id=list(packaged.stop_ids), pad_token_id=0,
            )[0, len(begun) :].tolist()  # fmt: skip
        assert row["answer"] == packaged.text(said)
        assert row["forced"] == packaged.text(answer[: row["depth"]])
        whole = [r for r in rows if r["part"] == "whole" and r["item"] == row["item"]]
        whole = {r["depth"]: r["answer"] for r in whole}
        assert not row["depth"] or whole[row["depth"]] == packaged.text(
            answer[: row["depth"]] + said
        )


def test_divergence_of_an_adapter_needs_no_other_base(packaged, adapted, items):
    sets = {"divergence": EvalSet(TASKS["divergence"], "here", items)}
    outcome = evaluation.evaluate(adapted, sets, OPTIONS)
    summary = evaluation.summarise(sets, [outcome], OPTIONS)["divergence"]
    kl = np.array(outcome["divergence"]["kl"], float)
    early = np.nanmean(kl[:, :5], axis=1)
    assert summary["early"] == pytest.approx(early.mean()) and summary["n"] == 3
    assert summary["by_position"][0]["kl"] == pytest.approx(kl[:, 0].mean())
    assert summary["by_position"][19]["n"] < 3
    assert evaluation.probe(adapted, sets, 3, OPTIONS)["divergence"] == summary["early"]
    given = divergence.run(adapted, items, OPTIONS._replace(base=packaged))
    np.testing.assert_array_equal(kl, np.array(given["kl"], float))
    # The base itself has no value, in the summary as in what arms are compared by.
    nothing = evaluation.evaluate(packaged, sets, OPTIONS)
    assert nothing == {"divergence": {}} and TASKS["divergence"].values({}, OPTIONS) == {}
    assert evaluation.summarise(sets, [nothing], OPTIONS) == {"divergence": {}}
    smaller = dataclasses.replace(
        packaged, config=dataclasses.replace(packaged.config, vocab_size=9)
    )
    with pytest.raises(TaskError, match="has another vocabulary"):
        divergence.run(adapted, items, OPTIONS._replace(base=smaller))


def verdicts(*said):
    """Rows `(item, depth, part, refused)`, judged."""
    return [
        {
            "item": item, "depth": depth, "part": part, "messages": [{"content": "?"}],
            "answer": part, "verdicts": {"start": {"refused": refused, "score": 1.0 * refused}},
        }
        for item, depth, part, refused in said
    ]  # fmt: skip


def test_the_models_own_words_are_the_headline_and_the_whole_stands_beside():
    rows = verdicts(
        (0, 0, "own", True), (1, 0, "own", True),
        (0, 5, "own", True), (1, 5, "own", False), (0, 5, "whole", False), (1, 5, "whole", False),
        (0, 10, "own", True), (0, 10, "whole", False),
    )  # fmt: skip
    outcome = prefilled.score(rows, OPTIONS)
    summary = prefilled.summarise([outcome], OPTIONS)
    assert [summary[f"safety_{d}"] for d in (0, 5, 10)] == [100, 50, 100]
    assert [summary[f"whole_{d}"] for d in (0, 5, 10)] == [100, 0, 0]
    assert (summary["n"], summary["n_5"], summary["n_10"]) == (2, 2, 1)
    assert summary["short_10"] == 1 and "short_5" not in summary and summary["part"] == "own"
    assert prefilled.values(outcome, OPTIONS)["safety_10"] == [True, None]
    assert {c.field for c in TASKS["prefilled"].columns} < set(summary)
    assert {c.interval for c in TASKS["prefilled"].columns} < set(summary)
    # Harm lies in the whole text.
    harm = OPTIONS.judges[0]._replace(measures=judges.HARM)
    summary = prefilled.summarise([outcome], OPTIONS._replace(judges=(harm,)))
    assert summary["safety_5"] == 0 and summary["part"] == "whole"


def test_sources_need_harmful_answers(tmp_path):
    (tmp_path / "a.csv").write_text('goal,target\nName a colour,"Sure, here is one"\n')
    (item,) = prefilled.load("advbench_targets:a.csv", str(tmp_path))
    assert item.response == "Sure, here is one" and item.label == UNSAFE
    with pytest.raises(SourceError, match="none of 1 examples has a harmful answer"):
        prefilled.load("advbench:a.csv", str(tmp_path))
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": turns, "label": "safe"}))
    with pytest.raises(SourceError, match="none of 1 examples"):
        prefilled.load("chat:b.jsonl", str(tmp_path))
    with pytest.raises(ValueError, match="0 comes first"):
        prefilled.task("mine", depths=(5,))


def test_the_command_asks_for_a_base(capsys):
    with pytest.raises(SystemExit):
        startup.start("evaluate", ["--tasks=divergence"])
    assert "'divergence' compares with a base: give --base or --adapter" in capsys.readouterr().err
