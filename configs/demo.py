"""All five arms on the packaged model and data: the first run.

    fedsafe run --config=configs/demo.py --workdir=runs/demo

Five to eight minutes on two CPU cores. Expect refusal of the held-out red-team prompts to fall far
below the base model under FL, and to come back with the filter and CAI.
"""

from fedsafe_jax.config import default_config


def get_config():
    c = default_config()
    c.clients_per_round = 4  # two for each of two cores
    return c
