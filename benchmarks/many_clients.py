"""Peak memory and seconds of a round with ever more clients, chunk by chunk.

    python benchmarks/many_clients.py --clients=10,100,1000

Every count runs in a process of its own, on the packaged model and data, one local step of four
examples a client; with `--aggregator=median` all updates are held at once. The last line is a JSON
object.
"""

import json
import resource
import subprocess
import sys
import time

import jax
from absl import app, flags

import fedsafe_jax as fs
from fedsafe_jax.data import chat, sources
from fedsafe_jax.data.batches import RoundBatches
from fedsafe_jax.federated import aggregation, algorithms, mesh, participation, simulation
from fedsafe_jax.federated.client import LocalTraining, make_optimizer
from fedsafe_jax.federated.round import RoundSpec, make_round
from fedsafe_jax.models import lora, loss

_CLIENTS = flags.DEFINE_list("clients", ["10", "100", "1000"], "Clients a round, several.")
_CHUNK = flags.DEFINE_integer("chunk", 10, "Clients held at once.")
_AGGREGATOR = flags.DEFINE_enum("aggregator", "mean", aggregation.AGGREGATORS, "Of the updates.")
_ROUNDS = flags.DEFINE_integer("rounds", 2, "The last one is timed.")
_ONE = flags.DEFINE_bool("one", False, "Run one count in this process.")

STEPS, BATCH, SEQ, RANK = 1, 4, 128, 16


def run_rounds(count: int) -> dict:
    """Rounds of `count` clients."""
    mesh.use_cores(count)
    lm = fs.load_pretrained("package:model", mesh=mesh.make_mesh())
    config = lora.LoraConfig(RANK, 2.0 * RANK, ("q_proj", "v_proj"))
    lm.lora_scale = config.scale
    examples = sources.load("chat:package/clients_safe.jsonl", "")
    encoded = [chat.encode(lm.tokenizer, e.messages, e.response, SEQ) for e in examples]
    encoded = [e for e in encoded if e is not None]
    # Clients share examples: there are fewer than four thousand.
    clients = [[encoded[(4 * k + j) % len(encoded)] for j in range(BATCH)] for k in range(count)]

    def loss_fn(adapter, base, batch):
        return loss.packed_loss(lm.model, adapter, base, batch)

    method = algorithms.make("fedavg", LocalTraining(loss_fn, make_optimizer()), count)
    programs = make_round(RoundSpec(method, aggregation.make(_AGGREGATOR.value)), lm.mesh)
    adapter = lora.init(jax.random.key(0), lm.config, config)
    state = simulation.initial_state(programs, adapter, count)
    chunk = simulation.chunk_size(count, lm.mesh.shape["clients"], _CHUNK.value)
    for t in range(_ROUNDS.value):
        started = time.perf_counter()
        cohort = participation.draw_cohort(0, t, [BATCH] * count, count, STEPS)
        batches = RoundBatches(clients, 0, t, cohort.ids, cohort.steps, STEPS, BATCH, SEQ)
        state, report = simulation.run_round(
            programs, state, lm.params, batches.chunk, cohort, [1e-3], jax.random.key(t), chunk
        )
        seconds = time.perf_counter() - started
    return {
        "clients": count,
        "chunk": chunk,
        "aggregator": _AGGREGATOR.value,
        "seconds": round(seconds, 2),
        "clients_per_s": round(count / seconds, 1),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "loss": round(report.loss, 4),
        "adapter_kb": round(4 * sum(x.size for x in jax.tree.leaves(adapter)) / 1024),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


def main(argv):
    if _ONE.value:
        print(json.dumps(run_rounds(int(_CLIENTS.value[0]))))
        return
    found = []
    for count in _CLIENTS.value:
        settings = [a for a in argv[1:] if not a.startswith("--clients")]
        command = [sys.executable, argv[0], "--one", f"--clients={count}", *settings]
        command += [f"--chunk={_CHUNK.value}", f"--aggregator={_AGGREGATOR.value}"]
        command += [f"--rounds={_ROUNDS.value}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(found[-1])
    print(json.dumps({"counts": found}))


if __name__ == "__main__":
    app.run(main)
