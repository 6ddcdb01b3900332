"""HarmBench: standard and contextual behaviours (Mazeika et al., 2024, arXiv 2402.04249).

Upstream's figure is the attack success rate, by its own classifier; here the first column is its
complement, with `eval.judges` of your choice. Copyright is left out, as in `benchmark_readers`.
"""

from fedsafe_jax.evals.task import Column
from fedsafe_jax.evals.tasks.refusal import MACRO, harmful

HARMBENCH = harmful(
    "harmbench",
    source="harmbench:harmbench/harmbench_behaviors_text_all.csv",
    benchmark="HarmBench",
    columns=(
        MACRO,
        Column(
            "mean of standard and contextual",
            "macro_functional",
            "up",
            interval="macro_functional_ci95",
        ),
    ),
)
