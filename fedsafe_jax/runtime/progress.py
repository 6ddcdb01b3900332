"""Progress of a run: a bar on a terminal, lines in a log; and seconds by phase of a round."""

import sys
import time

from rich.console import Console

from fedsafe_jax.runtime import multihost


class Progress:
    """Reports finished rounds with the time left, in the primary process alone.

    Args:
      total_rounds: rounds of all arms, algorithms and seeds together.
    """

    def __init__(self, total_rounds: int):
        self._total = total_rounds
        self._done = self._resumed = 0
        self._spent: list[float] = []
        self._console = Console(stderr=True)
        self._silent = not multihost.is_primary()
        self._last_text = ""

    @property
    def rounds_done(self) -> int:
        """Rounds that this process has finished, in all arms."""
        return self._done

    def resumed(self, rounds: int) -> None:
        """Counts rounds that an earlier process had finished."""
        self._resumed += rounds

    @property
    def _left(self) -> int:
        return self._total - self._resumed - self._done

    def round_done(self, row: dict) -> None:
        """Reports a finished round; `row` is its line of `metrics.jsonl`."""
        self._done += 1
        self._spent.append(sum(row["seconds"].values()))
        # The median of recent rounds: the first round of an arm is slow, since it compiles.
        recent = sorted(self._spent[-8:])
        left = self._left * recent[len(recent) // 2]
        parts = [
            f"{row['arm']} seed {row['seed']} round {row['round'] + 1}",
        ]
        if row["tokens_per_second"] is not None:  # clients trained
            parts.append("no loss" if row["loss"] is None else f"loss {row['loss']:.3f}")
            parts.append(f"{row['tokens_per_second']:,.0f} tokens/s")
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
        """Reports something other than a round, in one line."""
        self._show(text)

    def warn(self, text: str) -> None:
        """Prints a warning that stays on the terminal."""
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

    def end(self) -> None:
        """Clears the bar, so that the next output begins on a line of its own."""
        if self._console.is_terminal:
            sys.stderr.write("\r\x1b[2K")


class PhaseTimer:
    """Measures the seconds of each phase of a round, in `seconds`."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def mark(self, phase: str) -> None:
        """Adds the seconds since the last mark to a phase."""
        now = time.monotonic()
        self.seconds[phase] = _round_seconds(self.seconds.get(phase, 0.0) + now - self._last)
        self._last = now


def _round_seconds(seconds: float) -> float:
    """Rounds to milliseconds, but never to 0: throughputs divide by it."""
    return max(float(f"{seconds:.3f}"), 1e-3)
