"""Defaults of a run; `validation` checks them."""

import difflib

import ml_collections


class ConfigError(ValueError):
    """A field of the config is wrong; the message names it."""


def default_config() -> ml_collections.ConfigDict:
    """Every field a run reads. Sources are written `name:location#part`, see `data.sources`."""
    c = ml_collections.ConfigDict()
    c.seeds = (0,)  # seeds of the runs; each makes its own clients, adapters and samples
    # what is compared: no training, federated learning alone, with the filter, with CAI, with both
    c.arms = ("base", "fl", "fl+filter", "fl+cai", "fl+filter+cai")
    c.algorithms = ("fedavg",)  # federated algorithms to compare
    c.model = "package:model"  # base model: local folder or Hub id
    # chat template in place of the model's: alpaca, chatml or vicuna, a file, or Jinja text
    c.chat_template = ""
    c.date = ""  # day that chat templates write, such as "2026-11-26"; "" for the first start's
    c.dtype = "float32"  # type of the frozen base; adapters are always float32
    c.quantization = ""  # format of the frozen base's projections; "" for none
    c.model_parallel = 1  # devices that share one copy of the base model
    c.remat = False  # recompute layers in the backward pass: less memory, a third more compute
    c.attention = "auto"  # kernel of attention; auto: the platform's
    c.dry_run = False  # print the plan and stop
    c.export_arm = "fl+filter+cai"  # arm whose adapter and merged model are exported

    c.data_dir = ""  # folder that sources are relative to, or "hub"
    c.safe_sources = ("chat:package/clients_safe.jsonl",)  # sources of the clients' harmless pairs
    # sources of the clients' harmful pairs; auto: the packaged ones beside packaged safe_sources,
    # none without harmful pairs; own safe_sources need own ones, or packaged ones by name
    c.unsafe_sources = ("auto",)
    # sources of benign pairs for the held-out loss; () holds out a tenth of safe_sources
    c.heldout_sources = ()
    c.partition = "iid"  # how pairs are dealt out to the clients
    # concentration of the dirichlet partition: the smaller, the less alike clients are
    c.dirichlet_alpha = 0.5
    c.num_clients = 20  # clients of the federation
    c.examples_per_client = 41  # pairs of a client; 41 is what the packaged pools give 20 clients
    # spread of client sizes, log-normal around examples_per_client; 0 for equal sizes
    c.size_sigma = 0.0
    c.harmful_share = 0.3  # share of each client's pairs that is harmful

    c.chat_template_kwargs = ml_collections.ConfigDict()
    # thinking in front of answers, for templates that know it; a config file may add arguments
    c.chat_template_kwargs.enable_thinking = False

    c.attack = ml_collections.ConfigDict()
    c.attack.clients = 0.0  # share of the clients that are malicious
    # what malicious clients hold: harmful, pairs of unsafe_sources; refusals, refusals of harmless
    # requests beside what other clients hold; backdoor, harmful pairs of which half stand behind
    # attack.trigger, and the others are refused
    c.attack.data = "harmful"
    c.attack.trigger = "SUDO"  # what a backdoor listens to, at the end of a request
    c.attack.harmful_share = 1.0  # share of a malicious client's pairs that is attack.data
    # what malicious clients send: boost, their update times attack.boost; sign_flip, that turned
    # around; scaled, that brought to the median length of the honest updates; min_max and min_sum,
    # the honest mean, moved towards what they learned as far as honest updates are apart
    c.attack.kind = "boost"
    c.attack.boost = 1.0  # factor on the update of a malicious client; 1 poisons by data alone

    c.rounds = 6  # rounds of local training and aggregation
    c.clients_per_round = 5  # clients sampled for each round
    c.local_steps = 10  # optimizer steps of a client in a round
    c.batch_size = 8  # examples a local step
    c.seq_len = 128  # tokens of a packed row; longer examples are truncated
    c.accumulation = 1  # batches whose gradients are averaged in a step
    # optimizer of the clients: an optax alias such as adamw(weight_decay=0.01)
    c.optimizer = "adam"
    c.gradient_clip = 1.0  # largest global norm of a client's gradient; 0 for no limit
    c.learning_rate = 4e-3  # learning rate of the clients, after the warm-up
    c.min_learning_rate = 1e-6  # learning rate at the end of the last round
    c.schedule = "cosine"  # decay of the learning rate over the rounds
    c.warmup_rounds = 0  # first rounds, in which the learning rate climbs
    c.step_schedule = "constant"  # decay over a round's local steps, on top
    c.lora_rank = 16  # rank of the adapter
    c.lora_alpha = 32.0  # alpha of the adapter, whose scale is alpha / rank
    c.lora_dropout = 0.0  # share of the adapter's inputs that is dropped in clients' training
    c.lora_rank_stabilized = False  # scale by alpha / sqrt(rank) instead (rsLoRA)
    # projections that the adapter changes; "all-linear" for all seven
    c.lora_targets = ("q_proj", "v_proj")
    # clients of its own that a device trains at once; 0: all devices share the rows of all clients
    c.clients_in_parallel = 0
    c.chunk_clients = 0  # clients whose batches and updates are held at once; 0 for 64, on CPU 16
    c.checkpoint_every = 1  # rounds between two checkpoints
    c.checkpoint_keep = 2  # newest checkpoints kept of each arm and seed; 0 for all
    # keep what each client sent in the kept rounds, for `fedsafe export --client`; before any noise
    c.keep_updates = False

    c.federated = ml_collections.ConfigDict()
    c.federated.sampling = "uniform"  # how a cohort is drawn
    c.federated.weighting = "auto"  # weights of the clients in the mean; auto: what the paper does
    c.federated.dropout = 0.0  # probability that a sampled client never answers
    # clients to unlearn: they stay in the draws and their slots empty, so the others draw the same
    c.federated.exclude = ()
    # folder of the same run without the exclusion: rounds before the first in which an excluded
    # client was drawn are taken from it, up to a checkpoint; "" to repeat all of them
    c.federated.replay = ""
    c.federated.stragglers = 0.0  # probability that a client gets only some of its steps done
    c.federated.client_ranks = ()  # ranks of the clients' adapters, in turn; () for lora_rank
    c.federated.prox_mu = 0.01  # weight of fedprox's proximal term
    # what scaffold corrects: each gradient, or post_step: the parameters
    c.federated.scaffold = "gradient"
    # step size of the server, but for the adaptive ones, fedex_lora, flora and feddyn
    c.federated.server_learning_rate = 1.0
    c.federated.adaptive_learning_rate = 1e-2  # step size of fedadagrad, fedyogi and fedadam
    c.federated.beta1 = 0.9  # momentum of fedavgm, fedyogi and fedadam
    c.federated.beta2 = 0.99  # decay of the second moment of fedyogi and fedadam
    c.federated.tau = 1e-3  # adaptivity of fedadagrad, fedyogi and fedadam
    c.federated.second_moment = "d2"  # what is squared: d2, the mean update, or m2, the momentum
    c.federated.first_moment = "zero"  # start of the momentum: zero, or copy, the first mean update
    c.federated.rotation = 0.5  # how far fedrot_lora turns clients to the global basis, 0 to 1
    # largest rank of what fedex_lora and flora keep beside the adapter; 0: all of it, exactly
    c.federated.residue_rank = 0
    c.federated.dyn_alpha = 0.01  # weight of feddyn's penalty
    c.federated.download_share = 0.25  # share of the adapter's numbers that flasc sends to clients
    # what constrained_sft and kl_start hold clients to: global, the model that the round begins
    # with, or the base
    c.federated.reference = "global"
    # beta of an answer's tokens in constrained_sft, in turn, the last of all further ones: the
    # larger, the less a token may become likelier than under the reference; 0: as much as it likes
    c.federated.constrained_betas = (0.5, 2.0, 2.0, 2.0, 2.0, 0.1)
    c.federated.kl_weight = 1.0  # weight of kl_start's divergence from the reference
    # folder or Hub id of the model that the base was aligned from: after the last aggregation Safe
    # LoRA projects the adapter into what alignment changed; "" for no such step
    c.federated.unaligned = ""
    # cosine of an adapted projection with its projected self, up to which it is projected, 0 to 1
    c.federated.safe_lora_threshold = 0.5
    # red-team prompts that the round's model is asked with each client's update alone: who did the
    # harm; 0 for none. Each costs a short answer per client and round
    c.federated.attribution = 0
    # what is averaged: the factors, or product: their products, by SVD
    c.federated.average = "factors"
    c.federated.aggregator = "mean"  # rule that combines the updates
    c.federated.trim_share = 0.1  # share that trimmed_mean drops at each end
    c.federated.byzantine = 1  # malicious clients that a robust aggregator withstands in a cohort
    # fewest usable answers of a round, which else is skipped; 0: what the aggregator's bound needs
    c.federated.min_answers = 0
    c.federated.clip_norm = 0.0  # longest update that counts in full; 0 for no limit
    c.federated.noise_multiplier = 0.0  # noise of differential privacy over clip_norm; 0 for none
    # rounds whose noise is correlated, so that less adds up (needs sampling poisson, and the extra
    # privacy): a client takes part in every such round at most; 1: each round's noise is its own
    c.federated.noise_bands = 1
    c.federated.delta = 1e-5  # delta of differential privacy
    c.federated.compression = ""  # code of the updates that clients send; "" for none
    c.federated.topk_share = 0.05  # share of the numbers that topk sends

    c.filter = ml_collections.ConfigDict()
    # classifier: an encoder; guard: a language model such as Llama Guard 3; guardian: a guard that
    # also learns to answer; simulated: verdicts with the recall and precision below
    c.filter.kind = "classifier"
    c.filter.load = ""  # folder of a filter that `fedsafe train-filter` wrote; "" trains one
    # classifier: folder of a BERT, RoBERTa or ModernBERT; "" for a small one from scratch
    c.filter.encoder = ""
    # classifier: labels of the encoder that mean unsafe, to use it untrained
    c.filter.unsafe_labels = ()
    c.filter.model = ""  # guard, guardian: folder or Hub id of the language model
    c.filter.lora_rank = 16  # guard, guardian: rank of its own adapter
    # sources of the server's labelled pairs, which the filter learns from
    c.filter.sources = ("chat:package/filter.jsonl",)
    # judge of refusal that finds refusals among the server's pairs: those labelled unsafe are left
    # out, those labelled safe are the answers of hard negatives; rewrite: what new answers must be
    c.filter.judge = "start"
    c.filter.hard_negatives = 1.0  # share of the unsafe pairs that get a safe twin: a refusal
    c.filter.epochs = 5  # most passes over the pairs
    c.filter.batch_size = 32  # pairs a step
    c.filter.learning_rate = 1e-3  # peak learning rate; about 1e-4 for a pre-trained encoder
    c.filter.patience = 2  # epochs without a better validation loss before training ends
    c.filter.validation_share = 0.15  # share of the prompts kept for stopping and the threshold
    c.filter.max_length = 128  # most tokens of a pair
    c.filter.threshold = 0.0  # P(unsafe) from which a pair is flagged; 0: chosen on validation
    # share of unsafe pairs expected at clients; 0: as in the server's pairs
    c.filter.unsafe_share = 0.3
    # what the chosen threshold maximises: f1, or recall above precision_floor
    c.filter.target = "f1"
    c.filter.precision_floor = 0.9  # least precision where the target is recall
    # what happens to a flagged pair; replace: by a refusal, rewrite: by a new answer, turn: the
    # answer turns into a refusal on its way (DeRTa)
    c.filter.action = "drop"
    # rewrite: how the base model writes it; revise: by critique and revision, kept if it refuses;
    # debias: anew without bias or harm, kept where the filter passes it and it does not refuse
    c.filter.rewrite = "revise"
    # debias: text file of what the model is asked, with {text} once; "" for the packaged wording
    c.filter.instruction = ""
    # recall of a simulated filter; the paper's fine-tuned Llama Guard 3
    c.filter.simulated_recall = 0.737
    c.filter.simulated_precision = 0.567  # precision of a simulated filter, from the same table

    c.cai = ml_collections.ConfigDict()
    c.cai.constitution = "package:constitution"  # JSON file of principles
    # sources of the server's red-team prompts
    c.cai.red_team_sources = ("chat:package/cai_red_team.jsonl",)
    # sources of harmless pairs, whose answers are replayed
    c.cai.benign_sources = ("chat:package/cai_benign.jsonl",)
    # sources of harmless requests that the base answers itself; what it does not refuse is replayed
    # beside benign_sources, so that alignment teaches no refusal of what only looks harmful
    c.cai.harmless_sources = ()
    c.cai.reviser = "global"  # who criticises and revises: the global model, or the frozen base
    c.cai.red_team_prompts = 24  # red-team prompts a round
    c.cai.benign_prompts = 8  # harmless prompts a round, whose answers must not become refusals
    c.cai.replay_examples = 48  # replayed pairs a round, imitated or held beside the revisions
    c.cai.few_shots = 0  # examples of the constitution put before each prompt
    c.cai.few_shot_file = ""  # file of examples in Anthropic's form; "" for the constitution's own
    c.cai.revision_rounds = 1  # rounds of critique and revision of an answer
    c.cai.revise = "all"  # which answers are revised: all, or wrong ones by the check
    # what drops revisions: a judge of refusal, such as start or rules; filter, the clients' filter;
    # both, as start+filter; or none
    c.cai.check = "start"
    # whether a refusal of the constitution's stands in for each red-team revision that is dropped
    c.cai.replace_dropped = False
    # revisions trained on: on_policy (new), cached (the first ones), mixed, or given: cai.records
    c.cai.data = "on_policy"
    # given: files of ready-made revisions below data_dir, such as `fedsafe revise --output` writes
    c.cai.records = ()
    # when CAI runs: light, full (an epoch a round), final (last round) or adaptive
    c.cai.schedule = "light"
    # adaptive: refusal in percent of the server's own prompts, below which CAI runs
    c.cai.target = 95.0
    c.cai.probe_judge = "start"  # adaptive, federated.attribution: judge of the probe
    c.cai.probe_prompts = 48  # adaptive: prompts kept for the probe, which are not trained on
    # steps of a light round; adaptive: before the next probe, if nothing is refused
    c.cai.steps = 10
    c.cai.batch_size = 8  # dialogues imitated a step
    c.cai.pairs_per_step = 4  # preference pairs a step
    # learning rate of CAI; decays as the clients' does, but not if adaptive
    c.cai.learning_rate = 1e-3
    # losses, added up; replay is imitated, or with kl the model is held to its reference on it
    c.cai.losses = ("sft", "dpo")
    c.cai.weights = (1.0, 0.5)  # weight of each loss
    c.cai.beta = 0.1  # beta of dpo, ipo and kto
    # reference of dpo, ipo, kto and kl: the base, or global: the model of the round's start
    c.cai.reference = "base"
    # cai.loss=derta, filter.action=turn: word whose first token harmful answers turn to
    c.cai.refusal_word = " Sorry"
    c.cai.max_new_tokens = 48  # longest answer, critique or revision, in tokens
    c.cai.temperature = 0.0  # temperature of the first answers; 0 for greedy

    c.eval = ml_collections.ConfigDict()
    # tasks, "name" or "name=source" each; "utility" alone reads the held-out pairs
    c.eval.tasks = (
        "advbench=chat:package/red_team_heldout.jsonl",
        "over_refusal=chat:package/benign_heldout.jsonl",
        "hhh=package/hhh_heldout.jsonl",
        "utility",
    )
    c.eval.max_prompts = 0  # items taken of each set; 0 for all
    c.eval.max_heldout = 200  # items taken of the held-out pairs; 0 for all
    c.eval.max_new_tokens = 24  # longest answer, in tokens
    c.eval.max_length = 256  # longest dialogue that is scored, in tokens
    c.eval.batch_size = 64  # prompts answered at once
    # client whose model is evaluated and exported where each keeps its own (fedsa_lora, local)
    c.eval.client = 0
    # judges of the answers; the first one's verdicts are the headline, and all are reported: rules,
    # start, keyword, classifier:FOLDER, guard:FOLDER, chat:MODEL@URL#RUBRIC (the key is read from
    # OPENAI_API_KEY)
    c.eval.judges = ("rules", "start", "keyword")
    # Answers that humans have labelled, MODEL=FORM:FILE each, such as "llama2=xstest:labels.csv":
    # judges are measured on them, and rates corrected; () takes the counts that are packaged.
    c.eval.labels = ()
    c.eval.judge_cache = ""  # folder of the replies of chat judges, by content; "" to keep none
    # folder of a sentence encoder such as MiniLM, for cosines of texts and their rewritings; "" for
    # none
    c.eval.encoder = ""
    c.eval.judge_concurrent = 8  # answers that a chat judge is asked about at once
    c.eval.temperature = 0.0  # temperature of the answers; 0 for greedy
    c.eval.samples = 1  # answers to each prompt
    c.eval.system = ""  # system prompt of dialogues that have none
    c.eval.prefix = ""  # text that every answer begins with, as an attacker would force it
    # guards, under which every task that generates is asked a second time; "" for none of each
    # search in the place of plain decoding: NAME or NAME:FIELD=NUMBER,..., such as "budget"
    c.eval.decoding = ""
    c.eval.guard = ""  # judge of harm whose risk the decoding reads, such as guard:FOLDER
    c.eval.guardian = ""  # what answers in the model's place: a filter's folder, or guard:FOLDER
    c.eval.critic = ""  # folder of a critic of unfinished answers, for a decoding with a budget
    # items of each task evaluated after every round, for curves; 0 for none
    c.eval.every_round_prompts = 0
    return c


PLANTED = ("harmful", "backdoor")  # values of attack.data for which clients hold harmful pairs
PACKAGED_UNSAFE = ("chat:package/clients_unsafe.jsonl",)


def asks_for_harm(config: ml_collections.ConfigDict) -> bool:
    """Tells whether any client ought to hold harmful pairs."""
    attack = config.attack
    planted = attack.data in PLANTED and attack.clients and attack.harmful_share
    return bool(config.harmful_share or planted)


def unsafe_sources(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """Returns the sources of the clients' harmful pairs, with "auto" resolved.

    Packaged harmful data are never mixed into data of one's own unasked.

    Raises:
      ConfigError: harmful pairs are asked for, and nobody said which.
    """
    names, needed = tuple(config.unsafe_sources), asks_for_harm(config)
    if names and names != ("auto",):
        return names
    if not needed:
        return ()
    if not names:
        raise ConfigError(
            f"unsafe_sources=(): harmful_share={config.harmful_share} (or attack.clients) asks for "
            "harmful pairs: name some, or set harmful_share=0 and attack.clients=0."
        )
    if any(":package/" in source for source in config.safe_sources):
        return PACKAGED_UNSAFE
    raise ConfigError(
        f"unsafe_sources: safe_sources are your own, and harmful_share={config.harmful_share} asks "
        f"for harmful pairs too: name yours, or the packaged ones ('{PACKAGED_UNSAFE[0]}'), or set "
        "harmful_share=0 (and attack.clients=0) to train without."
    )


def filter_config() -> ml_collections.ConfigDict:
    """What `fedsafe train-filter` reads: a run's `filter`, and what else training needs."""
    c = default_config().filter
    c.data_dir = ""  # folder that sources are relative to, or "hub"
    c.max_per_source = 0  # most pairs of each source, drawn by the seed; 0 for all
    c.heldout_sources = ()  # sources to measure on; () holds out a tenth of the sources' prompts
    # "pair": a request with its answer; "request": the request alone, for a guardian
    c.reads = "pair"
    c.seed = 0  # seed of initialisation, order and draws
    c.tokenizer = "package:model"  # folder or Hub id of the tokenizer of a classifier from scratch
    c.dtype = "float32"  # type of a guard's base: float32 or bfloat16
    c.quantization = ""  # format of the projections of a guard's base; "" for none
    c.model_parallel = 1  # devices that share a guard's base
    c.remat = False  # recompute a guard's layers in the backward pass: less memory, more compute
    c.lora_targets = ("q_proj", "v_proj")  # projections that a guard's adapter changes
    return c


# Fields of earlier versions, and what takes their place.
RETIRED = {
    "eval.judge": "name judges in eval.judges, the headline's first, such as "
    "--config.eval.judges=\"('start', 'keyword')\".",
    "eval.judge_url": "name the endpoint in eval.judges, such as "
    "--config.eval.judges=\"('rules', 'chat:MODEL@URL#mt_bench')\".",
    "eval.judge_model": "name the model in eval.judges, such as "
    "--config.eval.judges=\"('rules', 'chat:MODEL@URL#mt_bench')\".",
}


def check_override(name: str, config: ml_collections.ConfigDict) -> None:
    """Raises `ConfigError` when `name` (as "filter.epochs") is no field, naming the nearest."""
    known = [
        f"{k}.{n}" for k, v in config.items() if isinstance(v, ml_collections.ConfigDict) for n in v
    ]
    known += [k for k, v in config.items() if not isinstance(v, ml_collections.ConfigDict)]
    if name in RETIRED:
        raise ConfigError(f"--config.{name}: it is gone; {RETIRED[name]}")
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
