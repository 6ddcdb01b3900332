"""Arithmetic of a local step and bytes of a decoding step, beside what is unavoidable.

    python benchmarks/flops.py --shape=demo --seq=512 [--measure]

Operations are those that XLA counts in the compiled step (`cost_analysis`), for one row of `--seq`
tokens that are all learned. XLA counts the body of a loop once, so one layer and the head are
compiled by themselves, with plain attention, and added up. Beside them stands the analytic minimum:
2 operations a weight and token forward, 2 for the gradient of activations, 6 for LoRA's, none for
the base's; attention over the causal half. Nothing is allocated for the counts: `--shape=8b` runs
anywhere. `--measure` times the step and decoding, in operations and bytes a second, against a large
matrix product and a large copy on the same device. The last line is a JSON object.
"""

import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import shapes
from absl import app, flags
from rich.console import Console
from rich.table import Table

from fedsafe_jax import load_pretrained
from fedsafe_jax.data.packing import Batch
from fedsafe_jax.inference import generation
from fedsafe_jax.models import lora, loss, microbatch
from fedsafe_jax.models.decoder import Decoder, param_shapes

_SHAPE = flags.DEFINE_enum("shape", "demo", shapes.NAMES, "Which model.")
_SEQ = flags.DEFINE_integer("seq", 512, "Tokens of the row.")
_RANK = flags.DEFINE_integer("rank", 8, "LoRA rank, on q and v.")
_BATCH = flags.DEFINE_integer("batch", 64, "Rows decoded at once.")
_NEW = flags.DEFINE_integer("new_tokens", 64, "Decoded for each row.")
_MEASURE = flags.DEFINE_bool("measure", False, "Also time both; needs the model in memory.")

TARGETS = ("q_proj", "v_proj")


def row_of(seq: int, segment: int | None = None) -> Batch:
    """One row whose tokens are all learned, in segments of so many tokens."""
    place = np.arange(seq) % (segment or seq)
    segments = np.arange(seq) // (segment or seq) + 1
    fields = {"tokens": place + 3, "targets": place + 4, "positions": place}
    fields |= {"segment_ids": segments, "mask": np.ones(seq, np.float32)}
    return Batch(**{n: jnp.asarray(fields[n])[None] for n in Batch._fields})


def flops_of(function, *arguments) -> float:
    """As XLA counts them in the compiled program."""
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def counted(config, lora_config, seq: int) -> dict[str, float]:
    """Operations of the forward and backward pass of one row, by XLA: a layer's, and the head's."""
    one = dataclasses.replace(config, num_layers=1, attention="xla", remat=False)
    model, batch = Decoder(one, lora_config.scale), row_of(seq)
    # One chunk, as chunks are a loop as well.
    loss.CHUNK_TOKENS, loss.DEFAULT_CHUNK_TOKENS = {}, seq
    base = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, config.dtype), param_shapes(one))
    adapter = jax.eval_shape(lambda: lora.init(jax.random.key(0), one, lora_config))
    hidden = jax.ShapeDtypeStruct((1, seq, config.hidden_size), config.dtype)

    def step(adapter, base):
        # The first norm as well: its gradient takes the way to the layer's input, which layers
        # above the first one need, and which XLA would leave out of one by itself.
        def of(a, norm):
            layers = base["layers"] | {"input_layernorm": norm}
            params = base | {"layers": layers}
            rows = batch.tokens, batch.positions, batch.segment_ids
            hidden, _ = model.apply({"params": params, "lora": a}, *rows)
            return loss.token_nll(model, params, hidden, batch.targets, batch.mask).mean()

        norm = base["layers"]["input_layernorm"]
        return jax.value_and_grad(of, argnums=(0, 1))(adapter, norm)

    def head(hidden, base):
        def mean(h):
            return loss.token_nll(model, base, h, batch.targets, batch.mask).mean()

        return jax.value_and_grad(mean)(hidden)

    whole, top = flops_of(step, adapter, base), flops_of(head, hidden, base)
    return {"layer": whole - top, "head": top}


def minimum(config, lora_config, seq: int) -> dict[str, float]:
    """The same from the shapes alone."""
    sizes = [config.projection_shape(name) for name in lora.BLOCK_OF]
    weights = sum(a * b for a, b in sizes)
    adapted = sum(lora_config.rank * sum(config.projection_shape(n)) for n in lora_config.targets)
    width = config.num_heads * config.head_dim
    attention = 3 * 4 * width * (seq + 1) / 2  # products with keys and values, thrice, causal half
    layer = seq * (4 * weights + 6 * adapted + attention)
    return {"layer": layer, "head": seq * 4 * config.vocab_size * config.hidden_size}


def total(parts: dict[str, float], layers: int) -> float:
    return layers * parts["layer"] + parts["head"]


def fastest(function, repeats: int = 7) -> float:
    """Seconds of the fastest call, after one that compiles."""
    jax.block_until_ready(function())
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(function())
        found.append(time.perf_counter() - started)
    return min(found)


def peaks(dtype: str) -> tuple[float, float]:
    """Operations a second of a large matrix product, bytes a second of a large copy."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    square = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x: x @ x)
    big = jnp.ones(2**27, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    return 2 * size**3 / fastest(lambda: product(square)), 2 * big.nbytes / fastest(
        lambda: copy(big)
    )


def measured(lm, lora_config, needed: float, seq: int) -> dict:
    """Rates of the local step, for rows of one segment and of segments of 80, and of decoding."""
    model = Decoder(lm.config, lora_config.scale)
    adapter = lora.init(jax.random.key(0), lm.config, lora_config)
    step = jax.jit(
        microbatch.value_and_grad_in_microbatches(lambda a, b, x: loss.packed_loss(model, a, b, x))
    )
    whole = fastest(lambda: step(adapter, lm.params, row_of(seq)))
    packed = fastest(lambda: step(adapter, lm.params, row_of(seq, 80)))
    operations, bandwidth = peaks(lm.config.dtype)
    prompts = [[5 + i % 7] * 16 for i in range(_BATCH.value)]

    def decode(new):
        return generation.generate_ids(
            lm.model,
            lm.params,
            None,
            prompts=prompts,
            stop_ids=(),
            max_new_tokens=new,
            batch_size=_BATCH.value,
        )[0].finished

    # Twice as long less once as long: without the prompts.
    seconds = fastest(lambda: decode(2 * _NEW.value), 3) - fastest(lambda: decode(_NEW.value), 3)
    weights = sum(x.nbytes for x in jax.tree.leaves(lm.params))
    width = jnp.dtype(lm.config.dtype).itemsize
    slots = 16 + 1.5 * _NEW.value  # read on average in the second half
    cache = 2 * lm.config.num_layers * lm.config.num_kv_heads * lm.config.head_dim * width * slots
    moved = weights + _BATCH.value * cache
    return {
        "step_ms": round(1000 * whole, 1),
        "step_ms_segments_of_80": round(1000 * packed, 1),
        "gflops": round(needed / whole / 1e9, 1),
        "peak_gflops": round(operations / 1e9, 1),
        "share_of_peak": round(needed / whole / operations, 3),
        "decode_tokens_per_s": round(_BATCH.value * _NEW.value / seconds),
        "decode_bytes_a_step": round(moved),
        "bandwidth_gb_s": round(bandwidth / 1e9, 1),
        "share_of_bandwidth": round(moved * _NEW.value / seconds / bandwidth, 3),
        "device": jax.devices()[0].device_kind,
    }


def main(argv):
    del argv
    name, seq = _SHAPE.value, _SEQ.value
    packaged = load_pretrained("package:model")
    config = packaged.config if name == "demo" else shapes.config_of(name)
    lora_config = lora.LoraConfig(_RANK.value, 2.0 * _RANK.value, TARGETS)
    chunks = loss.CHUNK_TOKENS, loss.DEFAULT_CHUNK_TOKENS
    found, least = counted(config, lora_config, seq), minimum(config, lora_config, seq)
    loss.CHUNK_TOKENS, loss.DEFAULT_CHUNK_TOKENS = chunks
    layers = config.num_layers
    out = {"shape": name, "seq": seq, "jax": jax.__version__}
    out["gflop_counted"] = round(total(found, layers) / 1e9, 3)
    out["gflop_minimum"] = round(total(least, layers) / 1e9, 3)
    out["counted_over_minimum"] = round(total(found, layers) / total(least, layers), 3)
    table = Table("operations of a row, GFLOP", "counted", "minimum", "ratio")
    for part in ("layer", "head"):
        table.add_row(
            part, f"{found[part] / 1e9:.3f}", f"{least[part] / 1e9:.3f}",
            f"{found[part] / least[part]:.2f}",
        )  # fmt: skip
    table.add_row(
        f"{layers} layers and head", f"{out['gflop_counted']:.3f}", f"{out['gflop_minimum']:.3f}",
        f"{out['counted_over_minimum']:.2f}",
    )  # fmt: skip
    Console(width=100).print(table)
    if _MEASURE.value:
        dtype = "bfloat16" if name in shapes.LARGE else "float32"
        lm = packaged if name == "demo" else shapes.random_model(name, packaged.tokenizer, dtype)
        out |= measured(lm, lora_config, total(least, layers), seq)
        rates = Table("", "reached", "of the device", "share")
        rates.add_row(
            "local step, GFLOP/s", f"{out['gflops']:,.0f}", f"{out['peak_gflops']:,.0f}",
            f"{out['share_of_peak']:.0%}",
        )  # fmt: skip
        moved = out["share_of_bandwidth"] * out["bandwidth_gb_s"]
        rates.add_row(
            "decoding, GB/s", f"{moved:,.1f}", f"{out['bandwidth_gb_s']:,.1f}",
            f"{out['share_of_bandwidth']:.0%}",
        )  # fmt: skip
        Console(width=100).print(rates)
    print(json.dumps(out))


if __name__ == "__main__":
    app.run(main)
