"""Trains the packaged small instruct model from scratch and saves a Hugging Face folder.

    fedsafe pretrain --config=configs/pretrain_demo.py --output=FOLDER --config.data_dir=DIR

The folder is written every `save_every` steps, with a card that lists what was read and dropped.
"""

import functools
import sys

import ml_collections
from absl import flags

from fedsafe_jax.cli import config_file
from fedsafe_jax.cli.command import Command, Config, check_folder
from fedsafe_jax.cli.config_help import Field, fields_of

CONFIG = "configs/pretrain_demo.py"


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags."""
    flags.DEFINE_string("output", None, "Folder of the trained model.", flag_values=values)


def defaults() -> ml_collections.ConfigDict:
    """Returns the config of `configs/pretrain_demo.py`, which has the defaults of all fields."""
    return config_file.read(CONFIG)


def fields() -> list[Field]:
    """Returns the fields of `configs/pretrain_demo.py`."""
    return fields_of(config_file.module_of(CONFIG).get_config)


def main(values: flags.FlagValues) -> None:
    """Trains and saves, with a line of progress every 50 steps on stderr."""
    check_folder("output", values.output)
    from fedsafe_jax.demo import pretrain
    from fedsafe_jax.runtime import devices

    announced = functools.cache(devices.announce)  # once, and after what may be wrong in the data

    def report(line: str) -> None:
        announced()
        print(line, file=sys.stderr, flush=True)

    pretrain.run(values.config, values.output, report)
    print(f"model: {values.output}")


COMMAND = Command(define_flags, main, required=("output",), config=Config(defaults, fields, CONFIG))
