"""What a quantised base saves and costs: bytes, and the error of logits and loss.

    python benchmarks/quantization.py [--model=FOLDER]

Logits are compared with float32 on the packaged benign dialogues, over the tokens of the answers.
Bytes of Llama-3.1-8B are those of its shapes; nothing of it is loaded.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

import fedsafe_jax as fs
from fedsafe_jax.data import chat, packing, sources
from fedsafe_jax.models.decoder import Decoder, param_shapes
from fedsafe_jax.models.quantize import KINDS, num_bytes, quantize_params
from fedsafe_jax.pipeline.dry_run import KNOWN

_MODEL = flags.DEFINE_string("model", "package:model", "Model folder or Hub id.")
_SOURCE = flags.DEFINE_string("source", "chat:package/clients_safe.jsonl", "Dialogues.")
_COUNT = flags.DEFINE_integer("count", 200, "How many dialogues.")


def answer_logits(lm, batch):
    """Logits of the learned tokens, and their mean loss in nats."""

    @jax.jit
    def run(params):
        model = Decoder(lm.config)
        inputs = (batch.tokens, batch.positions, batch.segment_ids)
        logits = model.apply({"params": params}, *inputs, method="logits")
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], -1)
        return logits, (nll[..., 0] * batch.mask).sum() / batch.mask.sum()

    logits, loss = run(lm.params)
    return np.asarray(logits)[batch.mask > 0], float(loss)


def paper_bytes(kind: str) -> int:
    """Bytes of Llama-3.1-8B as bfloat16 or with quantised projections."""

    def loaded(params):
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        return quantize_params(params, kind) if kind else params

    return num_bytes(jax.eval_shape(loaded, param_shapes(KNOWN[PAPER])))


PAPER = "meta-llama/Llama-3.1-8B-Instruct"


def main(argv):
    del argv
    logging.set_verbosity(logging.WARNING)
    exact = fs.load_pretrained(_MODEL.value)
    examples = sources.load(_SOURCE.value, "")[: _COUNT.value]
    encoded = [chat.encode(exact.tokenizer, e.messages, e.response, 128) for e in examples]
    batch = packing.pack([e for e in encoded if e is not None], 128)
    reference, loss = answer_logits(exact, batch)
    spread = reference.std()
    print(f"| base | {_MODEL.value} | Llama-3.1-8B | logit error | loss, nats |")
    print("|---|---|---|---|---|")
    print(f"| float32 | {num_bytes(exact.params) / 2**20:.1f} MiB | | | {loss:.4f} |")
    for kind in ("", *KINDS):
        lm = fs.load_pretrained(_MODEL.value, "bfloat16", kind)
        # Computed in float32, so that the error is the storage's alone.
        lm = dataclasses.replace(lm, config=dataclasses.replace(lm.config, dtype="float32"))
        logits, loss = answer_logits(lm, batch)
        error = np.sqrt(np.mean((logits - reference) ** 2)) / spread
        print(
            f"| {kind or 'bfloat16'} | {num_bytes(lm.params) / 2**20:.1f} MiB "
            f"| {paper_bytes(kind) / 2**30:.1f} GiB | {error:.2%} | {loss:.4f} |"
        )


if __name__ == "__main__":
    app.run(main)
