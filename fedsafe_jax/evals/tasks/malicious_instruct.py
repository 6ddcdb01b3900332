"""MaliciousInstruct: 100 harmful questions (Huang et al., 2023, arXiv 2310.06987)."""

from fedsafe_jax.evals.tasks.refusal import harmful

MALICIOUS_INSTRUCT = harmful(
    "malicious_instruct",
    source="malicious_instruct:malicious_instruct/MaliciousInstruct.txt",
    benchmark="MaliciousInstruct",
)
