"""One part of `device.sh`: what is worth measuring on a GPU, as one JSON object.

    python benchmarks/device.py --part=attention --output=attention.json [--tiny] [--peers=DIR]

Results are written after every measurement, so that a part that is cut off leaves what it had. The
weights are random, made on the device; examples are random words with Dolly's lengths.
"""

# ruff: noqa: E402

import contextlib
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

# Both platforms are there: the CPU is what numbers are compared with.
os.environ.setdefault("JAX_PLATFORMS", "")
# Memory is taken as it is needed, so that its peak can be read, and a peer finds some.
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"

import jax
import jax.numpy as jnp
import numpy as np
import shapes
from absl import app, flags

import fedsafe_jax as fs
from fedsafe_jax.cai import constitution
from fedsafe_jax.cai import steps as cai_steps
from fedsafe_jax.cai import train as cai_train
from fedsafe_jax.cai.derta import Triple
from fedsafe_jax.cai.revise import revise
from fedsafe_jax.data import chat, sources
from fedsafe_jax.data.batches import RoundBatches
from fedsafe_jax.federated import aggregation, algorithms, mesh, participation, simulation
from fedsafe_jax.federated.client import LocalTraining, make_optimizer
from fedsafe_jax.federated.round_programs import RoundSpec, make_round
from fedsafe_jax.inference import generation
from fedsafe_jax.inference.chat_session import ChatSession
from fedsafe_jax.models import attention, attention_kernels, lora, loss
from fedsafe_jax.models.decoder import Decoder
from fedsafe_jax.models.visibility import Visibility
from fedsafe_jax.pipeline.constitutional import make_generate_fn

PARTS = ("numerics", "round_8b", "cai", "round_135m", "generate", "attention")
_PART = flags.DEFINE_enum("part", None, PARTS, "What to measure.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "File of the results.", required=True)
_TINY = flags.DEFINE_bool("tiny", False, "Small sizes, for a trial on a CPU.")
_PEERS = flags.DEFINE_string("peers", "", "Folder of the PyTorch loops; none: ours alone.")
PEAK = 989e12  # dense bfloat16 operations a second of an H100
BANDWIDTH = 3.35e12  # bytes a second of its memory


class Results(dict):
    """A JSON object that is written whenever a key is set."""

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        pathlib.Path(_OUTPUT.value).write_text(json.dumps(self, indent=1) + "\n")
        print(f"{_PART.value}: {key}: {value}", flush=True)

    @contextlib.contextmanager
    def attempt(self, key: str):
        """Keeps what fails as a result, so that the measurements after it still run."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  whatever a driver raises
            lines = str(error).strip().splitlines() or [""]
            self[key] = f"failed: {type(error).__name__}: {lines[0][:300]}"


def seconds(function, repeats: int = 5) -> float:
    """Median seconds of a call whose results are on the device, after a first one."""
    jax.block_until_ready(function())
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(function())
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def first_and_later(function, repeats: int = 3) -> tuple[float, list[float]]:
    """Seconds of the first call of a function, which compiles, and of later ones."""
    taken = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        function()
        taken.append(time.perf_counter() - started)
    return taken[0], taken[1:]


def memory_gib() -> float:
    """Peak memory of the first device, 0 where the backend does not say."""
    stats = jax.devices()[0].memory_stats() or {}
    return round(stats.get("peak_bytes_in_use", 0) / 2**30, 2)


# Attention: every kernel against float32 products on the CPU, and its time forward and backward.


def attention_arrays(shape, seed=0):
    rows, seq, heads, kv_heads, head_dim = shape
    rng = np.random.default_rng(seed)
    draw = lambda n: rng.normal(size=(rows, seq, n, head_dim)).astype(np.float32)  # noqa: E731
    segments = np.zeros((rows, seq), np.int32)
    for row in segments:  # segments of about 150 tokens, as in Dolly, and some padding
        ends = np.cumsum(rng.lognormal(4.9, 0.6, seq // 20).astype(int) + 2)
        for i, end in enumerate(ends[ends < seq]):
            row[(0 if i == 0 else ends[i - 1]) : end] = i + 1
    return draw(heads), draw(kv_heads), draw(kv_heads), segments, draw(heads)


def attend_with(name, window=0):
    """`(query, key, value, segments, cotangent) -> (loss, gradients)` of one backend, jitted."""

    def out(query, key, value, segments):
        scale = query.shape[-1] ** -0.5
        if name == "xla":
            mask = Visibility.in_rows(segments).mask(window)
            return attention.attend(query, key, value, mask=mask, scale=scale)
        return attention_kernels.attend(
            name, query, key, value=value, segments=segments, window=window, scale=scale
        )

    def loss_of(query, key, value, segments, cotangent):
        return jnp.sum((cotangent * out(query, key, value, segments)).astype(jnp.float32))

    return jax.jit(jax.vmap(jax.value_and_grad(loss_of, (0, 1, 2))))


def measure_attention(results):
    names = ("triton", "cudnn", "packed", "xla")
    shape = (2, 256, 4, 2, 64) if _TINY.value else (2, 512, 8, 2, 128)
    if jax.devices()[0].platform == "cpu":
        names = ("xla",)
    arrays = [np.stack([x, x[::-1]]) for x in attention_arrays(shape)]
    half = [jnp.asarray(x, jnp.int32 if x.dtype == np.int32 else jnp.bfloat16) for x in arrays]
    with jax.default_device(jax.devices("cpu")[0]), jax.default_matmul_precision("highest"):
        wide = [np.asarray(x, None if x.dtype == np.int32 else np.float32) for x in half]
        expected = attend_with("xla")(*wide)[1]
    for name in names:
        with results.attempt(f"{name}: error"):
            got = attend_with(name)(*half)[1]
            results[f"{name}: error"] = [
                float(np.linalg.norm(np.float32(a) - b) / np.linalg.norm(b))
                for a, b in zip(got, expected, strict=True)
            ]
    sizes = {
        "8b, 5 x 8 x 512": (5, 8, 512, 32, 8, 128),
        "8b, 4 x 1 x 4096": (4, 1, 4096, 32, 8, 128),
    }
    if _TINY.value:
        sizes = {"tiny": (2, 2, 256, 4, 2, 64)}
    for title, (clients, *shape) in sizes.items():
        drawn = [attention_arrays(shape, seed=i) for i in range(clients)]
        half = [
            jnp.asarray(np.stack(x), jnp.int32 if x[0].dtype == np.int32 else jnp.bfloat16)
            for x in zip(*drawn, strict=True)
        ]
        for name in names:
            with results.attempt(f"{title}: {name}"):
                step = functools.partial(attend_with(name), *half)
                results[f"{title}: {name}"] = {"ms": round(1e3 * seconds(step, 7), 3)}
    results["peak_gib"] = memory_gib()


# Rounds.


def random_rows(count, seed=0):
    """Pairs of random words with the lengths of Dolly's prompts and responses."""
    rng = np.random.default_rng(seed)
    words = "time people water music history garden light paper number river house story".split()
    scale = 0.2 if _TINY.value else 1.0

    def text(mean, spread):
        length = int(np.clip(rng.lognormal(mean, spread) * scale, 1, 350))
        return " ".join(rng.choice(words, length))

    return [(text(4.87, 0.62), text(2.85, 1.09)) for _ in range(count)]


def round_of(lm, rows, clients, steps, batch, seq, rank, parallel=0):
    """`(function of one round, useful tokens, their share)`, as `finetune` runs it."""
    encoded = [chat.encode(lm.tokenizer, (("user", p),), r, seq) for p, r in rows]
    encoded = [e for e in encoded if e is not None]
    data = [encoded[i::clients] for i in range(clients)]
    config = lora.LoraConfig(rank, 2.0 * rank, ("q_proj", "v_proj"))
    model, devices = Decoder(lm.config, config.scale), lm.mesh
    at_once, shared = mesh.clients_at_once(devices, parallel)
    training = LocalTraining(
        loss.PackedLoss(model),
        make_optimizer(), mesh=shared, platform=lm.config.platform,
    )  # fmt: skip
    method = algorithms.make("fedavg", training, clients)
    programs = make_round(RoundSpec(method, aggregation.make("mean")), devices, at_once)
    state = simulation.initial_state(
        programs, lora.init(jax.random.key(0), lm.config, config), clients
    )
    cohort = participation.draw_cohort(
        0, 0, [len(d) for d in data], count=clients, local_steps=steps
    )
    batches = RoundBatches(
        data, 0, 0, ids=cohort.ids, steps=cohort.steps, local_steps=steps, batch_size=batch, seq=seq
    )
    chunk = simulation.chunk_size(clients, devices)
    segments = batches.chunk(0, -(-clients // chunk) * chunk).segment_ids
    useful = int((segments > 0).sum())

    def run():
        return simulation.run_round(
            programs, state, lm.params, batches=batches.chunk, cohort=cohort,
            rates=[5e-5] * steps, key=jax.random.key(0), chunk=chunk, rows=batches.filled,
        )  # fmt: skip

    return run, useful, segments


def measure_round(results, shape, steps=10, remat=False, options=()):
    sizes = {"clients": 5, "steps": steps, "batch": 16, "seq": 512, "rank": 32}
    if _TINY.value:
        sizes = {"clients": 2, "steps": 2, "batch": 4, "seq": 128, "rank": 4}
    devices = mesh.make_mesh(jax.devices()[:1])
    tokenizer = fs.load_pretrained("package:model").tokenizer
    rows = random_rows(sizes["clients"] * sizes["steps"] * sizes["batch"])
    results["sizes"] = sizes | {"shape": shape, "remat": remat}
    lm = shapes.random_model(shape, tokenizer, "bfloat16", mesh=devices)
    weights = (
        sum(x.size for x in jax.tree.leaves(lm.params))
        - lm.config.vocab_size * lm.config.hidden_size
    )
    for option in options or ("auto",):
        with results.attempt(f"ours, attention {option}"):
            lm = shapes.changed(lm, attention=option, remat=remat)
            run, useful, segments = round_of(lm, rows, **sizes)
            first, taken = first_and_later(run)
            middle = statistics.median(taken)
            results[f"ours, attention {option}"] = {
                "useful_tokens_per_s": round(useful / middle),
                "padded_tokens_per_s": round(segments.size / middle),
                "useful_share": round(useful / segments.size, 3),
                "share_of_peak": round(segments.size / middle * 4 * weights / PEAK, 3),
                "useful_share_of_peak": round(useful / middle * 4 * weights / PEAK, 3),
                "round_s": [round(s, 3) for s in taken],
                "compile_s": round(first - middle, 1),
                "rows": list(segments.shape),
                "loss": run()[1].loss,
                "peak_gib": memory_gib(),
            }
    del lm
    if not _PEERS.value:
        return
    with tempfile.TemporaryDirectory() as name, results.attempt("peer"):
        folder = pathlib.Path(name)
        shapes.write_config(shape, tokenizer, folder)
        lines = [json.dumps({"prompt": p, "response": r}) for p, r in rows]
        (folder / "rows.jsonl").write_text("\n".join(lines))
        arguments = [f"--{k}={v}" for k, v in sizes.items()]
        arguments += ["--model", name, "--data", str(folder / "rows.jsonl"), "--dtype", "bfloat16"]
        results["peer"] = peer("peft_loop.py", arguments + ["--checkpointing"] * remat)


def peer(script, arguments):
    """The last line of a PyTorch loop, whose model gets random weights on the device."""
    code = (
        "import runpy, sys, torch, transformers as t\n"
        "def from_pretrained(path, dtype=None, **_):\n"
        "    config = t.AutoConfig.from_pretrained(path)\n"
        "    with torch.device('cuda' if torch.cuda.is_available() else 'cpu'):\n"
        "        return t.AutoModelForCausalLM.from_config(config, dtype=dtype)\n"
        "t.AutoModelForCausalLM.from_pretrained = from_pretrained\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    command = [sys.executable, "-c", code, str(pathlib.Path(_PEERS.value) / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


# The GPU's numbers against the CPU's, in one process.


def measure_numerics(results):
    texts = ["Hello!", "What is the capital of France?", "Tell me about rivers.", "Who are you?"]
    rows, sizes = random_rows(64, 1), {"clients": 2, "steps": 3, "batch": 4, "seq": 256, "rank": 4}
    outcomes = {}
    for dtype in ("float32", "bfloat16"):
        for device in (jax.devices()[0], jax.devices("cpu")[0]):
            title = f"{dtype} {device.platform}"
            with jax.default_device(device), results.attempt(title):
                lm = fs.load_pretrained("package:model", dtype, mesh=mesh.make_mesh([device]))
                run, _, _ = round_of(lm, rows, **sizes)
                state, report = run()
                # Answers of float32 alone: rounding to bfloat16 may turn a close choice.
                answers = lm.generate(texts, max_new_tokens=24) if dtype == "float32" else []
                factors = jax.tree.leaves(jax.device_get(state.server.factors))
                outcomes[title] = answers, report, np.concatenate([f.ravel() for f in factors])
                results[title] = {"loss": report.loss, "update_norm": report.update_norm}
    for dtype, (gpu, cpu) in {
        d: [f"{d} {p}" for p in (jax.devices()[0].platform, "cpu")] for d in ("float32", "bfloat16")
    }.items():
        if gpu in outcomes and cpu in outcomes:
            (a, ra, fa), (b, rb, fb) = outcomes[gpu], outcomes[cpu]
            results[f"{dtype}: difference"] = {
                "answers_equal": sum(x == y for x, y in zip(a, b, strict=True)),
                "answers": len(a),
                "largest_loss_difference": float(np.abs(ra.losses - rb.losses).max()),
                "factors_relative": float(np.linalg.norm(fa - fb) / np.linalg.norm(fb)),
            }


# Generation and Constitutional AI.


def measure_generate(results):
    tokenizer = fs.load_pretrained("package:model").tokenizer
    devices = mesh.make_mesh(jax.devices()[:1])
    cases = {"5m": 8} if _TINY.value else {"135m": 64, "8b": 64}
    new = 16 if _TINY.value else 64
    for shape, batch in cases.items():
        lm = shapes.random_model(shape, tokenizer, "bfloat16", mesh=devices)
        size = sum(x.nbytes for x in jax.tree.leaves(lm.params))
        prompts = [p for p, _ in random_rows(2 * batch, 2)]
        ids = [tokenizer(p)["input_ids"][:200] for p in prompts]

        def run(lm=lm, ids=ids, batch=batch):
            return generation.generate_ids(
                lm.model, lm.params, None, prompts=ids, stop_ids=(-1,), max_new_tokens=new,
                batch_size=batch, mesh=lm.mesh,
            )  # fmt: skip

        with results.attempt(shape):
            first, taken = first_and_later(run)
            middle = statistics.median(taken)
            results[shape] = {
                "new_tokens_per_s": round(len(ids) * new / middle),
                "share_of_bandwidth": round(size * 2 * new / middle / BANDWIDTH, 3),
                "batch": batch, "prompts": len(ids), "new_tokens": new,
                "seconds": [round(s, 3) for s in taken], "compile_s": round(first - middle, 1),
                "peak_gib": memory_gib(),
            }  # fmt: skip
        del lm, run
        if _PEERS.value and shape not in shapes.LARGE:
            with tempfile.TemporaryDirectory() as name, results.attempt(f"{shape}: peer"):
                folder = pathlib.Path(name)
                shapes.write_config(shape, tokenizer, folder)
                texts = [tokenizer.decode(i) for i in ids]
                (folder / "prompts.txt").write_text("\n".join(texts))
                arguments = ["--model", name, "--prompts", str(folder / "prompts.txt")]
                arguments += ["--batch", str(batch), "--new-tokens", str(new)]
                results[f"{shape}: peer"] = peer(
                    "hf_generate.py", [*arguments, "--dtype", "bfloat16"]
                )


def measure_cai(results):
    """A round of Constitutional AI of the packaged model: revisions, then training steps."""
    count, steps, devices = (
        (8, 2, None) if _TINY.value else (32, 8, mesh.make_mesh(jax.devices()[:1]))
    )
    lm = fs.load_pretrained("package:model", "bfloat16", mesh=devices)
    shape = lora.LoraConfig(16, 32.0, ("q_proj", "v_proj"))
    lm = lm.with_adapter(lora.Adapter(lora.init(jax.random.key(0), lm.config, shape), shape))
    red_team = sources.load("chat:package/cai_red_team.jsonl", "")[:count]
    session = ChatSession(lm, 64)
    generate = make_generate_fn(48, (0,), session, temperature=0.0)
    started = time.perf_counter()
    records = revise(
        [e.messages for e in red_team], constitution.load("package:constitution"), generate,
        reviser=generate, seed=(0,),
    )  # fmt: skip
    results["revise: first seconds"] = round(time.perf_counter() - started, 2)
    started = time.perf_counter()
    revise(
        [e.messages for e in red_team], constitution.load("package:constitution"), generate,
        reviser=generate, seed=(0,),
    )  # fmt: skip
    results["revise: seconds"] = round(time.perf_counter() - started, 2)
    results["prompts"] = len(records)
    recipe = cai_steps.Recipe(
        ("sft", "dpo"), (1.0, 0.5), 0.1, batch_size=8, pairs_per_step=4, seq=128
    )
    init, step = cai_train.make_step(lm.model, recipe)

    def encode(turns, response):
        return chat.encode(lm.tokenizer, turns, response, 128)

    triples = [Triple(r.prompt, r.initial, r.revision or "No.") for r in records]
    imitation = [e for e in (encode(r.turns, r.revision or "No.") for r in records) if e]
    data = cai_steps.make_steps(recipe, steps, imitation, triples=triples, encode=encode, seed=(0,))
    factors = lm.factors
    state, taken = init(factors), []
    for one in data:
        started = time.perf_counter()
        factors, state, losses = step(factors, state, None, lm.params, one, jnp.float32(1e-3))
        jax.block_until_ready(factors)
        taken.append(time.perf_counter() - started)
    results["train: first step, seconds"] = round(taken[0], 2)
    results["train: a step, ms"] = round(1e3 * statistics.median(taken[1:]), 2)
    results["losses of the last step"] = {name: float(value) for name, value in losses.items()}


def main(argv):
    del argv
    results = Results()
    device = jax.devices()[0]
    results["device"] = f"{jax.device_count()} x {device.device_kind}"
    results["jax"] = jax.__version__
    measures = {
        "attention": measure_attention,
        "numerics": measure_numerics,
        "round_8b": lambda r: measure_round(
            r, "5m" if _TINY.value else "8b", steps=2, remat=True, options=("triton",)
            if device.platform == "gpu" else ("auto",),
        ),
        "round_135m": lambda r: measure_round(
            r, "5m" if _TINY.value else "135m", steps=5, options=("triton",)
            if device.platform == "gpu" else ("auto",),
        ),
        "generate": measure_generate,
        "cai": measure_cai,
    }  # fmt: skip
    measures[_PART.value](results)


if __name__ == "__main__":
    app.run(main)
