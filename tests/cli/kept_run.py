"""The config of a small run that keeps everything."""

from fedsafe_jax.config import default_config


def config_of(**changes):
    """Three rounds of two clients a round, without evaluation of any length."""
    c = default_config()
    c.arms, c.export_arm = ("base", "fl"), "fl"
    c.rounds, c.local_steps, c.batch_size = 3, 1, 2
    c.num_clients, c.clients_per_round, c.examples_per_client = 4, 2, 8
    c.federated.weighting = "uniform"
    c.eval.tasks = ("utility",)
    c.eval.max_heldout = 4
    for name, value in changes.items():
        c[name] = value
    return c
