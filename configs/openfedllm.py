"""OpenFedLLM's defaults (`run_sft.sh`), with its own semantics where they differ from the papers.

    fedsafe run --config=configs/openfedllm.py:scaffold --workdir=DIR

20 clients, 2 a round, 200 rounds of 10 steps, batch 16, rank 32 on q and v, Llama-2-7B in int8. The
argument names the algorithm. What stays different: no dropout in the adapter; a client's rows keep
the order they were drawn in; a chat template instead of Alpaca's.
"""

from fedsafe_jax.config import default_config, openfedllm


def get_config(algorithm="fedavg"):
    c = openfedllm(default_config())
    c.algorithms = (algorithm,)
    c.arms = ("base", "fl")
    c.export_arm = "fl"
    c.model = "meta-llama/Llama-2-7b-chat-hf"
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
    return c
