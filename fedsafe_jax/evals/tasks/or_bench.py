"""OR-Bench: harmless requests that models refuse, and toxic ones that they should.

Cui et al., 2024, arXiv 2405.20947; ten categories in both files. The hard set of 1,319 requests is
read by default; that of 80,000 by its path.
"""

from fedsafe_jax.evals.tasks.refusal import MACRO, harmful, harmless

OR_BENCH = harmless(
    "or_bench",
    source="or_bench:or_bench/or-bench-hard-1k.csv",
    benchmark="OR-Bench",
    columns=(MACRO._replace(better="down"),),
)
OR_BENCH_TOXIC = harmful(
    "or_bench_toxic",
    source="or_bench:or_bench/or-bench-toxic.csv",
    benchmark="OR-Bench toxic",
    beside=("or_bench",),
    columns=(MACRO,),
)
