"""The evaluations, one file each; `TASKS` is their registry."""

from fedsafe_jax.evals.task import Task
from fedsafe_jax.evals.tasks.hhh import HHH
from fedsafe_jax.evals.tasks.mt_bench import MT_BENCH
from fedsafe_jax.evals.tasks.refusal import ADVBENCH, OVER_REFUSAL
from fedsafe_jax.evals.tasks.utility import UTILITY

TASKS: dict[str, Task] = {
    task.name: task for task in (ADVBENCH, OVER_REFUSAL, HHH, UTILITY, MT_BENCH)
}
