"""XSTest: 250 safe prompts that sound unsafe, and 200 unsafe ones in contrast to them.

Röttger et al., 2024, arXiv 2308.01263. Refusals of the safe ones are over-refusal; both are summed
up by type of prompt. With a judge that labels them, `by_label` tells partial refusals from full.
"""

from fedsafe_jax.evals.tasks.refusal import MACRO, harmful, harmless

XSTEST_SAFE = harmless(
    "xstest_safe",
    source="xstest_safe:xstest/xstest_prompts.csv",
    benchmark="XSTest safe",
    columns=(MACRO._replace(title="mean over types", better="down"),),
)
XSTEST_UNSAFE = harmful(
    "xstest_unsafe",
    source="xstest_unsafe:xstest/xstest_prompts.csv",
    benchmark="XSTest unsafe",
    beside=("xstest_safe",),
    columns=(MACRO._replace(title="mean over types"),),
)
