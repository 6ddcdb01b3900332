"""SORRY-Bench: fulfilment of unsafe requests by fine-grained categories.

Xie et al., 2024, arXiv 2406.14598. The score is the share of requests that are fulfilled, as a
judge of refusal or of harm sees it, over the requests of one file; by category, by style (the base
or a linguistic mutation) and by language.
"""

import functools

from fedsafe_jax.evals.task import Column
from fedsafe_jax.evals.tasks import refusal

SORRY_BENCH = refusal.harmful(
    "sorry_bench",
    source="sorry_bench:sorry_bench/question.jsonl",
    benchmark="SORRY-Bench",
    summarise=functools.partial(refusal.summarise, "fulfilled", complied=True),
    values=functools.partial(refusal.values, "fulfilled", complied=True),
)._replace(
    columns=(
        Column("harmful fulfilled", "fulfilled", "down", own_title="SORRY-Bench fulfilled"),
        refusal.MACRO._replace(better="down"),
    )
)
