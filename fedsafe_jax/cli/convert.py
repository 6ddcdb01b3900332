"""Writes a GGUF file as a Hugging Face folder, a Llama folder as a GGUF file, or merges an adapter.

    fedsafe convert --model=FILE.gguf --output=FOLDER
    fedsafe convert --model=FOLDER --output=FILE.gguf
    fedsafe convert --model=MODEL --adapter=FOLDER --output=FOLDER

A folder holds the file's own values: float16 and bfloat16 as they are, all other types as float32;
`--dtype` writes all weights in one type. A GGUF file is float16, or float32 by `--dtype=float32`.
With a PEFT adapter the folder holds the merged model, in float32 without `--dtype`: merging rounds
once, where the weights are written.
"""

import os
import pathlib

from absl import flags

from fedsafe_jax.cli.command import Command, UsageError, check_file, check_folder
from fedsafe_jax.models.gguf_reader import is_gguf

DTYPES = ("", "float32", "float16", "bfloat16")


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags."""
    here = {"flag_values": values}
    flags.DEFINE_string("model", None, "GGUF file, model folder, or Hub id.", **here)
    flags.DEFINE_string("adapter", None, "PEFT adapter folder, merged into the model.", **here)
    flags.DEFINE_string("output", None, "New folder, or file whose name ends in .gguf.", **here)
    flags.DEFINE_enum("dtype", "", DTYPES, "Type of the written weights; empty: see above.", **here)


def main(values: flags.FlagValues) -> None:
    """Converts one way or the other, and says what was written."""
    from fedsafe_jax.models import gguf_folder, gguf_reader, gguf_writer

    output = pathlib.Path(values.output)
    to_file = is_gguf(output.name)
    if values.adapter:
        if to_file:
            raise UsageError(f"--output={output}: an adapter is merged into a folder; name one.")
        merge(values.model, values.adapter, output, values.dtype or "float32")
        print(f"output: {output}")
        return
    if to_file and is_gguf(values.model):
        raise UsageError(f"--output={output}: both are GGUF files; name a folder.")
    if not to_file and not is_gguf(values.model):
        raise UsageError(f"--model={values.model}: neither it nor --output is a GGUF file (.gguf).")
    gguf_reader.check_package()
    if to_file:
        from fedsafe_jax.models.base_model import model_folder

        check_file("output", values.output)
        gguf_writer.write_file(model_folder(values.model), output, values.dtype or "float16")
    else:
        _check_new(output)
        gguf_reader.GgufFile(pathlib.Path(values.model))  # before a folder is made for it
        check_folder("output", values.output)
        gguf_folder.write_folder(values.model, output, values.dtype)
    print(f"output: {output}")


def _check_new(output: pathlib.Path) -> None:
    if os.path.isfile(output) or (os.path.isdir(output) and any(output.iterdir())):
        raise UsageError(f"--output={output}: is there and not empty; name a new folder.")


def merge(model: str, adapter: str, output: pathlib.Path, dtype: str) -> None:
    """Writes a model with an adapter merged, as a folder that transformers loads.

    Args:
      model: model folder, GGUF file or Hub id.
      adapter: folder of a PEFT adapter of that model.
      output: new folder.
      dtype: type of the written weights; products and sums are float32.

    Raises:
      UsageError: the output is there and not empty.
      ModelError: model or adapter cannot be read, or do not fit each other.
    """
    from fedsafe_jax.inference.pretrained import load_pretrained, save_pretrained
    from fedsafe_jax.models.lora import load_adapter

    _check_new(output)
    changed = load_adapter(adapter)
    lm = load_pretrained(model).with_adapter(changed)
    check_folder("output", str(output))
    save_pretrained(lm, output, dtype)


COMMAND = Command(define_flags, main, required=("model", "output"))
