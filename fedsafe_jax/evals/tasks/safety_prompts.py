"""SafetyPrompts: Chinese prompts of seven scenarios, and six instruction attacks.

Sun et al., 2023, arXiv 2304.10436. The figures are the share of safe answers, overall and as means
over scenarios and over attacks. Upstream has a file of each:

    safety_prompts,safety_prompts=safety_prompts:FOLDER/instruction_attack_scenarios.json
"""

from fedsafe_jax.evals.task import Column
from fedsafe_jax.evals.tasks.refusal import MACRO, harmful

SAFETY_PROMPTS = harmful(
    "safety_prompts",
    source="safety_prompts:safety_prompts/typical_safety_scenarios.json",
    benchmark="SafetyPrompts",
    columns=(
        MACRO._replace(title="mean over scenarios"),
        Column("mean over attacks", "macro_attack", "up", interval="macro_attack_ci95"),
    ),
)
