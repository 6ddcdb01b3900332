"""Who did it: how well each signal of a client's update ranks planted attackers first.

    python benchmarks/attribution.py --workdir=runs/attribution

Two and six of twenty clients are malicious, boosted or stealthy, on the packaged model and data,
federated training alone. Each attacker and share is one run over all seeds, which goes on where it
was stopped, and is not run again; `--tiny` runs all of it at the smallest size, to see that it
works. The table has the AUROC of each client's mean over the run, with its 95% interval over
clients and seeds, and `--output` the same with every round's.
"""

import json
import pathlib

from absl import app, flags, logging
from rich.console import Console
from rich.table import Table

from fedsafe_jax.config import default_config
from fedsafe_jax.pipeline.harm_by_client import SIGNALS

# Fields of `config.attack`.
ATTACKERS = {
    "boost 10": {"kind": "boost", "boost": 10.0},
    "data alone": {"kind": "boost", "boost": 1.0},
    "scaled": {"kind": "scaled"},
    "min_max": {"kind": "min_max"},
    "min_sum": {"kind": "min_sum"},
}
_WORKDIR = flags.DEFINE_string("workdir", "runs/attribution", "Folder of the runs.")
_OUTPUT = flags.DEFINE_string("output", "", "File of all figures; empty to only print them.")
_ATTACKERS = flags.DEFINE_list("attackers", list(ATTACKERS), "Attackers to run.")
_SHARES = flags.DEFINE_list("shares", ["0.1", "0.3"], "Malicious clients, of all.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of every run.")
_PROMPTS = flags.DEFINE_integer("prompts", 32, "Red-team prompts that each model is asked.")
_TINY = flags.DEFINE_bool("tiny", False, "Runs the smallest size.")


def run_config(attacker: str, share: float):
    """The demo's sizes, with cohorts in which every client takes part in about half the rounds."""
    c = default_config()
    c.lock()  # A field that an attacker misspells is an error.
    c.seeds = tuple(map(int, _SEEDS.value))
    c.arms, c.export_arm = ("fl",), "fl"
    c.clients_per_round, c.examples_per_client = 10, 30
    c.rounds, c.local_steps = 4, 6
    c.harmful_share = 0.0  # of honest clients
    c.attack.clients = share
    for name, value in ATTACKERS[attacker].items():
        c.attack[name] = value
    c.federated.attribution = _PROMPTS.value
    c.eval.tasks, c.eval.max_heldout = ("utility",), 20
    if _TINY.value:
        c.num_clients, c.clients_per_round, c.examples_per_client = 10, 4, 4
        c.rounds, c.local_steps, c.batch_size, c.seq_len = 2, 1, 2, 64
        c.eval.max_heldout = 2
    return c


def signals_of(workdir: pathlib.Path, attacker: str, share: float) -> dict:
    """Runs an attacker, or goes on with it, and returns what `results.json` has of its signals."""
    from fedsafe_jax import experiment

    if not (workdir / "results.json").is_file():
        experiment.run(run_config(attacker, share), str(workdir))
    results = json.loads((workdir / "results.json").read_text())
    return results["attribution"]["fl"]["signals"]


def cell(signal: dict) -> str:
    """Writes an AUROC with its interval."""
    if signal["auroc"] is None:
        return "n/a"
    low, high = signal["ci95"]
    return f"{signal['auroc']:.2f} ({low:.2f}-{high:.2f})"


def main(argv):
    del argv
    from fedsafe_jax.federated.mesh import use_cores
    from fedsafe_jax.runtime.libraries import prepare_libraries

    if unknown := set(_ATTACKERS.value) - set(ATTACKERS):
        raise app.UsageError(f"--attackers: {unknown}; expected some of {', '.join(ATTACKERS)}.")
    folder = pathlib.Path(_WORKDIR.value)
    prepare_libraries(str(folder))
    logging.set_verbosity(logging.WARNING)
    use_cores(10)
    names = [name for name in SIGNALS if name != "flagged"]  # there is no filter
    table = Table("attacker", "malicious", *names, title="AUROC (95% interval) of clients' means")
    everything = []
    for share in map(float, _SHARES.value):
        for attacker in _ATTACKERS.value:
            workdir = folder / f"{attacker}_{share:g}".replace(" ", "-")
            signals = signals_of(workdir, attacker, share)
            everything.append({"attacker": attacker, "share": share, "signals": signals})
            table.add_row(attacker, f"{share:.0%}", *(cell(signals[name]) for name in names))
    if _OUTPUT.value:
        lines = ",\n".join(map(json.dumps, everything))
        pathlib.Path(_OUTPUT.value).write_text(f"[\n{lines}\n]\n")
    Console(width=140).print(table)


if __name__ == "__main__":
    app.run(main)
