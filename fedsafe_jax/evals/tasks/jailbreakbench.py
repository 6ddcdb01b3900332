"""JailbreakBench: 100 harmful behaviours and 100 benign ones on the same topics.

Chao et al., 2024, arXiv 2404.01318. The benign file is the harmful one's twin, so that the two are
always shown together, and over the same ten categories.
"""

from fedsafe_jax.evals.tasks.refusal import MACRO, harmful, harmless

JAILBREAKBENCH = harmful(
    "jailbreakbench",
    source="jailbreakbench:jailbreakbench/harmful-behaviors.csv",
    benchmark="JailbreakBench",
    beside=("jailbreakbench_benign",),
    columns=(MACRO,),
)
JAILBREAKBENCH_BENIGN = harmless(
    "jailbreakbench_benign",
    source="jailbreakbench:jailbreakbench/benign-behaviors.csv",
    benchmark="JailbreakBench benign",
    columns=(MACRO._replace(better="down"),),
)
