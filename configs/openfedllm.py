"""OpenFedLLM's defaults (`run_sft.sh`), with its own semantics where they differ from the papers.

    fedsafe run --config=configs/openfedllm.py:scaffold --workdir=DIR

20 clients, 2 a round, 200 rounds of 10 steps, batch 16, rank 32 on q and v, Llama-2-7B in int8. The
argument names the algorithm; prompts are in Alpaca's form, as there. What stays different: no
dropout in the adapter; a client's rows keep the order they were drawn in.
"""

from fedsafe_jax.config import default_config


def get_config(algorithm="fedavg"):
    c = default_config()
    # It samples clients and rows from the round alone, corrects parameters after the step in
    # SCAFFOLD, takes second moments of the momentum, starts momenta as the first mean, and uses the
    # AdamW of transformers 4. Adaptive methods average without weights (`weighting="auto"`).
    c.federated.sampling = "openfedllm"
    c.federated.scaffold = "post_step"
    c.federated.second_moment = "m2"
    c.federated.first_moment = "copy"
    c.federated.adaptive_learning_rate = 1e-3
    c.optimizer = "adamw_hf"
    c.learning_rate = 5e-5
    c.min_learning_rate = 1e-6
    c.schedule = "cosine"
    c.algorithms = (algorithm,)
    c.arms = ("base", "fl")
    c.export_arm = "fl"
    c.model = "meta-llama/Llama-2-7b-hf"
    c.chat_template = "alpaca"
    c.dtype = "bfloat16"
    c.quantization = "int8"
    c.num_clients = 20
    c.clients_per_round = 2
    c.examples_per_client = 1000
    c.harmful_share = 0.0
    c.rounds = 200
    c.local_steps = 10
    c.batch_size = 16
    c.seq_len = 512
    c.lora_rank = 32
    c.lora_alpha = 64.0
    c.lora_dropout = 0.05
    return c
