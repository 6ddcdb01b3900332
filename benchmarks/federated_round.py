"""Useful tokens a second of one federated round, against a PyTorch + PEFT loop on the same data.

    python benchmarks/federated_round.py --data_dir=DATA --peer=peft_loop.py

The peer is a script that trains the clients one after another and prints a JSON object with
`useful_tokens_per_s`. Both sides get the same model folder, examples, clients, steps, batch, rank
and targets; ours packs, the peer pads, and only tokens that are not padding count. Runs alternate,
so that noise on a shared machine meets both; medians are reported, compilation apart.
"""

import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax
from absl import app, flags

import fedsafe_jax as fs
from fedsafe_jax.data import chat, sources
from fedsafe_jax.data.batches import RoundBatches
from fedsafe_jax.federated import aggregation, algorithms, mesh, participation, simulation
from fedsafe_jax.federated.client import LocalTraining, make_optimizer
from fedsafe_jax.federated.round import RoundSpec, make_round
from fedsafe_jax.language_model import model_folder
from fedsafe_jax.models import lora, loss

_MODEL = flags.DEFINE_string("model", "package:model", "Model folder or Hub id.")
_SOURCE = flags.DEFINE_string("source", "dolly:dolly/databricks_dolly_sample.csv", "Training data.")
_DATA_DIR = flags.DEFINE_string("data_dir", "", "Folder of the data.")
_PEER = flags.DEFINE_string("peer", None, "The peer's script.", required=True)
_CLIENTS = flags.DEFINE_integer("clients", 5, "Clients a round.")
_STEPS = flags.DEFINE_integer("steps", 10, "Local steps.")
_BATCH = flags.DEFINE_integer("batch", 16, "Examples a step.")
_SEQ = flags.DEFINE_integer("seq", 512, "Longest example, in tokens.")
_RANK = flags.DEFINE_integer("rank", 8, "LoRA rank, on q and v.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Timed rounds of each side.")


def our_round(lm, examples):
    """Returns a function that times a round (useful tokens a second), and the compile seconds."""
    encoded = [chat.encode(lm.tokenizer, e.messages, e.response, _SEQ.value) for e in examples]
    encoded = [e for e in encoded if e is not None]
    clients = [encoded[i :: _CLIENTS.value] for i in range(_CLIENTS.value)]
    config = lora.LoraConfig(_RANK.value, 2.0 * _RANK.value, ("q_proj", "v_proj"))
    lm.lora_scale = config.scale

    def loss_fn(adapter, base, batch):
        return loss.packed_loss(lm.model, adapter, base, batch)

    count, devices = _CLIENTS.value, mesh.make_mesh(jax.devices()[:1])
    method = algorithms.make("fedavg", LocalTraining(loss_fn, make_optimizer()), count)
    adapter = lora.init(jax.random.key(0), lm.config, config)
    parallel = 1 if jax.default_backend() == "cpu" else count
    programs = make_round(RoundSpec(method, aggregation.make("mean")), devices, parallel)
    state = simulation.initial_state(programs, adapter, count)
    cohort = participation.draw_cohort(0, 0, [len(c) for c in clients], count, _STEPS.value)
    batches = RoundBatches(
        clients, 0, 0, cohort.ids, cohort.steps, _STEPS.value, _BATCH.value, _SEQ.value
    )
    useful = int((batches.chunk(0, count).segment_ids > 0).sum())

    def timed():
        started = time.perf_counter()
        # Packing is part of the time, as padding is of the peer's.
        simulation.run_round(
            programs, state, lm.params, batches.chunk, cohort, [5e-5] * _STEPS.value,
            jax.random.key(0), count,
        )  # fmt: skip
        return useful / (time.perf_counter() - started)

    first = useful / timed()
    return timed, first - useful / timed()


def peer_round(rows_file: pathlib.Path) -> float:
    """Useful tokens a second of the peer's timed round."""
    folder = model_folder(_MODEL.value)
    sizes = {"clients": _CLIENTS, "steps": _STEPS, "batch": _BATCH, "seq": _SEQ, "rank": _RANK}
    command = [sys.executable, _PEER.value, "--model", str(folder), "--data", str(rows_file)]
    for name, flag in sizes.items():
        command += [f"--{name}", str(flag.value)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])["useful_tokens_per_s"]


def main(argv):
    del argv
    examples = [e for e in sources.load(_SOURCE.value, _DATA_DIR.value) if e.response]
    lm = fs.load_pretrained(_MODEL.value)
    timed, compile_seconds = our_round(lm, examples)
    ours, peers = [], []
    with tempfile.TemporaryDirectory() as folder:
        rows = pathlib.Path(folder) / "rows.jsonl"
        lines = [json.dumps({"prompt": e.prompt, "response": e.response}) for e in examples]
        rows.write_text("\n".join(lines), encoding="utf-8")
        for _ in range(_REPEATS.value):
            ours.append(timed())
            peers.append(peer_round(rows))
    middle, peer = statistics.median(ours), statistics.median(peers)
    print(
        json.dumps(
            {
                "useful_tokens_per_s": round_to(middle),
                "peer_useful_tokens_per_s": round_to(peer),
                "ratio": middle / peer,
                "all": [ours, peers],
                "compile_s": round_to(compile_seconds),
                "device": jax.devices()[0].device_kind,
            },
            indent=2,
        )
    )


def round_to(value: float) -> float:
    """Tokens a second to one digit after the point."""
    return float(f"{value:.1f}")


if __name__ == "__main__":
    app.run(main)
