"""Generation against transformers: greedy, sampled, several adapters, several devices."""

import jax
import numpy as np
import pytest
import scipy.stats
from families import FAMILIES, VOCAB, checkpoint

from fedsafe_jax.data import chat
from fedsafe_jax.federated.mesh import make_mesh
from fedsafe_jax.inference import decoding, generation, pretrained, prompt_packing
from fedsafe_jax.inference.sampling import Sampling
from fedsafe_jax.models import hub, lora
from fedsafe_jax.models.decoder import Decoder

PROMPTS = ("Hello!", "What is the capital of France?", "Write a short poem about the ocean.")


def expected_greedy(reference, prompt, stop_id, count):
    import torch

    with torch.no_grad():
        out = reference.generate(
            torch.tensor([prompt]), max_new_tokens=count, do_sample=False, pad_token_id=0
        )
    ids = out[0, len(prompt) :].tolist()
    return ids[: ids.index(stop_id)] if stop_id in ids else ids


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers_in_every_family(tmp_path, family):
    pytest.importorskip("torch")
    reference = checkpoint(family, tmp_path)
    config = hub.read_config(tmp_path)
    params, rng = hub.load_params(tmp_path, config, "float32"), np.random.default_rng(0)
    # Unequal lengths, over the windows; 64 tokens outgrow the cache twice.
    prompts = [rng.integers(3, VOCAB, n).tolist() for n in (3, 30, 17, 17, 9)]
    (answers,) = generation.generate_ids(
        Decoder(config), params, None, prompts=prompts, stop_ids=(2,), max_new_tokens=64
    )
    for prompt, ids in zip(prompts, answers.ids, strict=True):
        assert ids == expected_greedy(reference, prompt, 2, 64)


def test_scanned_layers_generate_the_same(monkeypatch, packaged):
    def fresh():
        decoding.prefill_program.cache_clear()
        decoding.decode_program.cache_clear()

    expected = packaged.generate(PROMPTS, max_new_tokens=40)
    monkeypatch.setattr("fedsafe_jax.models.cache.UNROLLED_LAYERS", 0)
    fresh()
    assert packaged.generate(PROMPTS, max_new_tokens=40) == expected
    fresh()


def test_the_packaged_model_answers_as_in_transformers(tmp_path, packaged):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    pretrained.save_pretrained(packaged, tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    answers = packaged.generate(PROMPTS, max_new_tokens=64)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = chat.render(packaged.tokenizer, (("user", prompt),), True)
        expected = expected_greedy(reference, ids, packaged.tokenizer.eos_token_id, 64)
        assert answer == packaged.tokenizer.decode(expected, skip_special_tokens=True).strip()


def test_sampled_tokens_follow_the_softmax(packaged):
    prompt = chat.render(packaged.tokenizer, (("user", "Hello!"),), True)
    count, temperature = 4000, 5.0
    (answers,) = generation.generate_ids(
        packaged.model,
        packaged.params,
        None,
        prompts=[prompt] * count,
        stop_ids=(-1,),
        max_new_tokens=1,
        sampling=Sampling(temperature),
        batch_size=500,
    )
    logits = np.asarray(packaged(np.array([prompt])))[0, -1].astype(np.float64) / temperature
    p = np.exp(logits - logits.max())
    p /= p.sum()
    # Cells of like probability, some of one token and some of thousands.
    order = np.argsort(-p)
    cells = np.minimum(np.floor(np.cumsum(p[order]) * 25), 24)
    _, cell_of = np.unique(cells, return_inverse=True)
    expected = count * np.bincount(cell_of, p[order])
    counts = np.bincount([ids[0] for ids in answers.ids], minlength=len(p))
    observed = np.bincount(cell_of, counts[order])
    assert len(expected) > 15 and expected.min() > 5
    assert scipy.stats.chisquare(observed, expected).pvalue > 1e-3


def test_samples_follow_the_seed_and_not_the_batch(packaged):
    options = {"max_new_tokens": 12, "temperature": 1.5, "top_k": 50}
    first = packaged.generate(PROMPTS, seed=1, **options)
    assert first == packaged.generate(PROMPTS, seed=1, batch_size=2, **options)
    assert first != packaged.generate(PROMPTS, seed=2, **options)
    several = packaged.sample(PROMPTS[:2], 3, max_new_tokens=12, temperature=1.5)
    assert [len(answers) for answers in several] == [3, 3]
    assert len(set(several[1])) > 1


def test_several_adapters_at_once_answer_as_one_by_one(packaged):
    config = lora.LoraConfig(4, 8.0, ("q_proj", "v_proj", "down_proj"))
    rng = np.random.default_rng(0)

    def drawn(x):
        return x + 0.1 * rng.normal(size=x.shape).astype(np.float32)

    fresh = lora.init(jax.random.key(0), packaged.config, config)
    adapters = [jax.tree.map(drawn, fresh) for _ in range(3)]
    singly = [
        packaged.with_adapter(lora.Adapter(a, config)).generate(PROMPTS, max_new_tokens=40)
        for a in adapters
    ]
    stacked = jax.tree.map(lambda *x: np.stack(x), *adapters)
    together = packaged.generate_each(lora.Adapter(stacked, config), PROMPTS, max_new_tokens=40)
    assert together == singly
    assert singly[0] != singly[1] != singly[2]


@pytest.mark.parametrize("model_parallel", [1, 4])
def test_devices_share_the_rows(packaged, model_parallel):
    mesh = make_mesh(model_parallel=model_parallel)
    split = pretrained.load_pretrained("package:model", mesh=mesh)
    prompts = [*PROMPTS, "Tell me a joke.", "Name three colours."]
    options = {"max_new_tokens": 24, "batch_size": 5}
    assert split.generate(prompts, **options) == packaged.generate(prompts, **options)
    if model_parallel == 1:
        sampled = {"temperature": 1.0, "seed": 3} | options
        assert split.generate(prompts, **sampled) == packaged.generate(prompts, **sampled)


@pytest.mark.parametrize("unrolled", [True, False])
def test_a_cache_that_grows_frees_the_old_one(packaged, monkeypatch, unrolled):
    if not unrolled:
        monkeypatch.setattr("fedsafe_jax.models.cache.UNROLLED_LAYERS", 0)
    decoding.prefill_program.cache_clear()
    engine = generation.Engine(packaged.model, packaged.params, None, stop_ids=(2,), batch_size=2)
    packed = prompt_packing.pack_prompts([[5, 6, 7], [8, 9]], platform="cpu")
    _, old = engine.prefill(packed)
    content = jax.device_get(old)
    assert decoding.grow(old, 32) is old
    new = decoding.grow(old, 64)
    arrays = jax.tree.leaves((old.key, old.value, old.valid))
    assert all(x.is_deleted() for x in arrays)
    assert new.valid.shape[-1] == 64 and not np.asarray(new.valid)[:, 32:].any()
    values = jax.tree.leaves(new.value), jax.tree.leaves(content.value)
    for wide, narrow in zip(*values, strict=True):
        np.testing.assert_array_equal(np.asarray(wide)[..., :32, :], narrow)
    decoding.prefill_program.cache_clear()


def test_caches_of_accelerators_grow_in_longer_steps(packaged, monkeypatch):
    lengths = {
        platform: {prompt_packing.cache_length(n, platform) for n in range(1, 1025)}
        for platform in ("cpu", "gpu", "tpu")
    }
    assert lengths["gpu"] == lengths["tpu"] == {256, 512, 768, 1024}
    assert {32, 64, 96} < lengths["cpu"] and all(n % 32 == 0 for n in lengths["cpu"])
    expected, grown = packaged.generate(PROMPTS, max_new_tokens=40), []
    grow = decoding.grow
    monkeypatch.setattr(decoding, "grow", lambda *a: grown.append(a[1]) or grow(*a))
    monkeypatch.setitem(prompt_packing.CACHE_STEP, "cpu", prompt_packing.ACCELERATOR_CACHE_STEP)
    assert packaged.generate(PROMPTS, max_new_tokens=40) == expected
    assert not grown
