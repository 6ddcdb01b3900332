"""Everything that a run of a config compiles, as programs of shapes: no weights, no data."""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from fedsafe_jax import random_streams
from fedsafe_jax.aot.program import (
    Program,
    Run,
    attended,
    base_shapes,
    least,
    on,
)
from fedsafe_jax.cai import steps as cai_steps
from fedsafe_jax.cai import train as cai_train
from fedsafe_jax.cai.derta import Triple
from fedsafe_jax.data import chat
from fedsafe_jax.data.batches import RoundBatches
from fedsafe_jax.federated import simulation
from fedsafe_jax.federated.client import LocalSteps
from fedsafe_jax.federated.mesh import clients_at_once
from fedsafe_jax.federated.round_programs import ChunkInputs
from fedsafe_jax.federated.slots import queued_rows
from fedsafe_jax.inference import decoding, decoding_state
from fedsafe_jax.inference.prompt_packing import cache_length, pack_prompts
from fedsafe_jax.inference.sampling import Sampling
from fedsafe_jax.models import attention, row_queue
from fedsafe_jax.models.base_model import model_folder
from fedsafe_jax.models.cache import unrolls, unstack
from fedsafe_jax.models.decoder import Decoder
from fedsafe_jax.models.flatten_vmap import MICROBATCHES, TARGET_CHUNKS
from fedsafe_jax.models.sharding import CLIENTS, MODEL
from fedsafe_jax.models.tokenizer_loading import read_tokenizer
from fedsafe_jax.pipeline import round_setup
from fedsafe_jax.pipeline.revision_rows import read_recipe
from fedsafe_jax.random_streams import Purpose


def federated(run: Run) -> Iterator[Program]:
    """Yields local training of a chunk, the sum over chunks, and the server's step."""
    c, mesh = run.config, run.mesh
    programs = round_setup.build(c, c.algorithms[0], run.model, mesh)
    spec, layout = programs.spec, programs.layout
    count = simulation.chunk_size(c.clients_per_round, mesh, c.chunk_clients)
    real = min(count, c.clients_per_round)
    examples = run.lengths.encoded(real * c.examples_per_client, c.seq_len)
    batches = RoundBatches(
        [examples[i::real] for i in range(real)],
        0,
        0,
        ids=range(real),
        steps=[c.local_steps] * real,
        local_steps=c.local_steps,
        batch_size=c.batch_size,
        seq=c.seq_len,
        accumulation=c.accumulation,
        noise=bool(c.lora_dropout),
    )
    batch = batches.chunk(0, count)
    tokens, targets = int((batch.segment_ids > 0).sum()), int((batch.mask > 0).sum())
    server = on(jax.eval_shape(spec.algorithm.init, run.factors), mesh)
    states = jax.eval_shape(spec.algorithm.init_client, run.factors)
    params = sum(x.size for x in jax.tree.leaves(run.factors))
    residuals = jax.ShapeDtypeStruct((params,), jnp.float32) if spec.compression else ()
    each = (jnp.float32, jnp.float32, jnp.int32)
    weights, scales, ranks = (jax.ShapeDtypeStruct((count,), dtype) for dtype in each)
    by_client = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), (states, residuals)
    )
    inputs = on(
        ChunkInputs(
            batch, weights, scales, ranks=ranks, states=by_client[0], residuals=by_client[1]
        ),
        mesh,
        layout,
    )
    rates = on(jax.ShapeDtypeStruct((c.local_steps,), jnp.float32), mesh)
    local = LocalSteps(rates, programs.slots(batches.filled, count))
    at_once = max(1, -(-real // mesh.shape[CLIENTS]))
    at_once = min(at_once, c.clients_in_parallel or at_once)
    slots, computed, shares = local.slots, batch.mask.size, {}
    rows_of_call = batch.mask.shape[-2]
    if slots:
        parallel, shared = clients_at_once(mesh, c.clients_in_parallel)
        taken = row_queue.computed(queued_rows(mesh, parallel, batches.filled, count), slots)
        computed = int(taken.sum()) * c.seq_len
        shares = {row_queue.SLOTS: tuple(float(np.mean(taken == n)) for n in slots)}
        rows_of_call = slots[-1] // (mesh.shape[CLIENTS] if shared else 1)
    moments = 2 * 4 * params * at_once
    yield Program(
        "train",
        programs.train,
        (server, run.base, inputs, local),
        kinds={"base": run.base, "adapters": server, "batch": inputs},
        mesh=mesh,
        tokens=tokens,
        computed=computed,
        minimum=least(
            run.shape,
            tokens,
            attended(batch.positions, batch.segment_ids),
            logits=2 * targets,
            trains=True,
            remat=c.remat,
        ),
        attention=attention.choose_backend(run.shape, c.seq_len, c.seq_len),
        shares=shares,
        trips={
            TARGET_CHUNKS: run.chunk_trips(
                targets * at_once / (real * c.local_steps * c.accumulation),
                rows_of_call * c.seq_len,
            ),
            MICROBATCHES: run.microbatches(batch, c.local_steps * c.accumulation),
        },
        hidden_optimizer=moments,
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        sent = jax.eval_shape(programs.train, server, run.base, inputs, local)[0]
    sent = on(sent, mesh, layout)
    gathered = [sent]
    if spec.linear:
        gathered = on(jax.eval_shape(programs.collect, None, sent), mesh)
        yield Program(
            "sum",
            programs.collect,
            (gathered, sent),
            kinds={"adapters": (gathered, sent)},
            mesh=mesh,
        )
    key, row = on(jax.eval_shape(lambda: random_streams.key(Purpose.SHAPES, 0)), mesh), None
    if run.config.federated.noise_bands > 1:
        row = on(jax.ShapeDtypeStruct((run.config.rounds,), jnp.float32), mesh)
    yield Program(
        "server",
        programs.finish,
        (server, gathered, key, row),
        kinds={"adapters": (server, gathered)},
        mesh=mesh,
    )


def generation(run: Run) -> Iterator[Program]:
    """Yields prefill of a batch of prompts, and the decoding that follows."""
    c, mesh, model = run.config, run.mesh, run.model
    devices, rows = mesh.shape[CLIENTS], c.eval.batch_size
    rows = -(-rows // devices) * devices
    most = run.shape.max_length - c.eval.max_new_tokens
    lengths = np.minimum(run.lengths.prompts, most)
    prompts = [np.zeros(lengths[i % len(lengths)], int) for i in range(rows)]
    packed = pack_prompts(prompts, devices, run.shape.platform)
    specs = decoding_state.Specs.of(model, stacked=False)
    laid = type(packed)(*(on(x, mesh, s) for x, s in zip(packed, specs.packed, strict=True)))
    factors = on(run.factors, mesh)
    tokens, seq = int((packed.segment_ids > 0).sum()), packed.tokens.shape[1]
    prefill = decoding.prefill_program(model, False, mesh)
    yield Program(
        "prefill",
        prefill,
        (run.base, factors, laid),
        kinds={"base": run.base, "adapters": factors, "batch": laid},
        mesh=mesh,
        tokens=tokens,
        computed=packed.tokens.size,
        minimum=least(
            run.shape, tokens, attended(packed.positions, packed.segment_ids), logits=rows
        ),
        attention=attention.choose_backend(run.shape, seq, seq),
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        _, cache = jax.eval_shape(prefill, run.base, factors, laid)
    slots = cache_length(packed.valid.shape[1] + c.eval.max_new_tokens, run.shape.platform)
    cache = jax.eval_shape(functools.partial(decoding.grow_cache, cache_len=slots), cache)
    split = MODEL if run.shape.num_kv_heads % mesh.shape[MODEL] == 0 else None

    def laid_out(x):  # keys and values: rows over clients, heads over `model`
        axes = [None] * x.ndim
        axes[-4], axes[-3] = CLIENTS, split
        return on(x, mesh, PartitionSpec(*axes))

    cache = cache._replace(
        key=jax.tree.map(laid_out, cache.key),
        value=jax.tree.map(laid_out, cache.value),
        valid=on(cache.valid, mesh, PartitionSpec(CLIENTS)),
        length=on(cache.length, mesh),
    )
    groups = PartitionSpec(None, CLIENTS)
    integers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    state = decoding_state.State(
        on(integers((1, rows)), mesh, groups),
        on(integers((1, rows, c.eval.max_new_tokens)), mesh, groups),
        on(jax.ShapeDtypeStruct((1, rows), bool), mesh, groups),
        cache=cache,
    )
    keys = on(
        jax.eval_shape(lambda: jax.random.split(random_streams.key(Purpose.SHAPES, 0), (1, rows))),
        mesh,
        groups,
    )
    base = run.base
    if unrolls(run.shape):  # as `decoding.decoding_params` does
        base = on(jax.eval_shape(lambda x: unstack(x, run.shape.num_layers), base), mesh)
    yield Program(
        "decode",
        decoding.decode_program(model, Sampling(), False, mesh=mesh),
        (
            base,
            factors,
            state,
            on(integers((rows,)), mesh, PartitionSpec(CLIENTS)),
            on(integers(()), mesh),
            keys,
            on(integers((2,)), mesh),
        ),
        kinds={"base": base, "adapters": factors, "batch": state[:3], "cache": cache},
        mesh=mesh,
        tokens=rows,  # of one step, in the middle of the answers
        computed=rows,
        minimum=least(run.shape, rows, tokens / rows + c.eval.max_new_tokens / 2, logits=rows),
        attention="xla",
    )


def constitutional(run: Run) -> Iterator[Program]:
    """Yields a training step of Constitutional AI."""
    c, mesh = run.config, run.host
    shape, devices = dataclasses.replace(run.shape, mesh=mesh), mesh.shape[CLIENTS]
    recipe = read_recipe(c)
    init, step = cai_train.make_step(Decoder(shape, run.lora.scale), recipe)
    # Words of one token each; the packaged tokenizer is at hand whatever the model is.
    tokenizer = read_tokenizer(model_folder("package:model"))

    def text(count: int) -> str:
        return " ".join(["water"] * max(1, count))

    answer = int(min(c.cai.max_new_tokens, c.seq_len // 2))
    triples = [
        Triple(text(min(int(n), c.seq_len // 2)), text(answer), text(answer))
        for n in run.lengths.prompts[: c.cai.pairs_per_step]
    ]
    asked = c.cai.red_team_prompts + c.cai.benign_prompts
    replay = c.cai.replay_examples / max(c.cai.replay_examples + asked, 1)
    data = cai_steps.make_steps(
        recipe,
        1,
        run.lengths.encoded(c.cai.batch_size, c.seq_len),
        triples=triples,
        encode=lambda turns, r: chat.encode(tokenizer, turns, r, c.seq_len),
        seed=(0,),
        replayed=round(c.cai.batch_size * replay),
        tokenizer=tokenizer,
    )[0]
    # Of the last ones the reference makes a pass too.
    compared = [b for b in (data.held, data.pairs and data.pairs.rows) if b is not None]
    batches = [data.imitation, *data.rows.values(), *compared]
    filled = [int((b.segment_ids > 0).sum()) for b in batches]
    targets = [int((b.mask > 0).sum()) for b in batches]
    seen = [attended(b.positions, b.segment_ids) for b in batches]
    minimum = sum(
        least(shape, n, s, logits=2 * t, trains=True, remat=c.remat)
        for n, s, t in zip(filled, seen, targets, strict=True)
    )
    for n, s, t in list(zip(filled, seen, targets, strict=True))[len(batches) - len(compared) :]:
        minimum += least(shape, n, s, logits=t)
    base = base_shapes(shape, c)
    factors, data = on(run.factors, mesh), on(data, mesh)
    state = on(jax.eval_shape(init, run.factors), mesh)
    reference = factors if c.cai.reference == "global" else None
    rate = on(jax.ShapeDtypeStruct((), jnp.float32), mesh)
    yield Program(
        "cai",
        step,
        (factors, state, reference, base, data, rate),
        kinds={"base": base, "adapters": factors, "optimizer": state, "batch": data},
        mesh=mesh,
        tokens=sum(filled),
        computed=sum(-(-len(b.mask) // devices) * devices * c.seq_len for b in batches),
        minimum=minimum,
        attention=attention.choose_backend(shape, c.seq_len, c.seq_len),
        trips={
            TARGET_CHUNKS: run.chunk_trips(
                sum(targets) / len(batches) / devices, data.imitation.mask.size // devices
            )
        },
    )
