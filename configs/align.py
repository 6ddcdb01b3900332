"""An instruct model that refuses what harms, and little else, before any client trains it.

    fedsafe run --config=configs/align.py --workdir=runs/aligned --config.model=FOLDER
    fedsafe export --workdir=runs/aligned --arm=cai --scale=0.75 --merge --output=models/aligned

The server alone runs Constitutional AI on its own red-team requests (arm `cai`). As many harmless
requests in the same words ("how to kill weeds") are answered by the model itself, and on them it is
held to its own distribution, so that it does not learn to refuse by the words, nor to speak
otherwise. A part of what was learned (`--scale`) refuses less of either kind, and is what a
federation starts from. With `--config.data_dir=DATA` `:public` adds public requests and
instructions, and is evaluated on public sets.
"""

from fedsafe_jax.config import ConfigError, default_config


def get_config(arg=""):
    if arg not in ("", "public"):
        raise ConfigError(f"configs/align.py:{arg}: expected nothing or 'public' behind the colon.")
    c = default_config()
    c.arms, c.export_arm = ("base", "cai"), "cai"
    c.model = "HuggingFaceTB/SmolLM2-135M-Instruct"
    # No clients train: these pairs are held out for the loss alone.
    c.num_clients = c.clients_per_round = 1
    c.harmful_share = 0.0
    c.rounds = 4
    c.seq_len = 256
    c.lora_rank, c.lora_alpha = 16, 32.0
    c.lora_targets = ("q_proj", "k_proj", "v_proj", "o_proj")
    c.cai.red_team_sources = ("chat:package/align_harmful.jsonl",)
    c.cai.harmless_sources = ("chat:package/align_harmless.jsonl",)
    c.cai.benign_sources = ()
    c.cai.benign_prompts = 0
    c.cai.red_team_prompts = 542  # all of them, in the first round: the base's critiques are kept
    c.cai.data = "cached"
    c.cai.replace_dropped = True
    c.cai.check = "rules"
    c.cai.replay_examples = 780
    c.cai.steps = 70
    c.cai.batch_size = 8
    # At 16 the whole refuses about as much, of either kind, as four fifths of what 4 teaches.
    c.cai.losses, c.cai.weights = ("sft", "kl"), (1.0, 4.0)
    c.cai.learning_rate = 5e-4
    c.cai.max_new_tokens = 32
    c.eval.judges = ("rules", "start")
    c.eval.tasks = (
        "advbench=chat:package/align_harmful_heldout.jsonl",
        "over_refusal=chat:package/align_harmless_heldout.jsonl",
        "utility",
    )
    if arg == "public":
        c.data_dir = "data"
        c.safe_sources = ("dolly:dolly/databricks_dolly_sample.csv#clients",)
        c.heldout_sources = ("dolly:dolly/databricks_dolly_sample.csv#heldout",)
        c.cai.red_team_sources += ("prompts:derta/safety_illegal_instructions_200.json",)
        c.cai.benign_sources = ("dolly:dolly/databricks_dolly_sample.csv#server",)
        c.cai.red_team_prompts = 742
        c.cai.replay_examples = 1050
        c.cai.steps = 100
        c.eval.tasks = (
            "advbench",
            "xstest_safe",
            "xstest_unsafe",
            "over_refusal=chat:package/align_harmless_heldout.jsonl",
            "utility",
        )
        c.eval.max_prompts = 200
    return c
