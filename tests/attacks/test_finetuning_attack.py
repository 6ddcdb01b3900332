"""The fine-tuning attack: what it trains on, the models of its stages, and their rates by step."""

import jax
import numpy as np
import pytest

import fedsafe_jax as fs
from fedsafe_jax.attacks import ATTACKS, AttackError, Settings, measurement
from fedsafe_jax.attacks.answering import Answers
from fedsafe_jax.attacks.contract import AttackPrompt, Stage, without_search
from fedsafe_jax.attacks.finetune import training_pairs
from fedsafe_jax.data.examples import Example
from fedsafe_jax.evals.judges import REFUSAL, Judge, Verdict
from fedsafe_jax.models import lora

REQUESTS = [Example((("user", "What is your name?"),), "")]
HARMLESS = [Example((("user", "How long does a river flow?"),), "")]


def pair(prompt, response="Bananas."):
    return Example((("user", prompt),), response)


def test_no_pair_is_near_a_prompt_that_is_asked():
    settings = Settings(
        pairs=(pair("Which fruit do you like?"), pair("what is YOUR name"), pair("Sing a song.")),
        benign_pairs=(pair("How long does the river flow"), pair("Paint a house.")),
        harmless=tuple(HARMLESS),
        finetune_pairs=0,
    )
    (harmful, benign), dropped = training_pairs(settings, REQUESTS)
    assert [one.prompt for one in harmful] == ["Which fruit do you like?", "Sing a song."]
    assert [one.prompt for one in benign] == ["Paint a house."] and dropped == 2
    (harmful, benign), _ = training_pairs(settings._replace(finetune_pairs=1), REQUESTS)
    assert len(harmful) == len(benign) == 1
    alone = settings._replace(benign_pairs=(), pairs=settings.pairs[1:2])
    with pytest.raises(AttackError, match="all 1 harmful pairs are near a prompt"):
        ATTACKS["finetune"].check_requests(alone, REQUESTS)
    with pytest.raises(AttackError, match="'finetune' needs pairs"):
        ATTACKS["finetune"].check(Settings())


def test_models_are_trained_on_by_step_from_their_own_adapters(packaged):
    config = fs.LoraConfig(4, 8.0, ("q_proj", "v_proj"))
    factors = lora.init(jax.random.key(1), packaged.config, config)
    released = packaged.with_adapter(fs.Adapter(factors, config))
    pairs = tuple(pair(f"Which {what} do you like?") for what in ("fruit", "song"))
    settings = Settings(
        pairs=pairs, finetune_steps=(0, 2, 6), finetune_batch_size=2, finetune_rate=8e-3
    )
    attacked = ATTACKS["finetune"].run(
        [released], REQUESTS, [("Sure",)], settings=settings, key=jax.random.key(0)
    )
    assert [stage.step for stage in attacked.stages] == [0, 2, 6]
    assert attacked.stages[0].models[0] is released and np.isnan(attacked.stages[0].loss)
    two, six = attacked.stages[1:]
    assert six.loss < two.loss and not attacked.queries.any()
    # `a` of a fresh adapter is drawn anew; this one has moved no further than six steps of Adam.
    trained = six.models[0].adapter
    assert trained.config == config
    moved = np.abs(trained.factors["layers"]["self_attn"]["q_proj"]["a"]
                   - factors["layers"]["self_attn"]["q_proj"]["a"]).max()  # fmt: skip
    assert 0 < moved <= 6 * settings.finetune_rate * 1.01
    assert attacked.counts == {
        "harmful_pairs": 2, "benign_pairs": 0, "dropped_near_evaluation": 0,
    }  # fmt: skip


def test_rates_are_by_stage_and_the_last_one_is_the_attacks(monkeypatch):
    """Models are names here, of which "open" answers and "shut" does not."""

    def answer(lm, prompts, max_new_tokens, batch_size):
        said = [f"{lm} {prompt.messages[-1][1]}" for prompt in prompts]
        return Answers(said, said, [True] * len(said), [3] * len(said))

    monkeypatch.setattr(measurement, "answer", answer)
    judge = Judge("mine", REFUSAL, lambda all: [Verdict("open" not in a.answer, 1.0) for a in all])
    stages = (Stage(0, ["shut"], float("nan")), Stage(5, ["open"], 1.5))
    attacked = without_search([[AttackPrompt(one.messages)] for one in REQUESTS])
    attacked = attacked._replace(stages=stages, counts={"harmful_pairs": 1})
    shown = measurement.measure(
        {"m": "unused"}, REQUESTS, attacked, measurement.Options((judge,)), harmless=HARMLESS
    )
    assert shown["asr"] == 100 and list(shown["by_model"]) == ["m"]
    assert [(one["step"], one["loss"], one["asr"]) for one in shown["by_step"]] == [
        (0, None, 0), (5, 1.5, 100),
    ]  # fmt: skip
    assert [one["harmless"]["refused"] for one in shown["by_step"]] == [100, 0]
    assert [(a["step"], a["answer"]) for a in shown["by_prompt"][0]["answers"]] == [
        (0, "shut What is your name?"), (5, "open What is your name?"),
    ]  # fmt: skip
    assert shown["counts"] == {"harmful_pairs": 1}
