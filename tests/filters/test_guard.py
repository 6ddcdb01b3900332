"""Guards and guardians: what they learn, and how pairs are put to them."""

import copy
import gc
import types

import jax
import numpy as np
import pytest
from filter_examples import packaged_pairs, pair

from fedsafe_jax.config import ConfigError, default_config, filter_config
from fedsafe_jax.data.examples import Example
from fedsafe_jax.data.refusals import REFUSAL, start_refusal
from fedsafe_jax.federated.mesh import make_mesh
from fedsafe_jax.filters import guard, guard_prompts, protocol, quality, training
from fedsafe_jax.filters.training import TrainingOptions
from fedsafe_jax.guarding import guardian
from fedsafe_jax.models import lora, quantize
from fedsafe_jax.pipeline import filtering
from fedsafe_jax.validation import validate_filter

SHAPE = lora.LoraConfig(8, 16.0, ("q_proj", "v_proj"))


@pytest.fixture(scope="module")
def pairs():
    return packaged_pairs()


def test_guard_reads_the_verdict_and_learns_it(packaged, pairs):
    options = TrainingOptions(epochs=0, batch_size=16)
    untrained, _ = guard.train(pairs[::10], packaged, SHAPE, seed=0, options=options, max_length=96)
    # Without training the adapter is zero: the log-odds are the base model's own.
    (row,) = guard_prompts.render_pairs(packaged.tokenizer, pairs[64:65], 96, untrained.template)
    safe, unsafe = guard_prompts.verdict_ids(packaged.tokenizer)
    logits = np.asarray(packaged(np.array([row]))[0, -1], np.float64)
    assert untrained.log_odds(pairs[64:65])[0] == pytest.approx(
        logits[unsafe] - logits[safe], abs=1e-3
    )
    options = TrainingOptions(epochs=3, batch_size=16, learning_rate=3e-3)
    found, _ = guard.train(pairs[::2], packaged, SHAPE, seed=0, options=options, max_length=96)
    held = pairs[1::4]
    flagged = found.score(held) >= found.decision.threshold
    assert quality.quality([e.label == "unsafe" for e in held], flagged).accuracy > 85


@pytest.mark.slow
def test_guardian_detects_and_answers(packaged, pairs):
    replies = guard.safe_replies(pairs, REFUSAL)
    options = TrainingOptions(epochs=5, batch_size=16, learning_rate=3e-3)
    found, _ = guard.train(
        pairs[::2], packaged, SHAPE, seed=0, options=options, max_length=64, replies=replies[::2]
    )
    held = pairs[1::4]
    flagged = found.score(held) >= found.decision.threshold
    assert quality.quality([e.label == "unsafe" for e in held], flagged).accuracy > 85
    unsafe = [e for e in held if e.label == "unsafe"][:20]
    said = guardian.replies(found, unsafe)
    refused = [start_refusal(text) for text in said]
    assert np.mean(refused) > 0.8, said


def test_guard_says_when_its_template_leaves_no_room(packaged, pairs):
    with pytest.raises(protocol.FilterError, match="filter.max_length=16.*use at least"):
        guard_prompts.render_pairs(packaged.tokenizer, pairs[:2], 16, "short")


def test_templates(packaged):
    assert guard_prompts.template_of(packaged.tokenizer, 128) == "short"
    assert guard_prompts.template_of(packaged.tokenizer, 4096) == "policy"
    ids = guard_prompts.render_pairs(packaged.tokenizer, [pair("Ask", "Say")], 4096, "policy")[0]
    text = packaged.tokenizer.decode(ids)
    assert "S14: Code Interpreter Abuse." in text and "User: Ask" in text and "Agent: Say" in text


# The shape of Llama Guard 3's: who is judged follows from the number of turns.
GUARD = (
    "{%- set agent = messages | length % 2 == 0 -%}"
    "Task: judge the {{ 'Agent' if agent else 'User' }}. UNSAFE CONTENT CATEGORIES END.\n"
    "{%- for m in messages -%}"
    "{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('roles must alternate') }}{%- endif -%}"
    "[{{ 'User' if m['role'] == 'user' else 'Agent' }}: {{ m['content'] | trim }}]"
    "{%- endfor -%}{%- if add_generation_prompt -%}Verdict:{%- endif -%}"
)
LAST = ("user", "How long does it take?")
EARLIER = (("user", "I tie a knot."), ("assistant", "A bowline?"))


@pytest.fixture(scope="module")
def guards_words(packaged):
    tokenizer = copy.deepcopy(packaged.tokenizer)
    tokenizer.chat_template = GUARD
    return tokenizer


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ((LAST,), "[User: How long does it take?]"),
        (
            (*EARLIER, LAST),
            "[User: I tie a knot.][Agent: A bowline?][User: How long does it take?]",
        ),
        (
            (("system", "Be brief."), *EARLIER, LAST, ("tool", "5 min")),
            "[User: Be brief.\n\nI tie a knot.][Agent: A bowline?]"
            "[User: How long does it take?\n\n5 min]",
        ),
        (
            (("assistant", "Hello!"), LAST),
            "[User: ][Agent: Hello!][User: How long does it take?]",
        ),
    ],
)
def test_a_guard_reads_all_turns_and_judges_the_answer(guards_words, turns, said):
    assert guard_prompts.template_of(guards_words, 128) == "own"
    pairs = [Example(turns, "An hour.")]
    (row,) = guard_prompts.render_pairs(guards_words, pairs, 128, "own")
    text = guards_words.decode(row)
    assert f"judge the Agent. UNSAFE CONTENT CATEGORIES END.{said}[Agent: An hour.]" in text
    (row,) = guard_prompts.render_pairs(guards_words, pairs, 128, "short")
    for _, one in turns:
        assert one in guards_words.decode(row)


@pytest.mark.parametrize("template", ["own", "short"])
def test_a_long_dialogue_loses_its_oldest_turns_and_no_header(guards_words, caplog, template):
    old = (("user", "old words " * 60), ("assistant", "older " * 60))
    pairs = [
        Example((("system", "Be brief."), *old, *EARLIER, LAST), "An hour."),
        Example((("system", "stay " * 200), *old, ("user", "first " * 200)), "An hour."),
    ]
    rows = guard_prompts.render_pairs(guards_words, pairs, 120, template)
    texts = [guards_words.decode(row) for row in rows]
    assert max(map(len, rows)) <= 120
    for text in texts:
        assert "judge the Agent. UNSAFE" in text if template == "own" else "User" in text
        assert text.startswith("Task: judge the ") and "An hour." in text and "old" not in text
    assert "Be brief." in texts[0] and "I tie a knot." in texts[0] and LAST[1] in texts[0]
    assert "stay" in texts[1] and "first" in texts[1]
    assert "2 of 2 pairs are longer than filter.max_length=120" in caplog.text


def test_a_guardian_learns_the_safe_answer_to_the_same_dialogue():
    asked = ((*EARLIER, LAST), (("user", "I bake bread."), ("assistant", "Rye?"), LAST))
    pairs = [Example(asked[0], "A minute.", "safe"), Example(asked[1], "Sure.", "unsafe")]
    assert guard.safe_replies(pairs, "No.") == ["A minute.", "No."]
    pairs.append(Example(asked[0], "Sure.", "unsafe"))
    assert guard.safe_replies(pairs, "No.")[2] == "A minute."


def new_bytes(before):
    """Bytes of the arrays on devices that were not there before."""
    return sum(x.nbytes for x in jax.live_arrays() if id(x) not in before)


@pytest.mark.parametrize("kind", ["guard", "guardian"])
def test_a_guard_is_in_memory_only_while_it_is_used(packaged, pairs, tmp_path, monkeypatch, kind):
    config = default_config()
    config.filter.update({"kind": kind, "model": "package:model", "epochs": 1, "max_length": 96})
    config.cai.check = "filter"
    trainings, loads = [], []
    train, load = training.train, filtering.load_pretrained
    monkeypatch.setattr(training, "train", lambda *a, **k: trainings.append(1) or train(*a, **k))
    monkeypatch.setattr(
        filtering, "load_pretrained", lambda *a, **k: loads.append(a[0]) or load(*a, **k)
    )
    inputs = types.SimpleNamespace(lm=packaged, lora=SHAPE, filter_pairs=pairs[::8])
    adapter = lora.init(
        jax.random.key(0), packaged.config, lora.LoraConfig(16, 32.0, SHAPE.targets)
    )
    small = 2 * quantize.num_bytes(adapter)  # the adapter, and rounding up of what jax keeps
    base = quantize.num_bytes(packaged.params)
    assert small < base / 4
    gc.collect()
    before = {id(x): x for x in jax.live_arrays()}  # held, so that no id is given anew
    gc.disable()  # references alone must free it
    try:
        verdicts = filtering.score_pairs(config, inputs, pairs[:40], seed=0, folder=tmp_path)
        assert new_bytes(before) < small
        # The judge of a round of Constitutional AI, and a guardian that writes answers.
        whole = verdicts.make_filter()
        assert new_bytes(before) > base
        again = whole.score(pairs[:40])
        del whole
        assert new_bytes(before) < small
        if kind == "guardian":
            config.filter.action = "rewrite"
            filtering.apply_action(config, inputs, [pairs[:40]], verdicts, 0)
            assert new_bytes(before) < small
    finally:
        gc.enable()
    np.testing.assert_allclose(again, verdicts.probability, atol=1e-6)
    assert len(trainings) == 1 and len(loads) == (3 if kind == "guardian" else 2)
    # What is in the cache needs no model at all.
    filtering.score_pairs(config, inputs, pairs[:40], seed=0, folder=tmp_path)
    assert len(trainings) == 1 and len(loads) == (3 if kind == "guardian" else 2)


def test_a_guard_is_split_quantised_and_recomputed_as_the_base(packaged, pairs):
    config = filter_config()
    config.update({"quantization": "int8", "remat": True, "model_parallel": 2})
    mesh = make_mesh(model_parallel=2)
    base = filtering.guard_loader(config, mesh)("package:model")
    kernel = base.params["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.kind == "int8" and base.config.remat
    assert kernel.codes.sharding.device_set == set(mesh.devices[0])  # one copy, not four
    assert kernel.codes.addressable_shards[0].data.shape[-1] == kernel.codes.shape[-1] // 2
    options = TrainingOptions(epochs=1, batch_size=16, learning_rate=3e-3)
    scores = []
    for model in (base, filtering.guard_loader(filter_config(), None)("package:model")):
        made, _ = guard.train(pairs[::8], model, SHAPE, seed=0, options=options, max_length=96)
        assert made.model.config.remat == model.config.remat
        scores.append(made.log_odds(pairs[1:40]))
    # int8 moves logits by 1% of their spread.
    assert np.corrcoef(*scores)[0, 1] > 0.99 and np.abs(scores[0]).max() > 0.5


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("quantization", "int4", "quantization: 'int4' is not one of .*int8, nf4"),
        ("dtype", "float16", "dtype: 'float16' is not one of float32, bfloat16"),
        ("model_parallel", 0, "model_parallel=0: expected at least 1"),
    ],
)
def test_the_layout_of_a_guard_is_checked(field, value, message):
    config = filter_config()
    config[field] = value
    with pytest.raises(ConfigError, match=message):
        validate_filter(config)
