"""What a person sees of a run: a bar on a terminal, lines in a log, a table at the end."""

import sys
import time

from rich.console import Console
from rich.table import Table

from fedsafe_jax.runtime import multihost


class Progress:
    """Reports rounds; knows how many there are from the config."""

    def __init__(self, config):
        trained = [arm for arm in config.arms if arm != "base"]
        self._total = len(config.seeds) * len(config.algorithms) * len(trained) * config.rounds
        self._done = self._found = 0
        self._spent: list[float] = []
        self._console = Console(stderr=True)
        self._silent = not multihost.is_first()
        self._last_text = ""

    @property
    def rounds_done(self) -> int:
        """By this process, of all arms."""
        return self._done

    def found(self, rounds: int) -> None:
        """Rounds that an earlier process had finished, when this one comes by."""
        self._found += rounds

    @property
    def _left(self) -> int:
        return self._total - self._found - self._done

    def round_done(self, row: dict) -> None:
        """One finished round, as written to `metrics.jsonl`."""
        self._done += 1
        self._spent.append(sum(row["seconds"].values()))
        # The median of recent rounds: the first of an arm compiles.
        recent = sorted(self._spent[-8:])
        left = self._left * recent[len(recent) // 2]
        parts = [
            f"{row['arm']} seed {row['seed']} round {row['round'] + 1}",
            "no loss" if row["loss"] is None else f"loss {row['loss']:.3f}",
            f"{row['tokens_per_second']:,.0f} tokens/s",
        ]
        if "epsilon" in row:
            parts.append(f"epsilon {row['epsilon']:.2f}")
        if "filter" in row:
            acted = ("kept", "dropped", "rewritten", "masked", "weighted")
            counts = row["filter"]
            parts.append(" ".join(f"{n} {counts[n]}" for n in acted if counts[n] or n == "kept"))
        if "cai" in row:
            cai = row["cai"]
            text = f"revisions {cai['kept']}" if cai["steps"] else "no CAI needed"
            if probes := cai.get("probes"):
                text += " (refused " + " → ".join(f"{p['refused']:.0f}%" for p in probes) + ")"
            parts.append(text)
        parts.append(f"{time.strftime('%H:%M:%S', time.gmtime(left))} left")
        self._show(" | ".join(parts))

    def note(self, text: str) -> None:
        """A line about something other than a round."""
        self._show(text)

    def warn(self, text: str) -> None:
        """A line that stays on the terminal."""
        if self._silent:
            return
        print(("\n" if self._console.is_terminal else "") + f"WARNING: {text}", file=sys.stderr)

    def _show(self, text: str) -> None:
        if self._silent:
            return
        share = 1 - self._left / max(self._total, 1)
        if self._console.is_terminal:
            filled = round(24 * share)
            bar = "\u2588" * filled + "\u2591" * (24 - filled)
            line = f"{bar} {share:4.0%} {text}"[: self._console.width - 1]
            sys.stderr.write("\r\x1b[2K" + line)
            sys.stderr.flush()
        else:
            print(f"[{share:4.0%}] {text}", file=sys.stderr, flush=True)

    def table(self, results: dict) -> None:
        """The paper's table, on standard output."""
        if self._console.is_terminal:
            sys.stderr.write("\r\x1b[2K")
        print_table(results)


def cell(mean: float, interval, digits: int = 1) -> str:
    """`63.7 (59.0-68.1)`."""
    return f"{mean:.{digits}f} ({interval[0]:.{digits}f}-{interval[1]:.{digits}f})"


def table_rows(results: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the final table, for terminal and report alike."""
    packaged = "package/" in results.get("sources", {}).get("advbench", "")
    header = [
        "algorithm",
        "arm",
        "harmful refused % \u2191" if packaged else "AdvBench refused % \u2191",
    ]
    header += ["harmless refused % \u2193", "HHH % \u2191", "benign loss \u2193"]
    compared = any("win_rate" in arm.get("utility", {}) for arm in results["arms"].values())
    header += ["win rate % \u2191"] * compared
    rows = []
    for arm_id, arm in results["arms"].items():
        row = [arm.get("algorithm", ""), arm_id.split("/")[-1]]
        for task, field, digits in (
            ("advbench", "safety", 1),
            ("over_refusal", "rate", 1),
            ("hhh", "accuracy", 1),
            ("utility", "nll", 3),
        ):
            found = arm.get(task)
            row.append(cell(found[field], found["ci95"], digits) if found else "")
        if compared:
            found = arm["utility"]
            known = "win_rate" in found
            row.append(cell(found["win_rate"], found["win_rate_ci95"]) if known else "")
        rows.append(row)
    return header, rows


def print_table(results: dict) -> None:
    """Prints the table with 95% intervals and, where there is one, the filter's quality."""
    header, rows = table_rows(results)
    table = Table(title="mean (95% interval)", title_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i < 2 else "right", no_wrap=i < 2)
    for row in rows:
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    if "filter" in results:
        f = results["filter"]
        console.print(
            f"filter: accuracy {f['accuracy']:.1f}, precision {f['precision']:.1f}, "
            f"recall {f['recall']:.1f}, harmonic mean {f['hmean']:.1f}"
        )
