"""Regular expressions of strangers, which may take for ever: they run in a process with a limit."""

import json
import subprocess
import sys
from collections.abc import Collection

SECONDS = 20.0  # a real one takes milliseconds, and the process a twentieth of a second
MOST_CHARACTERS = 10_000

# No module of the package is imported there, nor any of the user's (-I, -S).
_PROGRAM = """
import json, re, sys
expression, names = json.load(sys.stdin)
try:
    pattern = re.compile(expression)
except (re.error, RecursionError, OverflowError, MemoryError) as error:
    print(json.dumps({"error": str(error) or type(error).__name__}))
else:
    print(json.dumps({"names": [name for name in names if pattern.fullmatch(name)]}))
"""


class ExpressionError(ValueError):
    """An expression is none, or takes too long."""


def matching(expression: str, names: Collection[str]) -> set[str]:
    """Returns the names that a regular expression matches from end to end.

    Args:
      expression: in the syntax of `re`.
      names: texts to match.

    Raises:
      ExpressionError: it is no expression, or takes longer than `SECONDS` on these names.
    """
    if len(expression) > MOST_CHARACTERS:
        raise ExpressionError(f"{len(expression):,} characters; at most {MOST_CHARACTERS:,}")
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _PROGRAM],
            input=json.dumps([expression, sorted(names)]),
            capture_output=True,
            encoding="utf-8",
            timeout=SECONDS,
            check=True,
        )
    except subprocess.TimeoutExpired:
        raise ExpressionError(f"it takes more than {SECONDS:g} seconds on module names") from None
    except (subprocess.CalledProcessError, OSError) as error:
        raise ExpressionError(f"it could not be tried ({type(error).__name__})") from None
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise ExpressionError(answer["error"][:200])
    return set(answer["names"])
