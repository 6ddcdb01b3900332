"""What the federation trains; every field of `fedsafe_jax.config.default_config` may be set."""

from fedsafe_jax.config import default_config


def get_config():
    c = default_config()
    c.arms = ("base", "fl+filter+cai")  # one arm beside the base
    c.model = "package:model"  # a folder or Hub id, the same at every site
    c.num_clients = 3  # sites
    c.clients_per_round = 3
    c.rounds = 2
    c.local_steps = 10
    c.heldout_sources = ("chat:package/clients_safe.jsonl#heldout",)
    return c
