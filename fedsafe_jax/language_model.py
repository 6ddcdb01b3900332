"""A language model as users hold it: configuration, parameters and tokenizer together."""

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from fedsafe_jax import generation
from fedsafe_jax.data import chat
from fedsafe_jax.models import hub
from fedsafe_jax.models.decoder import Decoder, DecoderConfig


@dataclasses.dataclass
class LanguageModel:
    """A decoder with its parameters, tokenizer and, optionally, an adapter.

    Attributes:
      config: shape of the decoder.
      params: base parameters.
      tokenizer: Hugging Face tokenizer with a chat template.
      adapter: LoRA factors, or None.
      lora_scale: `alpha / rank` of the adapter.
      name: path or Hub id it was loaded from.
    """

    config: DecoderConfig
    params: dict
    tokenizer: object
    adapter: dict | None = None
    lora_scale: float = 1.0
    name: str = ""

    @property
    def model(self) -> Decoder:
        return Decoder(self.config, self.lora_scale)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return (self.tokenizer.eos_token_id,)

    def __call__(self, tokens) -> jax.Array:
        """Logits, float32 `[batch, seq, vocab]`, of unpadded tokens int32 `[batch, seq]`."""
        tokens = jnp.asarray(tokens)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        variables = {"params": self.params} | ({"lora": self.adapter} if self.adapter else {})
        ones = jnp.ones_like(tokens)
        return self.model.apply(variables, tokens, positions, ones, method="logits")

    def generate(self, prompts: Sequence[str], **options) -> list[str]:
        """Answers to user prompts; options as in `answer_dialogues`."""
        texts, _ = self.answer_dialogues([(("user", p),) for p in prompts], **options)
        return texts

    def answer_dialogues(
        self,
        dialogues: Sequence[Sequence[tuple[str, str]]],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        seed: int = 0,
        batch_size: int = 64,
    ):
        """Answers dialogues of (role, text) turns that end in a user turn.

        Returns:
          `(texts, finished bool [n])`; not finished means cut at `max_new_tokens`.
        """
        room = self.config.max_length - max_new_tokens
        prompts = [
            chat.render(self.tokenizer, turns, answer_next=True)[-room:] for turns in dialogues
        ]
        ids, finished = generation.generate_ids(
            self.model,
            self.params,
            self.adapter,
            prompts,
            self.stop_ids,
            max_new_tokens,
            jax.random.key(seed),
            temperature,
            top_k,
            batch_size,
        )
        return [self.tokenizer.decode(i, skip_special_tokens=True).strip() for i in ids], finished


def model_folder(path_or_hub_id: str) -> pathlib.Path:
    """The local folder of a model: as given, packaged (`package:model`), or downloaded."""
    if path_or_hub_id == "package:model":
        return pathlib.Path(__file__).parent / "assets" / "model"
    return hub.resolve(path_or_hub_id)


def load_pretrained(path_or_hub_id: str, dtype: str = "float32") -> LanguageModel:
    """Loads a Hugging Face model folder, or a Hub model, as a `LanguageModel`.

    Args:
      path_or_hub_id: local folder, or `owner/name`; `package:model` is the packaged small model.
      dtype: of parameters and computation, such as "bfloat16".

    Raises:
      ModelError: the folder is missing or holds an unsupported model.
    """
    from transformers import AutoTokenizer

    folder = model_folder(path_or_hub_id)
    config = hub.read_config(folder, dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template is None:
        raise hub.ModelError(
            f"{folder}: the tokenizer has no chat template; use an instruct model."
        )
    params = hub.load_params(folder, config, dtype)
    return LanguageModel(config, params, tokenizer, name=path_or_hub_id)


def save_pretrained(lm: LanguageModel, folder, dtype: str = "float32") -> None:
    """Writes a folder for transformers: weights with any adapter merged, config, tokenizer."""
    from fedsafe_jax.models import lora

    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    params = lora.merge(lm.params, lm.adapter, lm.lora_scale) if lm.adapter else lm.params
    hub.save_params(params, lm.config, folder, dtype)
    hub.write_json(folder / "config.json", hub.config_dict(lm.config, lm.tokenizer, dtype))
    lm.tokenizer.save_pretrained(folder)
