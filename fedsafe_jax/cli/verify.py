"""Checks folders of runs against their ledgers: a line for each thing that does not match.

    fedsafe verify WORKDIR...

It reads the chain of hashes in `ledger.jsonl`, and compares with it the config, the inputs' hashes,
metrics, records of Constitutional AI, kept updates, checkpoints, outcomes, results and export. Exit
code 0 where all of them match, else 1. Nothing is signed: `--heads` prints the ends of the chains,
which show every later change to whoever keeps them elsewhere.
"""

from absl import flags
from etils import epath

from fedsafe_jax.cli.command import Command, UsageError


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags."""
    here = {"flag_values": values}
    text = "Folders of runs, local or gs://BUCKET/FOLDER; also without the flag's name."
    flags.DEFINE_list("workdir", None, text, **here)
    flags.DEFINE_bool("heads", False, "Also print the last hash of each arm and seed.", **here)


def main(values: flags.FlagValues) -> None:
    """Prints what does not match, and what was checked.

    Raises:
      SystemExit: with code 1, where something does not match.
      WorkdirError: a folder has no ledger.
    """
    matches = [_verify(epath.Path(name), values.heads) for name in values.workdir]
    if not all(matches):
        raise SystemExit(1)


def _verify(workdir: epath.Path, heads: bool) -> bool:
    """Prints what does not match in a folder; returns whether all does."""
    from fedsafe_jax.runtime import ledger, ledger_check

    rows, wrong = ledger_check.read(workdir)
    count = 0
    for finding in (*wrong, *ledger_check.findings(workdir, rows), *_adapters(workdir, rows)):
        print(finding)
        count += 1
    if heads:
        for arm, seeds in ledger.heads(rows).items():
            for seed, end in seeds.items():
                print(f"{arm} seed {seed}: {end['lines']} lines, {end['sha256']}")
    known = ledger_check.chains(rows)
    rounds, kept = sum(len(c.rounds) for c in known), len(ledger_check.checkpoints(workdir, rows))
    checked = f"{len(known)} chains, {rounds} rounds, {kept} checkpoints"
    verdict = f"{count} finding(s)" if count else "matches its ledger"
    print(f"{workdir}: {verdict}; {checked}")
    return not count


def _adapters(workdir: epath.Path, rows: list[dict]) -> list[str]:
    """Compares the adapter of each checkpoint with the one that the round gave."""
    from fedsafe_jax.cli.export import Saved
    from fedsafe_jax.models.adapter_hash import adapter_hash
    from fedsafe_jax.runtime import ledger_check
    from fedsafe_jax.validation import input_errors

    wrong: list[str] = []
    saved: dict[tuple[str, int], Saved] = {}
    for chain, done, after in ledger_check.checkpoints(workdir, rows):
        name, key = f"checkpoints: {chain.name} round {done}", (chain.arm, chain.seed)
        try:
            if key not in saved:
                saved[key] = Saved(str(workdir), chain.arm, chain.seed)
            one = saved[key]
            if one.personal:
                factors = one.client_factors(done, one.config.eval.client)
            else:
                factors = one.factors(done)
        except (UsageError, *input_errors()) as error:  # also a base model that is not here
            wrong.append(f"{name}: cannot be read ({error})")
            continue
        if adapter_hash(factors) != after:
            wrong.append(f"{name}: holds another adapter than the round gave")
    return wrong


COMMAND = Command(define_flags, main, required=("workdir",), positional="workdir")
