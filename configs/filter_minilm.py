"""A filter from a pre-trained encoder, for the clients of `configs/lab.py`.

    fedsafe train-filter --config=configs/filter_minilm.py --config.data_dir=DATA \\
        --config.encoder=FOLDER --workdir=DIR

FOLDER holds a BERT, RoBERTa or ModernBERT encoder, such as all-MiniLM-L6-v2. Unsafe is a harmful
answer, not a harmful question: refusals to harmful questions are among the safe pairs. Give the
result to a run as `--config.filter.load=DIR`. `:scratch` trains a small encoder instead.
"""

from fedsafe_jax.config import ConfigError, filter_config


def get_config(arg=""):
    if arg not in ("", "scratch"):
        raise ConfigError(f"configs/filter_minilm.py:{arg}: expected nothing or 'scratch'.")
    c = filter_config()
    c.data_dir = "data"
    c.sources = (
        "derta:derta/malicious_tuning_data_330.json",
        "hh_rejected:hh_rlhf/harmless-base-test.jsonl.gz",
        "xstest:xstest_labels/xstest_v2_completions_llama2new_gpteval.csv",
        "xstest:xstest_labels/xstest_v2_completions_mistralinstruct_gpteval.csv",
        "dolly:dolly/databricks_dolly_sample.csv",
        "alpaca:gpteacher/roleplay.json.gz",
        "alpaca:gsm8k/gsm_8k_train.json.gz",
        "chat:package/filter.jsonl",
    )
    c.learning_rate = 1e-3 if arg == "scratch" else 1e-4
    return c
