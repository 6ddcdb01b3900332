"""The protocol of Noh & Baek (arXiv 2502.16691): Llama-3.1-8B-Instruct, SQuARe, 50 rounds.

    fedsafe run --config=configs/paper.py --config.dry_run  # print the plan
    fedsafe run --config=configs/paper.py:scaffold --workdir=DIR \\
        --config.data_dir=DATA

The paper trains on revisions that were made beforehand, 50 steps of 16 a round and two epochs in
all. With such files, of `fedsafe revise` or from elsewhere, nothing is generated:

    --config.cai.data=given --config.cai.records="('revisions.jsonl',)" \\
        --config.cai.replay_examples=0

Not run by this project: it needs a gated model and accelerators. LoRA rank, alpha and learning rate
are not stated in the paper; they are OpenFedLLM's, and the filter's are ours.
"""

from fedsafe_jax.config import ConfigError, default_config


def get_config(arg="fedavg"):
    if arg not in ("fedavg", "scaffold"):
        raise ConfigError(f"configs/paper.py:{arg}: expected fedavg or scaffold after the colon.")
    c = default_config()
    c.algorithms = (arg,)
    c.model = "meta-llama/Llama-3.1-8B-Instruct"
    c.dtype = "bfloat16"
    c.remat = True
    c.data_dir = "data"
    c.safe_sources = ("square:square/response_train.json#clients",)
    c.unsafe_sources = ("square:square/response_train.json#clients",)
    c.heldout_sources = ("square:square/response_train.json#heldout",)
    c.num_clients = 20
    c.clients_per_round = 5
    c.examples_per_client = 1000
    c.harmful_share = 0.3
    c.rounds = 50
    c.local_steps = 25
    c.batch_size = 16
    c.seq_len = 512
    c.learning_rate = 5e-5
    c.min_learning_rate = 1e-6
    c.lora_rank = 32
    c.lora_alpha = 64.0
    c.clients_in_parallel = 1
    c.filter.sources = ("square:square/response_train.json#server",)
    c.filter.kind = "guard"
    c.filter.model = "meta-llama/Llama-Guard-3-8B"
    c.filter.batch_size = 16
    c.filter.learning_rate = 5e-5
    c.filter.max_length = 512
    # In English, as the clients' pairs and the constitution are.
    c.cai.red_team_sources = ("square_questions:square/question_train.json",)
    c.cai.benign_sources = ("dolly:dolly/databricks-dolly-15k.jsonl",)
    # Most of SQuARe's questions deserve a balanced answer, which is no refusal: the guard judges.
    c.cai.check = "filter"
    c.cai.red_team_prompts = 128
    c.cai.benign_prompts = 32
    c.cai.replay_examples = 160
    c.cai.steps = 50
    c.cai.batch_size = 16
    c.cai.learning_rate = 5e-5
    c.cai.max_new_tokens = 256
    c.cai.temperature = 1.0
    # XSTest's 250 safe prompts; the 200 unsafe ones, which ought to be refused, are `advbench_2`.
    c.eval.tasks = (
        "advbench",
        "over_refusal=xstest_safe:xstest/xstest_prompts.csv",
        "advbench=xstest_unsafe:xstest/xstest_prompts.csv",
        "hhh",
        "utility",
    )
    c.eval.max_new_tokens = 256
    c.eval.max_length = 1024
    # OpenFedLLM's, which the paper builds on, and then this project's own
    c.eval.judges = ("keyword", "rules", "start")
    return c
