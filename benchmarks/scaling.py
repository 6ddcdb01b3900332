"""A round over ever more clients, and over ever more devices.

    python benchmarks/scaling.py --clients=1,4,16,64,256
    python benchmarks/scaling.py --clients=16 --devices=1,2,4,8
    python benchmarks/scaling.py --clients=10,100,1000 --chunk=10 --aggregator=median

Every pair of counts runs in a process of its own, on the packaged model and data, one local step
of four examples a client; CPU devices are simulated. Reported are seconds and peak memory,
compilation apart, and what a round's programs send between devices: the sum of updates
reduces one adapter, and nothing is as large as the base. The last line is a JSON object.
"""

# ruff: noqa: E402

import collections
import json
import os
import re
import resource
import subprocess
import sys
import time

# transformers imports torch for a tokenizer where it is installed, 270 MB.
sys.modules["torch"] = None
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import jax
from absl import app, flags
from rich.console import Console
from rich.table import Table

import fedsafe_jax as fs
from fedsafe_jax.data import chat, sources
from fedsafe_jax.data.batches import RoundBatches
from fedsafe_jax.federated import aggregation, algorithms, mesh, participation, simulation
from fedsafe_jax.federated.client import LocalTraining, make_optimizer
from fedsafe_jax.federated.round_programs import RoundSpec, make_round
from fedsafe_jax.models import lora, loss
from fedsafe_jax.models.decoder import Decoder

_CLIENTS = flags.DEFINE_list("clients", ["1", "4", "16", "64", "256"], "Clients a round, several.")
_DEVICES = flags.DEFINE_list("devices", [], "Several; by default, as many as a run would use.")
_CHUNK = flags.DEFINE_integer("chunk", 0, "Clients held at once; 0 for the default.")
_AGGREGATOR = flags.DEFINE_enum("aggregator", "mean", aggregation.AGGREGATORS, "Of the updates.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "The first one compiles; the fastest other counts.")
_ONE = flags.DEFINE_bool("one", False, "Run one pair of counts in this process.")

STEPS, BATCH, SEQ, RANK = 1, 4, 128, 16
COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
WIDTHS = {"pred": 1, "u8": 1, "s8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}


def collectives(compiled_text: str) -> dict[str, dict]:
    """`{kind: {"count", "bytes"}}` of a compiled program, bytes of the results on one device."""
    found: dict = collections.defaultdict(lambda: {"count": 0, "bytes": 0})
    for shapes, kind in COLLECTIVE.findall(compiled_text):
        found[kind]["count"] += 1
        for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            size = WIDTHS.get(dtype, 8)
            for n in filter(None, sizes.split(",")):
                size *= int(n)
            found[kind]["bytes"] += size
    return dict(found)


def recorded(function, calls: dict, name: str):
    """`function`, whose first arguments are kept, as shapes: buffers may be donated."""

    def call(*arguments):
        if name not in calls:
            calls[name] = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
                if isinstance(x, jax.Array) else x, arguments,
            )  # fmt: skip
        return function(*arguments)

    return call


def run_rounds(count: int) -> dict:
    """Rounds of `count` clients on the devices of this process."""
    lm = fs.load_pretrained("package:model", mesh=mesh.make_mesh())
    config = lora.LoraConfig(RANK, 2.0 * RANK, ("q_proj", "v_proj"))
    loss_fn = loss.PackedLoss(Decoder(lm.config, config.scale))
    examples = sources.load("chat:package/clients_safe.jsonl", "")
    encoded = [chat.encode(lm.tokenizer, e.messages, e.response, SEQ) for e in examples]
    encoded = [e for e in encoded if e is not None]
    # Clients share examples: there are fewer than four thousand.
    clients = [[encoded[(4 * k + j) % len(encoded)] for j in range(BATCH)] for k in range(count)]

    # As a run does it; with simulated devices, as accelerators do.
    asked = 1 if _DEVICES.value else 0
    parallel, shared = mesh.clients_at_once(lm.mesh, asked)
    method = algorithms.make("fedavg", LocalTraining(loss_fn, make_optimizer(), mesh=shared), count)
    spec = RoundSpec(method, aggregation.make(_AGGREGATOR.value))
    programs = make_round(spec, lm.mesh, parallel)
    calls: dict = {}
    names = ("train", "collect", "finish")
    watched = programs._replace(**{n: recorded(getattr(programs, n), calls, n) for n in names})
    adapter = lora.init(jax.random.key(0), lm.config, config)
    state = simulation.initial_state(programs, adapter, count)
    chunk = simulation.chunk_size(count, lm.mesh, _CHUNK.value)
    seconds = []
    for t in range(_ROUNDS.value):
        started = time.perf_counter()
        cohort = participation.draw_cohort(0, t, [BATCH] * count, count=count, local_steps=STEPS)
        batches = RoundBatches(
            clients,
            0,
            t,
            ids=cohort.ids,
            steps=cohort.steps,
            local_steps=STEPS,
            batch_size=BATCH,
            seq=SEQ,
        )
        state, report = simulation.run_round(
            watched,
            state,
            lm.params,
            batches=batches.chunk,
            cohort=cohort,
            rates=[1e-3],
            key=jax.random.key(t),
            chunk=chunk,
        )
        seconds.append(time.perf_counter() - started)
    fastest = min(seconds[1:] or seconds)
    sent = {
        name: collectives(getattr(programs, name).lower(*arguments).compile().as_text())
        for name, arguments in calls.items()
    }
    return {
        "clients": count,
        "devices": jax.device_count(),
        "chunk": chunk,
        "aggregator": _AGGREGATOR.value,
        "seconds": round(fastest, 3),
        "ms_per_client": round(1000 * fastest / count, 1),
        "compile_s": round(seconds[0] - fastest, 1),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "collectives": sent,
        "loss": round(report.loss, 6),
        "adapter_kb": round(4 * sum(x.size for x in jax.tree.leaves(adapter)) / 1024),
        "base_kb": round(sum(x.nbytes for x in jax.tree.leaves(lm.params)) / 1024),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def spoken(sent: dict) -> str:
    """`train: all-gather 1 KB` and so on."""
    parts = [
        f"{name}: {x['count']} {kind}, {x['bytes'] / 1024:,.0f} KB"
        for name, kinds in sent.items()
        for kind, x in kinds.items()
    ]
    return "; ".join(parts) or "nothing"


def main(argv):
    if _ONE.value:
        count = int(_CLIENTS.value[0])
        if _DEVICES.value:
            jax.config.update("jax_num_cpu_devices", int(_DEVICES.value[0]))
        else:
            mesh.use_cores(count)
        print(json.dumps(run_rounds(count)))
        return
    found = []
    table = Table("clients", "devices", "ms a client", "compile, s", "peak, MB", "sent")
    for count in _CLIENTS.value:
        for devices in _DEVICES.value or [""]:
            command = [sys.executable, argv[0], "--one", f"--clients={count}"]
            command += [f"--devices={devices}"] if devices else []
            command += [f"--chunk={_CHUNK.value}", f"--aggregator={_AGGREGATOR.value}"]
            command += [f"--rounds={_ROUNDS.value}"]
            # A shell in between: a child's peak memory on Linux begins with that of who started it.
            command = ["sh", "-c", '"$@"; exit $?', "sh", *command]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            found.append(row)
            table.add_row(
                str(row["clients"]), str(row["devices"]), f"{row['ms_per_client']:,.1f}",
                f"{row['compile_s']:.1f}", f"{row['peak_memory_mb']:,}", spoken(row["collectives"]),
            )  # fmt: skip
    Console(width=120).print(table)
    print(json.dumps({"runs": found}))


if __name__ == "__main__":
    app.run(main)
