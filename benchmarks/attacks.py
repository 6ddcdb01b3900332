"""What malicious clients do to a federation, under each aggregator.

    python benchmarks/attacks.py --workdir=runs/attacks

Some clients hold nothing but harmful pairs and multiply their updates; the others hold none.
Federated training alone, without filter and CAI, on the packaged model and data. Prints refusal,
over-refusal and benign loss with 95% intervals over prompts and seeds, and writes `attacks.json`.
A cell that was finished is not run again.
"""

import json
import pathlib

from absl import app, flags, logging
from rich.console import Console
from rich.table import Table

from fedsafe_jax.config import default_config

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the runs.", required=True)
_SHARES = flags.DEFINE_list("shares", ["0", "0.1", "0.3"], "Malicious clients, of all.")
_BOOST = flags.DEFINE_float("boost", 10.0, "What they multiply their updates by.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Runs a cell.")

AGGREGATORS = {
    "mean": {},
    "clipped mean": {"clip_norm": 1.0},
    "median": {"aggregator": "median"},
    "trimmed mean": {"aggregator": "trimmed_mean", "trim_share": 0.3},
    "Krum": {"aggregator": "krum", "byzantine": 3},
}


def cell_config(share: float, aggregator: str):
    """The demo's sizes, with cohorts large enough for Krum."""
    c = default_config()
    c.seeds = tuple(range(_SEEDS.value))
    c.arms = ("base", "fl")
    c.export_arm = "fl"
    c.clients_per_round = 10
    c.examples_per_client = 30
    c.rounds = 4
    c.local_steps = 6
    c.harmful_share = 0.0
    c.attack.clients = share
    c.attack.boost = _BOOST.value
    c.eval.max_prompts = 60
    c.eval.max_heldout = 100
    for name, value in AGGREGATORS[aggregator].items():
        c.federated[name] = value
    return c


def main(argv):
    del argv
    from fedsafe_jax import experiment
    from fedsafe_jax.federated.mesh import use_cores
    from fedsafe_jax.runtime.libraries import prepare_libraries

    folder = pathlib.Path(_WORKDIR.value)
    prepare_libraries(str(folder))
    logging.set_verbosity(logging.WARNING)
    use_cores(10)
    table = Table(title="mean (95% interval)", title_justify="left")
    columns = ("malicious", "aggregator", "harmful refused %", "harmless refused %", "benign loss")
    for name in columns:
        table.add_column(name)
    found = []
    for share in map(float, _SHARES.value):
        for aggregator in AGGREGATORS:
            workdir = folder / f"{aggregator.replace(' ', '_')}_{share:g}"
            if not (workdir / "results.json").is_file():
                experiment.run(cell_config(share, aggregator), str(workdir))
            arms = json.loads((workdir / "results.json").read_text())["arms"]
            found.append({"malicious": share, "aggregator": aggregator} | arms)
            arm, cells = arms["fl"], []
            for task, field, digits in (
                ("advbench", "safety", 1), ("over_refusal", "rate", 1), ("utility", "nll", 3)
            ):  # fmt: skip
                low, high = arm[task]["ci95"]
                value = arm[task][field]
                cells.append(f"{value:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})")
            table.add_row(f"{share:.0%}", aggregator, *cells)
    (folder / "attacks.json").write_text(json.dumps(found, indent=1))
    Console(width=110).print(table)


if __name__ == "__main__":
    app.run(main)
