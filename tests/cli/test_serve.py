"""`fedsafe serve`: what its flags have to be, before anything is loaded; arms of a run by name."""

import importlib.util
import socket
import types

import numpy as np
import pytest

from fedsafe_jax.cli import serve
from fedsafe_jax.cli.command import UsageError
from fedsafe_jax.cli.startup import parse, start
from fedsafe_jax.models.lora import LoraConfig

has_server = all(importlib.util.find_spec(name) for name in serve.PACKAGES)


def said(capsys, *flags):
    """The line of a command that is refused."""
    with pytest.raises(SystemExit) as ended:
        start("serve", flags)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.skipif(not has_server, reason="needs the extra serve")
def test_wrong_flags_are_one_line(tmp_path, capsys):
    assert "--model, --workdir: give one of them, or --guard." in said(capsys)
    assert "give one of them" in said(capsys, "--model=m", f"--workdir={tmp_path}")
    assert "--arm: needs --workdir." in said(capsys, "--model=m", "--arm=fl")
    assert "--dtype: with --workdir" in said(capsys, "--workdir=w", "--dtype=bfloat16")
    assert "--adapter=mine: expected NAME=FOLDER." in said(capsys, "--model=m", "--adapter=mine")
    twice = ("--adapter=a=x", "--adapter=a=y")
    assert "--adapter=a=y: 'a' is given twice." in said(capsys, "--model=m", *twice)
    assert "no config.json" in said(capsys, f"--workdir={tmp_path}", "--port=0")
    same = ("--model=m", "--adapter=m=x", "--port=0")
    assert "--adapter: 'm' is the name of another model." in said(capsys, *same)
    assert "--adapter: needs --model" in said(capsys, "--guard=g", "--adapter=a=x")
    assert "--guard=none: judge 'guard:none': none: no such folder" in said(capsys, "--guard=none")
    again = ("--guard=a=owner/x", "--guard=a=owner/y")
    assert "--guard=a=owner/y: 'a' is the name of another one." in said(capsys, *again)
    refusals = "--guard=owner/x#wildguard-refusal"
    assert "this format tells refusals, not harm." in said(capsys, refusals)
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"--port={other.getsockname()[1]}"
        assert f"{taken}: cannot listen there (Address" in said(capsys, "--model=m", taken)


def test_missing_packages_are_one_line(monkeypatch, capsys):
    monkeypatch.setattr(serve, "PACKAGES", ("starlette_that_is_not_there", "socket"))
    line = said(capsys, "--model=m")
    assert "needs starlette_that_is_not_there; pip install -e .[serve]" in line


class Run:
    """A run that keeps three rounds of two arms; the factors say which are read."""

    def __init__(self, workdir, arm, seed):
        if arm not in ("fl", "fl+cai"):
            raise UsageError(f"--arm={arm}: not there")
        self.planned, self.lora = types.SimpleNamespace(id=arm), LoraConfig(4, 8.0, ("q_proj",))
        self.config, self.seed = types.SimpleNamespace(model="m"), seed

    def round(self, given):
        return given or 3

    def factors(self, rounds_done):
        return {"server": np.full(4, rounds_done)}

    def client_factors(self, rounds_done, client):
        return {"client": np.full(4, client), "round": np.full(4, rounds_done)}


def test_arms_are_named_with_what_was_asked_for(monkeypatch):
    monkeypatch.setattr(serve, "Saved", Run)

    def read(*flags):
        adapters, config = serve.of_run(parse("serve", serve.COMMAND, ["--workdir=w", *flags]))
        assert config.model == "m"
        return {
            name: {key: int(x[0]) for key, x in adapter.factors.items()}
            for name, adapter in adapters.items()
        }

    assert read("--arm=fl,fl+cai") == {"fl": {"server": 3}, "fl+cai": {"server": 3}}
    named = read("--arm=fl", "--seed=0", "--round=2", "--client=4")
    assert named == {"fl:seed0:round2:client4": {"client": 4, "round": 2}}
    with pytest.raises(UsageError, match="--arm=base"):
        read("--arm=fl,base")
