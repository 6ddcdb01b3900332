"""`fedsafe convert`: what its two names have to be, and both ways on the packaged model."""

import pytest

from fedsafe_jax.cli.startup import start
from fedsafe_jax.models import base_model, hub


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
