"""The command `fedsafe run` under its module name.

python -m fedsafe_jax.main --config=configs/demo.py --workdir=DIR [--config.FIELD=VALUE]
"""

import sys

from fedsafe_jax.cli.startup import start

if __name__ == "__main__":
    start("run", sys.argv[1:])
