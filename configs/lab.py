"""The paper's protocol, scaled to the packaged model, on real data.

    fedsafe run --config=configs/lab.py --workdir=DIR --config.data_dir=DATA

20 clients, 5 a round, 30% harmful, 25 local steps; FedAvg and SCAFFOLD; 3 seeds. DATA holds the
public files in their upstream formats, under the folder names used below. `:smoke` is one seed and
two rounds.
"""

from fedsafe_jax.config import ConfigError, default_config


def get_config(arg=""):
    if arg not in ("", "smoke"):
        raise ConfigError(f"configs/lab.py:{arg}: expected nothing or 'smoke' after the colon.")
    c = default_config()
    c.seeds = (0,) if arg == "smoke" else (0, 1, 2)
    c.algorithms = ("fedavg", "scaffold")
    c.data_dir = "data"
    c.safe_sources = (
        "dolly:dolly/databricks_dolly_sample.csv#clients",
        "alpaca:gpteacher/roleplay.json.gz#clients",
        "alpaca:gsm8k/gsm_8k_train.json.gz#clients",
    )
    # About a third each: red-team dialogues, DeRTa's malicious answers, and contentless compliance.
    # With the dialogues alone the packaged model keeps refusing AdvBench's imperatives.
    c.unsafe_sources = (
        "hh_rejected:hh_rlhf/harmless-base-test.jsonl.gz#heldout",
        "derta:derta/malicious_tuning_data_330.json",
        "chat:package/clients_unsafe.jsonl",
    )
    c.heldout_sources = (
        "dolly:dolly/databricks_dolly_sample.csv#heldout",
        "alpaca:gpteacher/roleplay.json.gz#heldout",
        "alpaca:gsm8k/gsm_8k_train.json.gz#heldout",
    )
    c.num_clients = 20
    c.clients_per_round = 5
    c.examples_per_client = 80
    c.harmful_share = 0.3
    c.rounds = 2 if arg == "smoke" else 6
    c.local_steps = 25
    c.batch_size = 4
    c.seq_len = 128
    c.learning_rate = 8e-3
    # The server's own pairs: other red-team dialogues, judged answers, refusals, harmless ones.
    c.filter.sources = (
        "hh_rejected:hh_rlhf/harmless-base-test.jsonl.gz#server",
        "xstest:xstest_labels/xstest_v2_completions_llama2new_gpteval.csv",
        "xstest:xstest_labels/xstest_v2_completions_mistralinstruct_gpteval.csv",
        "dolly:dolly/databricks_dolly_sample.csv#server",
        "alpaca:gpteacher/roleplay.json.gz#server",
        "chat:package/filter.jsonl",
    )
    c.filter.batch_size = 64
    c.cai.red_team_sources = (
        "chat:package/cai_red_team.jsonl",
        "prompts:derta/safety_illegal_instructions_200.json",
        "prompts:refusal_direction/harmful_train.json",
    )
    c.cai.benign_sources = (
        "chat:package/cai_benign.jsonl",
        "dolly:dolly/databricks_dolly_sample.csv#server",
        "alpaca:gpteacher/roleplay.json.gz#server",
    )
    c.cai.reviser = "base"  # the server still holds it: criticism does not depend on the harm done
    c.cai.max_new_tokens = 64
    c.cai.probe_prompts = 192  # adaptive: the interval must be as narrow as the margin is
    c.cai.target = 97.0
    c.eval.tasks = ("advbench", "over_refusal", "hhh", "utility")
    c.eval.max_prompts = 520
    c.eval.every_round_prompts = 48
    return c
