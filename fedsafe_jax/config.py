"""Defaults of a run; `validation` checks them."""

import difflib

import ml_collections


class ConfigError(ValueError):
    """A field of the config is wrong; the message names it."""


def default_config() -> ml_collections.ConfigDict:
    """Every field a run reads. Sources are written `name:location#part`, see `data.sources`."""
    c = ml_collections.ConfigDict()
    c.seeds = (0,)
    c.arms = ("base", "fl", "fl+filter", "fl+cai", "fl+filter+cai")
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
    c.partition = "iid"  # or dirichlet, user, language, category, source
    c.dirichlet_alpha = 0.5
    c.num_clients = 20
    c.examples_per_client = 43  # what the packaged pools give 20 clients
    c.size_sigma = 0.0  # clients hold log-normally different numbers around it
    c.harmful_share = 0.3  # of each client's examples

    c.attack = ml_collections.ConfigDict()
    c.attack.clients = 0.0  # share of the clients that are malicious
    c.attack.harmful_share = 1.0  # of a malicious client's examples
    c.attack.boost = 1.0  # factor on what a malicious client sends

    c.rounds = 6
    c.clients_per_round = 5
    c.local_steps = 10
    c.batch_size = 8  # examples a local step
    c.seq_len = 128  # tokens a packed row; longer examples are cut
    c.accumulation = 1  # batches whose gradients are averaged in a step
    c.optimizer = "adam"  # of the clients, an optax alias, such as adamw(weight_decay=0.01)
    c.gradient_clip = 1.0  # global norm; 0 for none
    c.learning_rate = 4e-3
    c.min_learning_rate = 1e-6  # at the last round's end
    c.schedule = "cosine"  # over rounds: cosine, linear or constant
    c.warmup_rounds = 0  # rounds that the rate climbs first
    c.step_schedule = "constant"  # over a round's local steps, on top
    c.lora_rank = 16
    c.lora_alpha = 32.0
    c.lora_rank_stabilized = False  # scale alpha / sqrt(rank) instead of alpha / rank (rsLoRA)
    c.lora_targets = ("q_proj", "v_proj")
    c.clients_in_parallel = 0  # a device; 0: all of the cohort (on CPU cores share their rows)
    c.chunk_clients = 0  # clients whose batches and updates are held at once; 0: 64
    c.checkpoint_every = 1  # rounds

    c.federated = ml_collections.ConfigDict()
    c.federated.sampling = "uniform"  # or weighted, poisson, openfedllm
    c.federated.weighting = "auto"  # examples, uniform; auto: examples where the paper does so
    c.federated.dropout = 0.0  # probability that a sampled client never answers
    c.federated.stragglers = 0.0  # probability that one gets only some of its steps done
    c.federated.client_ranks = ()  # adapters of these ranks, in turn; () for lora_rank
    c.federated.prox_mu = 0.01  # fedprox
    c.federated.scaffold = "gradient"  # what it corrects; or post_step: parameters after a step
    c.federated.server_learning_rate = 1.0  # fedavg, fedprox, scaffold, fedavgm
    c.federated.adaptive_learning_rate = 1e-2  # fedadagrad, fedyogi, fedadam
    c.federated.beta1 = 0.9  # momentum of fedavgm, fedyogi, fedadam
    c.federated.beta2 = 0.99  # fedyogi, fedadam
    c.federated.tau = 1e-3  # fedadagrad, fedyogi, fedadam
    c.federated.second_moment = "d2"  # of the mean update; m2: of the momentum
    c.federated.first_moment = "zero"  # momentum's start; copy: the first mean update
    c.federated.average = "factors"  # or product: of the adapters' products, by SVD
    c.federated.aggregator = "mean"  # or median, trimmed_mean, krum, multi_krum, geometric_median
    c.federated.trim_share = 0.1  # trimmed_mean: dropped at each end
    c.federated.byzantine = 1  # krum, multi_krum: malicious clients expected in a cohort
    c.federated.clip_norm = 0.0  # longest update; 0 for no limit
    c.federated.noise_multiplier = 0.0  # differential privacy, per clip_norm; 0 for none
    c.federated.delta = 1e-5  # differential privacy
    c.federated.compression = ""  # of what clients send: topk or int8; "" for none
    c.federated.topk_share = 0.05  # topk: numbers that are sent

    c.filter = ml_collections.ConfigDict()
    # classifier: an encoder; guard: a language model such as Llama Guard 3; guardian: a guard that
    # also learns to answer; simulated: one with the recall and precision below.
    c.filter.kind = "classifier"
    c.filter.load = ""  # folder of a filter that `fedsafe train-filter` wrote; "" trains one
    c.filter.encoder = ""  # classifier: BERT, RoBERTa or ModernBERT folder; "": small, from scratch
    c.filter.unsafe_labels = ()  # classifier: the encoder's labels that mean unsafe, as it is
    c.filter.model = ""  # guard, guardian: folder or Hub id
    c.filter.lora_rank = 16  # guard, guardian: of its own adapter
    c.filter.sources = ("chat:package/filter.jsonl",)
    c.filter.hard_negatives = 1.0  # share of the unsafe pairs that get a safe twin: a refusal
    c.filter.epochs = 5  # at most
    c.filter.batch_size = 32
    c.filter.learning_rate = 1e-3  # about 1e-4 for a pre-trained encoder
    c.filter.patience = 2  # epochs without a better validation loss
    c.filter.validation_share = 0.15  # of the server's prompts; for stopping and the threshold
    c.filter.max_length = 128
    c.filter.threshold = 0.0  # P(unsafe) from which a pair is flagged; 0: chosen on validation
    c.filter.unsafe_share = 0.3  # expected of clients' pairs; 0: as in the server's
    c.filter.target = "f1"  # of that choice; or recall, with at least precision_floor
    c.filter.precision_floor = 0.9
    c.filter.action = "drop"  # or replace (by a refusal), rewrite, mask, weight
    c.filter.simulated_recall = 0.737  # the paper's fine-tuned Llama Guard 3
    c.filter.simulated_precision = 0.567

    c.cai = ml_collections.ConfigDict()
    c.cai.constitution = "package:constitution"
    c.cai.red_team_sources = ("chat:package/cai_red_team.jsonl",)
    c.cai.benign_sources = ("chat:package/cai_benign.jsonl",)  # prompts with answers: replay
    c.cai.reviser = "global"  # who criticises and revises: the global model, or the frozen base
    c.cai.red_team_prompts = 24  # a round
    c.cai.benign_prompts = 8  # a round: their answers must not turn into refusals
    c.cai.replay_examples = 48  # a round, imitated beside the revisions
    c.cai.few_shots = 0  # examples of the constitution put before each prompt
    c.cai.few_shot_file = ""  # such examples in Anthropic's form; "": those of the constitution
    c.cai.revision_rounds = 1  # of critique and revision
    c.cai.revise = "all"  # or wrong: answers that the check finds right stay as they are
    c.cai.check = "rules"  # what drops revisions: rules (refusals), filter, both or none
    c.cai.data = "on_policy"  # or cached (the first revisions, again and again), or mixed
    c.cai.schedule = "light"  # or full (an epoch a round), final (last round only), adaptive
    c.cai.target = 95.0  # adaptive: refusal of its own prompts, in percent, below which CAI runs
    c.cai.probe_prompts = 48  # adaptive: so many, which are not trained on
    c.cai.steps = 10  # a light round; adaptive: before the next probe, when nothing is refused
    c.cai.batch_size = 8
    c.cai.pairs_per_step = 4
    c.cai.learning_rate = 1e-3  # decays over rounds as the clients' does; adaptive: does not
    c.cai.losses = ("sft", "dpo")  # some of sft, dpo, ipo, kto, derta; replay is always imitated
    c.cai.weights = (1.0, 0.5)  # of each
    c.cai.beta = 0.1  # of dpo, ipo, kto
    c.cai.reference = "base"  # of dpo, ipo, kto; or global: the model that the round began with
    c.cai.refusal_word = " Sorry"  # derta: its first token is what harmful answers turn to
    c.cai.max_new_tokens = 48
    c.cai.temperature = 0.0  # of the initial answers

    c.eval = ml_collections.ConfigDict()
    # Tasks, "name" or "name=source" each, see `evals.task`; "utility" reads the held-out pairs.
    c.eval.tasks = (
        "advbench=chat:package/red_team_heldout.jsonl",
        "over_refusal=chat:package/benign_heldout.jsonl",
        "hhh=package/hhh_heldout.jsonl",
        "utility",
    )
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


def filter_config() -> ml_collections.ConfigDict:
    """What `train_filter` reads: a run's `filter`, and what else training needs."""
    c = default_config().filter
    c.data_dir = ""
    c.max_per_source = 0  # pairs of each source, drawn by the seed; 0 for all
    c.heldout_sources = ()  # measured on; () holds a tenth of the sources' prompts out
    c.seed = 0
    c.tokenizer = "package:model"  # of a classifier from scratch
    c.dtype = "float32"  # of a guard's base
    c.lora_targets = ("q_proj", "v_proj")  # of a guard's adapter
    return c


def check_override(name: str, config: ml_collections.ConfigDict) -> None:
    """Raises `ConfigError` when `name` (as "filter.epochs") is no field, naming the nearest."""
    known = [
        f"{k}.{n}" for k, v in config.items() if isinstance(v, ml_collections.ConfigDict) for n in v
    ]
    known += [k for k, v in config.items() if not isinstance(v, ml_collections.ConfigDict)]
    if name not in known:
        last = name.rsplit(".", 1)[-1]
        tasks = [str(entry).partition("=")[0] for entry in config.get("eval", {}).get("tasks", ())]
        if name.startswith("eval.") and last in tasks:
            raise ConfigError(
                f"--config.{name}: no such field; tasks are chosen by eval.tasks, such as "
                f"--config.eval.tasks=\"('{last}=SOURCE',)\"."
            )
        same = [k for k in known if k.split(".")[-1] == last]  # the right field, in a wrong group
        near = (
            difflib.get_close_matches(name, same, 1)
            or same
            or difflib.get_close_matches(name, known, 1)
            or difflib.get_close_matches(last, known, 1)
        )
        hint = f"; did you mean --config.{near[0]}?" if near else "."
        raise ConfigError(f"--config.{name}: no such field{hint}")
