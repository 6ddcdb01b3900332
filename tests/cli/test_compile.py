"""`fedsafe compile`: what it prints and writes, and what is one line instead."""

import json
import subprocess
import sys

import jax
import pytest
from commands import ENVIRONMENT

from fedsafe_jax.aot import compilation, targets
from fedsafe_jax.aot.targets import GIB
from fedsafe_jax.cli import startup
from fedsafe_jax.cli.compile import PROGRAMS
from fedsafe_jax.runtime import preemption

CONFIG = "--config=configs/demo.py"
SMALL = (
    CONFIG, "--config.clients_per_round=2", "--config.local_steps=2", "--config.batch_size=2",
    "--config.seq_len=64", "--config.filter.batch_size=2", "--config.filter.max_length=32",
    "--config.eval.batch_size=2", "--config.eval.max_new_tokens=8", "--config.cai.batch_size=2",
    "--config.cai.pairs_per_step=2", "--config.cai.max_new_tokens=8",
)  # fmt: skip
FIELDS = {
    "target": str,
    "program": str,
    "fits": bool,
    "gib": dict,
    "flops": float,
    "flops_per_useful_token": float,
    "minimum_flops_per_token": float,
    "attention": str,
    "collectives_in_steps": list,
    "bytes_in_steps": int,
}
# A process in which nothing can be asked over a network, and no weights are read.
SEALED = """
import socket, sys
def refuse(*_):
    raise AssertionError("a connection")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
from fedsafe_jax.cli import startup
from fedsafe_jax.models import hub, tensor_files
import safetensors, safetensors.numpy
def weights(*_, **__):
    raise AssertionError("weights")
hub.load_params = safetensors.safe_open = safetensors.numpy.load_file = weights
sys.argv = ["fedsafe", "compile", *sys.argv[1:]]
startup.main()
"""


@pytest.fixture
def here(monkeypatch):
    """Runs the command in this process, on one of its devices for any target; `fails` on error."""
    monkeypatch.setattr(targets, "prepare", lambda target: None)
    monkeypatch.setattr(targets, "devices", lambda target: jax.devices()[:1])

    def run(*arguments):
        startup.start("compile", [*arguments])

    return run


def line_of(capsys, *arguments):
    """The line on stderr of a command that must fail with code 2."""
    with pytest.raises(SystemExit) as stopped:
        startup.start("compile", [*arguments])
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    [line] = err.splitlines()
    return line


def test_every_program_is_told_without_network_or_weights(tmp_path):
    file = tmp_path / "figures.json"
    command = [sys.executable, "-c", SEALED, *SMALL, "--target=cpu", f"--json={file}"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=ENVIRONMENT | {"COLUMNS": "200"}, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [f"compiling cpu: {name}" for name in PROGRAMS]
    found = json.loads(file.read_text())["programs"]
    assert [program["program"] for program in found] == list(PROGRAMS)
    for program in found:
        for field, kind in FIELDS.items():
            assert type(program[field]) is kind, field
        assert program["target"] == "cpu" and program["fits"]
        assert set(program["gib"]) <= set(compilation.KINDS)
        assert {"temporaries", "output"} <= set(program["gib"])
        assert program["collectives_in_steps"] == [] and program["bytes_in_steps"] == 0
        assert program["program"] in done.stdout
        if program["program"] in ("sum", "server"):
            assert program["minimum_flops_per_token"] == 0
        else:
            assert program["flops"] > 0 and program["gib"]["base"] > 0
            # Padding costs; training on the CPU computes its last layer for target tokens alone.
            least = 0.6 if program["program"] == "train" else 0.95
            assert program["flops_per_useful_token"] > least * program["minimum_flops_per_token"]
            assert program["minimum_flops_per_token"] > 0
    by_name = {program["program"]: program for program in found}
    assert by_name["train"]["attention"] == "xla"
    assert by_name["filter_train"]["attention"] == ""  # a classifier's has no choice


def test_collectives_are_objects(here, tmp_path, monkeypatch):
    monkeypatch.setattr(targets, "devices", lambda target: jax.devices()[:2])
    file = tmp_path / "figures.json"
    here(*SMALL, "--config.model_parallel=2", "--target=cpu:2", "--programs=train",
         f"--json={file}")  # fmt: skip
    [train] = json.loads(file.read_text())["programs"]
    assert train["devices"] == 2
    assert train["collectives_in_steps"]
    for one in train["collectives_in_steps"]:
        assert type(one["op"]) is str and type(one["bytes"]) is int
    assert train["bytes_in_steps"] >= sum(one["bytes"] for one in train["collectives_in_steps"])


@pytest.mark.parametrize(
    "target, said",
    [("h200", "no such target; known are v5e:2x2"), ("v5e:3x3", "v5e has 1x1, 2x2, 2x4"),
     ("h100:9", "no such target; known are"), ("cpu:0", "no such target; known are")],
)  # fmt: skip
def test_an_unknown_target_is_one_line(capsys, target, said):
    line = line_of(capsys, CONFIG, f"--target={target}")
    assert line.startswith(f"error: --target={target}: ") and said in line


@pytest.mark.parametrize("target, package", [("v5e:2x2", "libtpu"), ("h100", "jax_cuda12_plugin")])
def test_a_missing_extra_is_one_line(capsys, monkeypatch, target, package):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    assert line_of(capsys, CONFIG, f"--target={target}") == (
        f"error: --target={target}: {package} is not installed; pip install -e .[aot]"
    )


def test_lengths_come_from_a_file(here, tmp_path):
    tokens = []
    for content in ("5 3\n6, 2\n\n", "40 20\n"):
        lengths, file = tmp_path / "lengths.txt", tmp_path / "figures.json"
        lengths.write_text(content)
        here(*SMALL, "--target=cpu", "--programs=prefill", f"--lengths={lengths}",
             f"--json={file}")  # fmt: skip
        [prefill] = json.loads(file.read_text())["programs"]
        tokens.append(round(prefill["flops"] / prefill["flops_per_useful_token"]))
    assert tokens == [5 + 6, 40 + 40]


@pytest.mark.parametrize(
    "content, said",
    [("5 3\n5\n", ", line 2: '5'; expected two numbers"), ("5 0\n", ", line 1: '5 0'"),
     ("5 3\n\na b\n", ", line 3: 'a b'"), ("\n", ": holds no lengths."),
     (None, ": cannot be read (")],
)  # fmt: skip
def test_a_bad_file_of_lengths_is_one_line(here, capsys, tmp_path, content, said):
    file = tmp_path / "lengths.txt"
    if content is not None:
        file.write_text(content)
    line = line_of(capsys, CONFIG, "--target=cpu", f"--lengths={file}")
    assert line.startswith(f"error: --lengths={file}{said}")


@pytest.mark.parametrize("strict", [False, True])
def test_what_does_not_fit_is_a_result(here, capsys, monkeypatch, tmp_path, strict):
    real, file = targets.parse, tmp_path / "figures.json"
    monkeypatch.setattr(targets, "parse", lambda name: real(name)._replace(memory=4096))
    arguments = (*SMALL, "--target=cpu", "--programs=sum", f"--json={file}")
    if strict:
        with pytest.raises(SystemExit) as stopped:
            here(*arguments, "--strict")
        assert stopped.value.code == 1
    else:
        here(*arguments)
    [program] = json.loads(file.read_text())["programs"]
    assert program["fits"] is False
    assert program["over_gib"] == pytest.approx(
        sum(program["gib"].values()) - 4096 / GIB, abs=0.002
    )
    assert "no: " in capsys.readouterr().out


def test_a_compiler_out_of_memory_is_a_result(here, monkeypatch, tmp_path):
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 33.25G of 15.75G"
                " hbm. Exceeded hbm capacity by 17.50G."
            )

    real, file = targets.parse, tmp_path / "figures.json"
    monkeypatch.setattr(targets, "parse", lambda name: real(name)._replace(memory=16 * GIB))
    monkeypatch.setattr(compilation, "lower", lambda program, target: Lowered())
    here(*SMALL, "--target=cpu", "--programs=train", f"--json={file}")
    [program] = json.loads(file.read_text())["programs"]
    assert program["fits"] is False and program["over_gib"] == 33.25 - 16
    # What the compiler did not say is all beyond the arguments.
    assert program["gib"]["base"] > 0 and "output" not in program["gib"]
    assert sum(program["gib"].values()) == pytest.approx(33.25, abs=1e-4)
    assert program["minimum_flops_per_token"] > 0


def test_another_failure_of_the_compiler_is_no_result(here, monkeypatch):
    def lower(program, target):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    monkeypatch.setattr(compilation, "lower", lower)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        here(*SMALL, "--target=cpu", "--programs=sum")


@pytest.mark.parametrize(
    "model, gib",
    [
        # Parameters of the model cards, in bfloat16.
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008 * 2),
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248 * 2),
        ("meta-llama/Llama-Guard-3-8B", 8_030_261_248 * 2),
    ],
)
def test_known_models_need_no_folder(here, monkeypatch, tmp_path, model, gib):
    """Their programs are made, not compiled, which takes minutes."""

    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: HBM, not tried")

    monkeypatch.setattr(compilation, "lower", lambda program, target: Lowered())
    file = tmp_path / "figures.json"
    here(
        "--config=configs/paper.py", f"--config.model={model}", f"--config.filter.model={model}",
        "--target=cpu", f"--json={file}",
    )  # fmt: skip
    found = json.loads(file.read_text())["programs"]
    assert [program["program"] for program in found] == list(PROGRAMS)
    for program in found:
        if program["program"] not in ("sum", "server"):
            assert program["gib"]["base"] == pytest.approx(gib / GIB, abs=1e-5)


@pytest.mark.parametrize(
    "argument, said",
    [
        ("--config.model=nobody/nothing", "nobody/nothing"),
        ("--config.rounds=-1", "rounds"),
        ("--config.attention=fast", "attention"),
        ("--config.lora_targets=('nothing',)", "lora_targets"),
        ("--programs=training", "--programs=training: no such program; did you mean 'train'?"),
        ("--json=configs", "--json=configs: is a folder"),
        ("--config.attention=splash", "attention 'splash': it is a kernel for TPU"),
    ],
)
def test_wrong_input_is_one_line_before_anything_is_compiled(here, capsys, argument, said):
    line = line_of(capsys, CONFIG, "--target=cpu", argument)
    assert line.startswith("error: ") and said in line


def test_a_run_says_in_one_line_which_kernel_it_cannot_use(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(preemption, "listen", lambda: None)  # the handlers of the tests stay
    arguments = [CONFIG, f"--workdir={tmp_path}", "--config.attention=triton"]
    with pytest.raises(SystemExit) as stopped:
        startup.start("run", arguments)
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: attention 'triton': it is a kernel for GPU, and the devices are")
