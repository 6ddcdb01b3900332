"""The evaluations, one file each; `TASKS` is their registry."""

from fedsafe_jax.evals.task import Task
from fedsafe_jax.evals.tasks.alert import ALERT
from fedsafe_jax.evals.tasks.arc import ARC_CHALLENGE, ARC_EASY
from fedsafe_jax.evals.tasks.divergence import DIVERGENCE
from fedsafe_jax.evals.tasks.do_not_answer import DO_NOT_ANSWER
from fedsafe_jax.evals.tasks.gsm8k import GSM8K
from fedsafe_jax.evals.tasks.harmbench import HARMBENCH
from fedsafe_jax.evals.tasks.hhh import HHH
from fedsafe_jax.evals.tasks.ifeval import IFEVAL
from fedsafe_jax.evals.tasks.jailbreakbench import JAILBREAKBENCH, JAILBREAKBENCH_BENIGN
from fedsafe_jax.evals.tasks.malicious_instruct import MALICIOUS_INSTRUCT
from fedsafe_jax.evals.tasks.mmlu import MMLU, MMLU_FIVE_SHOT
from fedsafe_jax.evals.tasks.mt_bench import MT_BENCH
from fedsafe_jax.evals.tasks.or_bench import OR_BENCH, OR_BENCH_TOXIC
from fedsafe_jax.evals.tasks.prefilled import PREFILLED
from fedsafe_jax.evals.tasks.reference import EXERCISES, TOKEN_F1
from fedsafe_jax.evals.tasks.refusal import ADVBENCH, OVER_REFUSAL
from fedsafe_jax.evals.tasks.rewrite import REWRITE
from fedsafe_jax.evals.tasks.s_eval import S_EVAL, S_EVAL_ATTACK
from fedsafe_jax.evals.tasks.safety_prompts import SAFETY_PROMPTS
from fedsafe_jax.evals.tasks.safetybench import SAFETYBENCH, SAFETYBENCH_FIVE_SHOT
from fedsafe_jax.evals.tasks.sorry_bench import SORRY_BENCH
from fedsafe_jax.evals.tasks.strongreject import STRONGREJECT
from fedsafe_jax.evals.tasks.utility import UTILITY
from fedsafe_jax.evals.tasks.xstest import XSTEST_SAFE, XSTEST_UNSAFE

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        ADVBENCH,
        OVER_REFUSAL,
        HHH,
        UTILITY,
        MT_BENCH,
        HARMBENCH,
        STRONGREJECT,
        JAILBREAKBENCH,
        JAILBREAKBENCH_BENIGN,
        MALICIOUS_INSTRUCT,
        DO_NOT_ANSWER,
        S_EVAL,
        S_EVAL_ATTACK,
        ALERT,
        SAFETY_PROMPTS,
        XSTEST_SAFE,
        XSTEST_UNSAFE,
        OR_BENCH,
        OR_BENCH_TOXIC,
        SORRY_BENCH,
        SAFETYBENCH,
        SAFETYBENCH_FIVE_SHOT,
        TOKEN_F1,
        EXERCISES,
        ARC_EASY,
        ARC_CHALLENGE,
        MMLU,
        MMLU_FIVE_SHOT,
        GSM8K,
        IFEVAL,
        PREFILLED,
        DIVERGENCE,
        REWRITE,
    )
}
