"""`fedsafe export`: any arm, seed, round and client of a run; what was not kept is one line."""

import json
import shutil

import jax
import numpy as np
import pytest
from huggingface_hub import ModelCard
from kept_run import config_of
from safetensors.numpy import load_file

from fedsafe_jax import experiment
from fedsafe_jax.cli import startup
from fedsafe_jax.models import lora
from fedsafe_jax.models.adapter_hash import adapter_hash
from fedsafe_jax.models.base_model import model_folder

ADAPTER = "adapter_model.safetensors"


def export(workdir, output, *arguments):
    """Runs the command; returns the factors that it wrote."""
    place = (f"--workdir={workdir}", f"--output={output}")
    startup.start("export", ["--arm=fl", "--seed=0", *place, *arguments])
    return lora.load_adapter(output).factors if (output / ADAPTER).is_file() else None


def refused(capsys, workdir, output, *arguments) -> str:
    """Runs the command, which refuses; returns its line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        place = (f"--workdir={workdir}", f"--output={output}")
        startup.start("export", [*place, *arguments])
    assert end.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    return line


def test_the_newest_round_is_what_the_run_exported(kept, tmp_path):
    export(kept, tmp_path / "adapter")
    assert (tmp_path / "adapter" / ADAPTER).read_bytes() == (
        kept / "export/adapter" / ADAPTER
    ).read_bytes()
    export(kept, tmp_path / "merged", "--merge")
    ours = load_file(tmp_path / "merged/model.safetensors")
    for name, x in load_file(kept / "export/merged/model.safetensors").items():
        np.testing.assert_array_equal(ours[name], x)


def test_a_scale_lies_between_the_base_and_the_arm(kept, tmp_path):
    merged = {}
    for scale in (0.5, 1.0):
        export(kept, tmp_path / f"{scale}", f"--scale={scale}", "--merge")
        merged[scale] = load_file(tmp_path / f"{scale}/model.safetensors")
    base = load_file(model_folder(config_of().model) / "model.safetensors")
    for name, x in base.items():
        half = (x + merged[1.0][name]) / 2
        np.testing.assert_allclose(merged[0.5][name], half, atol=1e-6)  # rounding of the sums
    assert any((x != merged[1.0][name]).any() for name, x in base.items())
    card = (tmp_path / "0.5/README.md").read_text()
    assert "The adapter's effect is multiplied by 0.5. It was not evaluated." in card
    assert "not evaluated" not in (tmp_path / "1.0/README.md").read_text()

    whole, half = export(kept, tmp_path / "whole"), export(kept, tmp_path / "half", "--scale=0.5")
    assert adapter_hash(whole) != adapter_hash(half)
    assert adapter_hash(half)[:12] in card


def test_a_round_is_the_mean_of_what_its_clients_sent(kept, tmp_path):
    """FedAvg with equal weights, whose clients are exported with their names."""
    rows = [json.loads(line) for line in (kept / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        done = row["round"] + 1
        server = export(kept, tmp_path / f"{done}", f"--round={done}")
        clients = [
            export(kept, tmp_path / f"{done}_{i}", f"--round={done}", f"--client={i}")
            for i in row["clients"]
        ]
        mean = jax.tree.map(lambda *x: np.mean(x, axis=0), *clients)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), server, mean)
        apart = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), *clients)
        assert max(jax.tree.leaves(apart)) > 1e-3


def test_the_card_has_metadata_and_results(kept, tmp_path):
    export(kept, tmp_path / "final")
    data = ModelCard.load(tmp_path / "final" / "README.md").data
    assert (data.library_name, data.base_model) == ("peft", "package:model")
    assert data.license == "cc-by-sa-3.0" and "federated" in data.tags
    assert data.datasets == ["package/clients_safe.jsonl", "package/clients_unsafe.jsonl"]
    results = json.loads((kept / "results.json").read_text())
    (measured,) = data.eval_results
    assert measured.metric_value == results["arms"]["fl"]["utility"]["nll"]
    export(kept, tmp_path / "early", "--round=1")
    early = ModelCard.load(tmp_path / "early" / "README.md")
    assert early.data.eval_results is None and "not evaluated" in early.text


def test_peft_loads_the_folder_itself(kept, tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    export(kept, tmp_path / "adapter")
    export(kept, tmp_path / "merged", "--merge")
    tokens = torch.tensor([[1, 4, 300, 20]])
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        a, b = (model.float()(tokens).logits.numpy() for model in (adapted, merged))
    np.testing.assert_allclose(a, b, atol=1e-4)


def test_what_is_not_there_is_one_line(kept, tmp_path, capsys):
    new = tmp_path / "new"
    line = refused(capsys, kept, new, "--arm=fll")
    assert "--arm=fll: not there" in line and "fl." in line
    assert "trained: fl." in refused(capsys, kept, new, "--arm=base")
    assert "seeds of the run: 0." in refused(capsys, kept, new, "--arm=fl", "--seed=3")
    assert "rounds: 1, 2, 3." in refused(capsys, kept, new, "--arm=fl", "--round=4")
    assert "--client=99: not there" in refused(capsys, kept, new, "--arm=fl", "--client=99")
    assert "no config.json" in refused(capsys, tmp_path / "nothing", new, "--arm=fl")
    assert "--scale=-1.0: expected" in refused(capsys, kept, new, "--arm=fl", "--scale=-1")
    assert "--scale=nan" in refused(capsys, kept, new, "--arm=fl", "--scale=nan")
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    assert "not empty" in refused(capsys, kept, full, "--arm=fl")
    assert not new.exists()


def test_a_run_keeps_two_rounds_and_no_updates(tmp_path, capsys):
    workdir = tmp_path / "run"
    experiment.run(config_of(), str(workdir))
    assert not (workdir / "updates").exists()
    line = refused(capsys, workdir, tmp_path / "new", "--arm=fl", "--round=1")
    assert "checkpoint_keep=2 are the rounds: 2, 3." in line
    line = refused(capsys, workdir, tmp_path / "new", "--arm=fl", "--client=0")
    assert "keep_updates=False" in line and "rounds with updates: none." in line
    # An interrupted run: nothing but its config and checkpoints.
    for name in ("arms", "export"):
        shutil.rmtree(workdir / name)
    (workdir / "results.json").unlink()
    export(workdir, tmp_path / "adapter")
    assert "not evaluated it" in (tmp_path / "adapter/README.md").read_text()
    shutil.rmtree(workdir / "checkpoints")
    line = refused(capsys, workdir, tmp_path / "new", "--arm=fl")
    assert "no checkpoint" in line and "have one: none." in line
