"""Defaults of a run, and their validation before any compute."""

import difflib

import ml_collections

from fedsafe_jax.data import sources

ARMS = ("base", "fl", "fl+filter", "fl+cai", "fl+filter+cai")
ALGORITHMS = ("fedavg", "scaffold")


class ConfigError(ValueError):
    """A field of the config is wrong; the message names it."""


def default_config() -> ml_collections.ConfigDict:
    """Every field a run reads. Sources are written `name:location#part`, see `data.sources`."""
    c = ml_collections.ConfigDict()
    c.seeds = (0,)
    c.arms = ARMS
    c.algorithms = ("fedavg",)
    c.model = "package:model"  # local folder or Hub id
    c.dtype = "float32"  # of the frozen base; adapters are always float32
    c.quantization = ""  # of the frozen base's projections: int8 or nf4; "" for none
    c.model_parallel = 1  # devices that share one copy of the base model
    c.remat = False  # recompute layers in the backward pass: less memory, a third more compute
    c.dry_run = False  # print the plan and stop
    c.export_arm = "fl+filter+cai"  # which arm's adapter is exported

    c.data_dir = ""  # folder that locations are relative to, or "hub"
    c.safe_sources = ("chat:package/clients_safe.jsonl",)
    c.unsafe_sources = ("chat:package/clients_unsafe.jsonl",)
    # Benign pairs for the held-out loss; () holds out a tenth of safe_sources.
    c.heldout_sources = ()
    c.partition = "iid"  # or dirichlet, user, category, source
    c.dirichlet_alpha = 0.5
    c.num_clients = 20
    c.examples_per_client = 100
    c.harmful_share = 0.3

    c.rounds = 6
    c.clients_per_round = 5
    c.local_steps = 10
    c.batch_size = 8  # examples a local step
    c.seq_len = 128  # tokens a packed row; longer examples are cut
    c.learning_rate = 4e-3
    c.min_learning_rate = 1e-6  # cosine over rounds
    c.lora_rank = 16
    c.lora_alpha = 32.0
    c.lora_rank_stabilized = False  # scale alpha / sqrt(rank) instead of alpha / rank (rsLoRA)
    c.lora_targets = ("q_proj", "v_proj")
    c.clients_in_parallel = 0  # a device; 0: one on CPU, all of the cohort elsewhere

    c.filter = ml_collections.ConfigDict()
    c.filter.kind = "classifier"  # or guard: a generative guard such as Llama Guard 3
    c.filter.model = ""  # the guard's folder or Hub id
    c.filter.lora_rank = 16  # of the guard's own adapter
    c.filter.sources = ("chat:package/filter.jsonl",)
    c.filter.epochs = 5
    c.filter.batch_size = 32
    c.filter.learning_rate = 1e-3
    c.filter.threshold = 0.5
    c.filter.max_length = 128

    c.cai = ml_collections.ConfigDict()
    c.cai.constitution = "package:constitution"
    c.cai.red_team_sources = ("chat:package/cai_red_team.jsonl",)
    c.cai.benign_sources = ("chat:package/cai_benign.jsonl",)  # prompts with answers: replay
    c.cai.reviser = "global"  # who criticises and revises: the global model, or the frozen base
    c.cai.red_team_prompts = 24  # a round
    c.cai.benign_prompts = 8  # a round: their answers must not turn into refusals
    c.cai.replay_examples = 48  # a round, imitated beside the revisions
    c.cai.steps = 10
    c.cai.batch_size = 8
    c.cai.pairs_per_step = 4
    c.cai.learning_rate = 1e-3  # decays over rounds as the clients' does
    c.cai.dpo_weight = 0.5
    c.cai.beta = 0.1
    c.cai.max_new_tokens = 48
    c.cai.temperature = 0.0  # of the initial answers

    c.eval = ml_collections.ConfigDict()
    c.eval.advbench = "chat:package/red_team_heldout.jsonl"
    c.eval.over_refusal = "chat:package/benign_heldout.jsonl"
    c.eval.hhh = "package/hhh_heldout.jsonl"
    c.eval.max_prompts = 0  # of each set; 0 for all
    c.eval.max_heldout = 200
    c.eval.max_new_tokens = 24
    c.eval.max_length = 256  # tokens of an HHH dialogue
    c.eval.batch_size = 64
    c.eval.judge = "start"  # of the headline rates: start or keyword; both are reported
    c.eval.judge_url = ""  # OpenAI-compatible endpoint for win rates against the base; "" for none
    c.eval.judge_model = ""  # its model name; a key is read from OPENAI_API_KEY
    c.eval.every_round_prompts = 0  # prompts evaluated after each round, for curves
    return c


def check_override(name: str, config: ml_collections.ConfigDict) -> None:
    """Raises `ConfigError` when `name` (as "filter.epochs") is no field, naming the nearest."""
    known = [
        f"{k}.{n}" for k, v in config.items() if isinstance(v, ml_collections.ConfigDict) for n in v
    ]
    known += [k for k, v in config.items() if not isinstance(v, ml_collections.ConfigDict)]
    if name not in known:
        last = name.rsplit(".", 1)[-1]
        near = difflib.get_close_matches(name, known, 1) or [
            k for k in known if k.split(".")[-1] == last
        ]
        near = near or difflib.get_close_matches(last, known, 1)
        hint = f"; did you mean --config.{near[0]}?" if near else "."
        raise ConfigError(f"--config.{name}: no such field{hint}")


def validate(c: ml_collections.ConfigDict) -> None:
    """Checks every field against the others; files and models are checked where they are read.

    Raises:
      ConfigError: naming the field, what was found and what is expected.
    """

    def choice(field, values, allowed):
        for value in values:
            if value not in allowed:
                near = difflib.get_close_matches(str(value), allowed, 1)
                hint = f" Did you mean '{near[0]}'?" if near else ""
                names = ", ".join(name or "'' (none)" for name in allowed)
                raise ConfigError(f"{field}: '{value}' is not one of {names}.{hint}")

    def at_least(field, value, low):
        if value < low:
            raise ConfigError(f"{field}={value}: expected at least {low}.")

    for field in ("arms", "algorithms", "seeds"):
        value = c[field]
        if not isinstance(value, tuple | list) or not value or len(set(value)) != len(value):
            raise ConfigError(f"{field}={value!r}: expected a tuple of distinct values, not empty.")
    choice("arms", c.arms, ARMS)
    choice("algorithms", c.algorithms, ALGORITHMS)
    choice("cai.reviser", (c.cai.reviser,), ("global", "base"))
    choice("eval.judge", (c.eval.judge,), ("start", "keyword"))
    choice("filter.kind", (c.filter.kind,), ("classifier", "guard"))
    if c.filter.kind == "guard" and not c.filter.model:
        raise ConfigError("filter.model: filter.kind='guard' needs the guard's folder or Hub id.")
    if bool(c.eval.judge_url) != bool(c.eval.judge_model):
        raise ConfigError("eval.judge_url and eval.judge_model: give both, or neither.")
    choice("dtype", (c.dtype,), ("float32", "bfloat16"))
    choice("quantization", (c.quantization,), ("", "int8", "nf4"))
    for field in (
        "rounds",
        "num_clients",
        "clients_per_round",
        "local_steps",
        "batch_size",
        "lora_rank",
        "model_parallel",
    ):
        at_least(field, c[field], 1)
    at_least("seq_len", c.seq_len, 16)
    for field in ("steps", "batch_size", "pairs_per_step", "red_team_prompts"):
        at_least(f"cai.{field}", c.cai[field], 1)
    if c.clients_per_round > c.num_clients:
        raise ConfigError(
            f"clients_per_round={c.clients_per_round} exceeds num_clients={c.num_clients}; "
            "lower it."
        )
    if not 0 <= c.harmful_share <= 1:
        raise ConfigError(f"harmful_share={c.harmful_share}: expected a share between 0 and 1.")
    training = [*c.safe_sources, *c.unsafe_sources, *c.filter.sources]
    for source in [*training, *c.cai.red_team_sources, *c.cai.benign_sources]:
        name, _, _ = sources.parse_source(source)
        if name in sources.EVALUATION_ONLY:
            raise ConfigError(f"source '{source}': {name} is a benchmark and is never trained on.")
