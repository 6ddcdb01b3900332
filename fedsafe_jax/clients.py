"""The clients of one seed: who holds which pairs, and what the filter leaves of them."""

import dataclasses
import functools

from fedsafe_jax import rounds
from fedsafe_jax.filters import actions, classifier, guard
from fedsafe_jax.language_model import load_pretrained
from fedsafe_jax.models import lora
from fedsafe_jax.world import encode_all


@dataclasses.dataclass
class Clients:
    """The clients of one seed: encoded data with and without the filter."""

    plain: list
    filtered: list | None
    counts: list | None  # FilterCounts by client
    quality: classifier.FilterQuality | None


def build_clients(config, world, seed: int, progress) -> Clients:
    """Partitions the pools, trains the filter once, and filters every client's pairs."""
    split = rounds.split(config, world.safe, world.unsafe, seed)
    asked, held = config.num_clients * config.examples_per_client, sum(map(len, split))
    if held < asked and not config.size_sigma:
        progress.note(f"seed {seed}: clients hold {held} of {asked} pairs asked for: no more data")
    encoded = [encode_all(world, examples, config.seq_len) for examples in split]
    plain, lost = [e for e, _ in encoded], sum(n for _, n in encoded)
    if lost:
        progress.note(f"seed {seed}: {lost} pairs lost, their prompts alone fill seq_len")
    if not any("filter" in arm for arm in config.arms):
        return Clients(plain, None, None, None)
    progress.note(f"seed {seed}: training the safety filter on {len(world.filter_pairs)} pairs")
    unsafe_probability = train_filter(config, world, seed)
    filtered, counts, unsafe, flagged = [], [], [], []
    for examples in split:
        kept, flags, count = actions.drop(unsafe_probability, config.filter.threshold, examples)
        filtered.append(encode_all(world, kept, config.seq_len)[0])
        counts.append(count)
        unsafe += [e.label == "unsafe" for e in examples]
        flagged += list(flags)
    quality = classifier.quality(unsafe, flagged)
    progress.note(f"filter: recall {quality.recall:.1f}%, precision {quality.precision:.1f}%")
    return Clients(plain, filtered, counts, quality)


def train_filter(config, world, seed: int):
    """Trains the configured filter; returns its `examples -> probability of unsafe`."""
    f, pairs = config.filter, world.filter_pairs
    common = (seed, f.epochs, f.batch_size, f.learning_rate)
    if f.kind == "guard":
        # Loaded here and let go after filtering: it may be as large as the model itself.
        lora_config = lora.LoraConfig(f.lora_rank, 2.0 * f.lora_rank, world.lora.targets)
        guard_lm = load_pretrained(f.model, config.dtype)
        trained = guard.train(pairs, guard_lm, lora_config, *common, f.max_length)
        return functools.partial(guard.unsafe_probability, trained)
    trained = classifier.train(pairs, world.lm.tokenizer, *common, f.max_length)
    return functools.partial(classifier.unsafe_probability, trained)
