"""Useful tokens a second of one federated round, against a PyTorch + PEFT loop on the same data.

    python benchmarks/round.py --shape=demo --clients=5 --batch=16 --peer=peft_loop.py \\
        --data_dir=DATA

The peer is a script that trains the clients one after another and prints a JSON object with
`useful_tokens_per_s`. Both sides get the same model folder, examples, clients, steps, batch, rank
and targets; ours packs, the peer pads, and only tokens that are not padding count. Runs alternate,
so that noise on a shared machine meets both; medians are reported, compilation apart; the last line
is a JSON object. Shapes are those of `shapes.py`; `1b` and `8b` have random bfloat16 weights and no
peer, and report the share of `--teraflops` that their useful arithmetic takes.
"""

# ruff: noqa: E402

import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

# The peer's alone: transformers imports torch for a tokenizer where it is installed, 270 MB.
sys.modules["torch"] = None
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import jax
import shapes
from absl import app, flags
from rich.console import Console
from rich.table import Table

from fedsafe_jax.data import chat, sources
from fedsafe_jax.data.batches import RoundBatches
from fedsafe_jax.federated import aggregation, algorithms, mesh, participation, simulation
from fedsafe_jax.federated.client import LocalTraining, make_optimizer
from fedsafe_jax.federated.round_programs import RoundSpec, make_round
from fedsafe_jax.models import lora, loss
from fedsafe_jax.models.decoder import Decoder

_SHAPE = flags.DEFINE_enum("shape", "demo", shapes.NAMES, "Which model.")
_SOURCES = flags.DEFINE_list("sources", ["dolly:dolly/databricks_dolly_sample.csv"], "Rows.")
_DATA_DIR = flags.DEFINE_string("data_dir", "", "Folder of the data.")
_PEER = flags.DEFINE_string("peer", None, "The peer's script; without one, ours alone is timed.")
_CLIENTS = flags.DEFINE_integer("clients", 5, "Clients a round.")
_STEPS = flags.DEFINE_integer("steps", 10, "Local steps.")
_BATCH = flags.DEFINE_integer("batch", 16, "Examples a step.")
_SEQ = flags.DEFINE_integer("seq", 512, "Longest example, in tokens.")
_RANK = flags.DEFINE_integer("rank", 8, "LoRA rank, on q and v.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Timed rounds of each side.")
_PEAK = flags.DEFINE_float("teraflops", 989.0, "Of the accelerator, dense bfloat16 (H100: 989).")


def our_round(lm, examples):
    """`(function that times a round in seconds, useful tokens, their share, compile seconds)`."""
    encoded = [chat.encode(lm.tokenizer, e.messages, e.response, _SEQ.value) for e in examples]
    encoded = [e for e in encoded if e is not None]
    clients = [encoded[i :: _CLIENTS.value] for i in range(_CLIENTS.value)]
    config = lora.LoraConfig(_RANK.value, 2.0 * _RANK.value, ("q_proj", "v_proj"))
    loss_fn, count = loss.PackedLoss(Decoder(lm.config, config.scale)), _CLIENTS.value
    parallel, shared = mesh.clients_at_once(lm.mesh, 0)
    training = LocalTraining(loss_fn, make_optimizer(), mesh=shared, platform=lm.config.platform)
    method = algorithms.make("fedavg", training, count)
    adapter = lora.init(jax.random.key(0), lm.config, config)
    programs = make_round(RoundSpec(method, aggregation.make("mean")), lm.mesh, parallel)
    state = simulation.initial_state(programs, adapter, count)
    cohort = participation.draw_cohort(
        0, 0, [len(c) for c in clients], count=count, local_steps=_STEPS.value
    )
    batches = RoundBatches(
        clients,
        0,
        0,
        ids=cohort.ids,
        steps=cohort.steps,
        local_steps=_STEPS.value,
        batch_size=_BATCH.value,
        seq=_SEQ.value,
    )
    chunk = simulation.chunk_size(count, lm.mesh)
    segments = batches.chunk(0, -(-count // chunk) * chunk).segment_ids
    useful = int((segments > 0).sum())

    def timed():
        started = time.perf_counter()
        # Packing is part of the time, as padding is of the peer's.
        simulation.run_round(
            programs,
            state,
            lm.params,
            batches=batches.chunk,
            cohort=cohort,
            rates=[5e-5] * _STEPS.value,
            key=jax.random.key(0),
            chunk=chunk,
            rows=batches.filled,
        )
        return time.perf_counter() - started

    first = timed()
    return timed, useful, useful / segments.size, first - timed()


def peer_round(folder: pathlib.Path, rows_file: pathlib.Path) -> dict:
    """What the peer prints of its timed round."""
    sizes = {"clients": _CLIENTS, "steps": _STEPS, "batch": _BATCH, "seq": _SEQ, "rank": _RANK}
    command = [sys.executable, _PEER.value, "--model", str(folder), "--data", str(rows_file)]
    for name, flag in sizes.items():
        command += [f"--{name}", str(flag.value)]
    # A shell in between: a child's peak memory on Linux begins with that of who started it.
    command = ["sh", "-c", '"$@"; exit $?', "sh", *command]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(argv):
    del argv
    mesh.use_cores(_CLIENTS.value)
    examples = [e for s in _SOURCES.value for e in sources.load(s, _DATA_DIR.value) if e.response]
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name) / "model"
        lm = shapes.model(_SHAPE.value, folder, mesh.make_mesh())
        timed, useful, fill, compile_s = our_round(lm, examples)
        rows = pathlib.Path(name) / "rows.jsonl"
        lines = [json.dumps({"prompt": e.prompt, "response": e.response}) for e in examples]
        rows.write_text("\n".join(lines), encoding="utf-8")
        ours, peers = [], []
        for _ in range(_REPEATS.value):
            ours.append(timed())
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            if _PEER.value and _SHAPE.value not in shapes.LARGE:
                peers.append(peer_round(folder, rows))
    speed = useful / statistics.median(ours)
    out = {
        "shape": _SHAPE.value,
        "clients": _CLIENTS.value,
        "batch": _BATCH.value,
        "ours_useful_tokens_per_s": round(speed, 1),
        "useful_share": round(fill, 3),
        "peak_memory_mb": round(memory),
        "compile_s": round(compile_s, 1),
        "round_s": [round(s, 2) for s in ours],
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
    }
    if peers:
        theirs = statistics.median(p["useful_tokens_per_s"] for p in peers)
        out |= {
            "theirs_useful_tokens_per_s": round(theirs, 1),
            "theirs_all": [p["useful_tokens_per_s"] for p in peers],
            "theirs_peak_memory_mb": max(p["peak_memory_mb"] for p in peers),
            "ratio": round(speed / theirs, 2),
        }
    elif lm.config.platform != "cpu":
        weights = sum(x.size for x in jax.tree.leaves(lm.params))
        # Forward and the gradient of activations; the base's weights have none.
        out |= {"share_of_peak": round(speed * 4 * weights / (_PEAK.value * 1e12), 3)}
    table = Table("side", "useful tokens/s", "peak memory, MB", title_justify="left")
    table.add_row("ours", f"{speed:,.0f}", f"{memory:,.0f}")
    if peers:
        table.add_row("peer", f"{theirs:,.0f}", f"{out['theirs_peak_memory_mb']:,}")
    Console(width=80).print(table)
    print(json.dumps(out))


if __name__ == "__main__":
    app.run(main)
