"""The paper's protocol on a real instruct model of 135M parameters, on real data.

    bash launch/smollm.sh models/smollm2
    fedsafe convert --model=models/smollm2 --adapter=configs/smollm2_aligned --output=models/aligned
    fedsafe run --config=configs/smollm.py --workdir=runs/smollm --config.data_dir=DATA \\
        --config.model=models/aligned --config.filter.encoder=MINILM

The aligned base is what `configs/align.py:public` makes; its adapter lies beside this file.
20 clients, 5 a round, 30% harmful; FedAvg; five arms and three seeds. Sizes are such that an arm of
one seed, its evaluation included, takes at most 20 minutes on two CPU cores; `:gpu` is the full
protocol. `:scaffold` and `:gpu_scaffold` are the same with SCAFFOLD. DATA holds the public files in
their upstream formats, under the folder names used below.
"""

from fedsafe_jax.config import ConfigError, default_config

FORMS = ("", "scaffold", "gpu", "gpu_scaffold")


def get_config(arg=""):
    if arg not in FORMS:
        raise ConfigError(f"configs/smollm.py:{arg}: expected one of {', '.join(FORMS[1:])}.")
    on_gpu = arg.startswith("gpu")
    c = default_config()
    c.seeds = (0, 1, 2)
    c.algorithms = ("scaffold",) if arg.endswith("scaffold") else ("fedavg",)
    c.model = "models/aligned"
    c.data_dir = "data"
    c.safe_sources = (
        "dolly:dolly/databricks_dolly_sample.csv#clients",
        "alpaca:gpteacher/roleplay.json.gz#clients",
        "alpaca:gsm8k/gsm_8k_train.json.gz#clients",
    )
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
    c.num_clients, c.clients_per_round = 20, 5
    c.harmful_share = 0.3
    c.examples_per_client = 80 if on_gpu else 40
    c.rounds = 10 if on_gpu else 5
    c.local_steps = 25 if on_gpu else 6
    c.batch_size = 16 if on_gpu else 4
    c.seq_len = 512 if on_gpu else 128
    c.learning_rate = 1e-3
    c.lora_rank, c.lora_alpha = 16, 32.0
    c.lora_targets = ("q_proj", "k_proj", "v_proj", "o_proj")
    if on_gpu:
        c.dtype = "bfloat16"
    # The server's own pairs: other red-team dialogues, refusals, harmless ones.
    c.filter.sources = (
        "hh_rejected:hh_rlhf/harmless-base-test.jsonl.gz#server",
        "dolly:dolly/databricks_dolly_sample.csv#server",
        "alpaca:gpteacher/roleplay.json.gz#server",
        "chat:package/filter.jsonl",
    )
    c.filter.batch_size, c.filter.epochs, c.filter.max_length = 32, 2, 64
    c.filter.learning_rate = 2e-4
    c.cai.red_team_sources = ("chat:package/align_harmful.jsonl",)
    c.cai.harmless_sources = ("chat:package/align_harmless.jsonl",)
    c.cai.benign_sources = ("dolly:dolly/databricks_dolly_sample.csv#server",)
    c.cai.reviser = "base"  # the server still holds it: criticism does not depend on the harm done
    c.cai.replace_dropped = True  # what a model of this size revises is seldom of use
    c.cai.red_team_prompts = 128 if on_gpu else 16
    c.cai.benign_prompts = 0
    c.cai.replay_examples = 192 if on_gpu else 48
    c.cai.steps = 20 if on_gpu else 5
    c.cai.batch_size = 16 if on_gpu else 8
    c.cai.losses, c.cai.weights = ("sft", "kl"), (1.0, 16.0)  # nothing scales it down
    c.cai.reference = "global"  # what clients taught of other things stays
    c.cai.learning_rate = 5e-4
    c.cai.max_new_tokens = 128 if on_gpu else 32
    c.eval.judges = ("rules", "start", "keyword")
    c.eval.tasks = (
        "advbench",
        "harmbench",
        "xstest_safe",
        "xstest_unsafe",
        "do_not_answer",
        "utility",
        "token_f1",
        "exercises",
        "prefilled=advbench_targets:advbench/harmful_behaviors.csv",
        "divergence=advbench_targets:advbench/harmful_behaviors.csv",
    )
    c.eval.max_new_tokens = 256 if on_gpu else 24
    if not on_gpu:
        c.eval.max_prompts, c.eval.max_heldout = 130, 60
    return c
