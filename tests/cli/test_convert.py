"""`fedsafe convert`: what its two names have to be, and both ways on the packaged model."""

import jax
import numpy as np
import pytest

from fedsafe_jax import load_pretrained
from fedsafe_jax.cli.startup import start
from fedsafe_jax.models import base_model, hub, lora


def said(capsys, *flags):
    """The line of a command that is refused."""
    with pytest.raises(SystemExit) as ended:
        start("convert", flags)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_wrong_names_are_one_line(tmp_path, capsys):
    file, folder = tmp_path / "m.gguf", tmp_path / "folder"
    line = said(capsys, f"--model={folder}", f"--output={tmp_path / 'other'}")
    assert "neither it nor --output is a GGUF file" in line
    assert "both are GGUF" in said(capsys, f"--model={file}", f"--output={file}")
    assert f"{file}: no such file" in said(capsys, f"--model={file}", f"--output={folder}")
    assert not folder.exists()
    line = said(capsys, f"--model={file}", f"--output={base_model.PACKAGED_FOLDER}")
    assert "is there and not empty" in line
    line = said(capsys, "--model=package:model", f"--output={file}", "--dtype=bfloat16")
    assert "written in float16 or float32" in line and not file.exists()


def test_both_ways(tmp_path, capsys):
    file, folder = tmp_path / "m.gguf", tmp_path / "folder"
    start("convert", ["--model=package:model", f"--output={file}"])
    start("convert", [f"--model={file}", f"--output={folder}", "--dtype=bfloat16"])
    assert capsys.readouterr().out.splitlines() == [f"output: {file}", f"output: {folder}"]
    tensors = hub.Tensors(folder)
    assert {tensors._view(name).get_dtype() for name in tensors.names()} == {"BF16"}


def test_an_adapter_is_merged(tmp_path, capsys):
    """Logits of the merged folder are those of base and adapter, within float32's rounding."""
    lm = load_pretrained("package:model")
    settings = lora.LoraConfig(4, 8.0, ("q_proj", "down_proj"))
    factors = jax.tree.map(
        lambda x: np.random.default_rng(0).normal(0, 0.05, x.shape).astype(np.float32),
        lora.init(jax.random.key(0), lm.config, settings),
    )
    adapter = lora.Adapter(factors, settings, "package:model")
    lora.save_adapter(adapter, tmp_path / "adapter")
    flags = ["--model=package:model", f"--adapter={tmp_path / 'adapter'}"]
    start("convert", [*flags, f"--output={tmp_path / 'merged'}"])
    assert capsys.readouterr().out == f"output: {tmp_path / 'merged'}\n"
    tokens = np.arange(24)[None] + 5
    expected = np.asarray(lm.with_adapter(adapter)(tokens))
    np.testing.assert_allclose(load_pretrained(tmp_path / "merged")(tokens), expected, atol=2e-4)
    assert np.abs(expected - lm(tokens)).max() > 0.1
    assert "an adapter is merged into a folder" in said(capsys, *flags, "--output=m.gguf")
    assert "not empty" in said(capsys, *flags, f"--output={tmp_path / 'merged'}")
    flags[1] = f"--adapter={tmp_path / 'none'}"
    assert str(tmp_path / "none") in said(capsys, *flags, f"--output={tmp_path / 'other'}")
