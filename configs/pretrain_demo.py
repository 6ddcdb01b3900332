"""The packaged small model, from scratch.

    fedsafe pretrain --config=configs/pretrain_demo.py \\
        --output=STAGE1 --config.data_dir=DATA
    fedsafe pretrain --config=configs/pretrain_demo.py:balance \\
        --output=fedsafe_jax/assets/model --config.data_dir=DATA --config.init_from=STAGE1

About 25 and 8 minutes on two CPU cores. The second stage has three harmless dialogues to a harmful
one and freely put together requests: it takes over-refusal down.
"""

import ml_collections

from fedsafe_jax.config import ConfigError


def get_config(arg=""):
    if arg not in ("", "balance"):
        raise ConfigError(f"configs/pretrain_demo.py:{arg}: expected nothing or 'balance'.")
    config = ml_collections.ConfigDict()
    config.seed = 0  # seed of data, order and initialisation
    config.data_dir = "data"  # folder that sources are relative to
    config.init_from = ""  # folder of an earlier stage

    config.vocab_size = 4096  # tokens of the tokenizer
    config.hidden_size = 256  # width of the model
    config.intermediate_size = 768  # width of the MLP
    config.num_layers = 4  # layers of the model
    config.num_heads = 4  # query heads
    config.num_kv_heads = 2  # key and value heads
    config.max_length = 1024  # longest context, in tokens
    config.compute_dtype = "bfloat16"  # type of the computation; parameters are float32

    config.steps = 1900  # optimizer steps
    config.rows_per_step = 32  # packed rows a step
    config.seq_len = 128  # tokens of a packed row
    config.learning_rate = 3e-3  # peak learning rate
    # weight of prompt tokens: reading requests well matters more than writing them
    config.prompt_weight = 0.3
    config.save_every = 500  # steps between two saved models

    # (source, share that is taken, times it is repeated) of harmless pairs
    config.benign_sources = (
        ("dolly:dolly/databricks_dolly_sample.csv#train", 1.0, 3),
        ("alpaca:gpteacher/roleplay.json.gz#train", 1.0, 2),
        ("alpaca:gsm8k/gsm_8k_train.json.gz#train", 0.3, 1),
    )
    config.longest_chars = 900  # most characters of a benign dialogue
    # source of the red-team dialogues
    config.red_team = "hh_rlhf:hh_rlhf/harmless-base-test.jsonl.gz#server"
    # sources of harmful prompts, answered by refusals
    config.harmful_prompts = (
        "prompts:refusal_direction/harmful_train.json",
        "prompts:refusal_direction/harmful_val.json",
    )
    config.templated_harmful = 40000  # refusals from templates
    config.templated_benign = 34000  # harmless answers from templates
    config.everyday = 50000  # everyday exercises from templates
    config.critique_threads = 14000  # threads of critique and revision
    # sources that nothing trained on may be near
    config.evaluation_sets = (
        "advbench:advbench/harmful_behaviors.csv",
        "prompts:do_not_answer/do_not_answer.csv",
        "prompts:s_eval/S-Eval_base_risk_en_small.jsonl.zip",
        "prompts:s_eval/S-Eval_attack_en_every10th.jsonl.gz",
        "prompts:xstest_labels/xstest_v2_completions_llama2new_gpteval.csv",
        "prompts:refusal_direction/harmless_train.json.gz",
    )
    # HHH comparisons, which nothing trained on may be near
    config.hhh = "hhh/438HHHEvaluations.jsonl"
    if arg == "balance":
        config.seed = 1
        config.steps = 550
        config.learning_rate = 1.2e-3
        config.templated_harmful = 6000
        config.templated_benign = 9000
        config.everyday = 28000
        config.critique_threads = 6000
    return config
