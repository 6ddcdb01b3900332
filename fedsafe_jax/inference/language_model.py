"""Language models as users hold them: configuration, parameters and tokenizer together."""

import dataclasses
import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fedsafe_jax.data import chat, dialogue_notes
from fedsafe_jax.data import chat_template as chat_templates
from fedsafe_jax.inference import generation
from fedsafe_jax.inference.sampling import Sampling
from fedsafe_jax.models import hub, lora
from fedsafe_jax.models.decoder import Decoder, DecoderConfig
from fedsafe_jax.models.sharding import MODEL

Dialogue = Sequence[tuple[str, str]]  # (role, text) turns


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A decoder with its parameters, tokenizer and, optionally, an adapter.

    It is immutable: `with_adapter` and `dataclasses.replace` return another one, which shares the
    parameters.

    Attributes:
      config: shape of the decoder.
      params: base parameters; kernels may be quantised.
      tokenizer: Hugging Face tokenizer with a chat template.
      hf_config: the model's `config.json`, written back as it was.
      adapter: LoRA factors with their configuration; None for the base model.
      generation_config: the model's `generation_config.json`, {} when it has none.
      name: path or Hub id that the model was loaded from.

    Example:
      >>> from fedsafe_jax import load_pretrained
      >>> lm = load_pretrained("package:model")
      >>> lm.generate(["Hello!"], max_new_tokens=24)
      ['Hello! How can I help you today?']
      >>> tokens = lm.tokenizer(["Hello!"], return_tensors="np")["input_ids"]
      >>> lm(tokens).shape == (*tokens.shape, lm.config.vocab_size)
      True
    """

    config: DecoderConfig
    params: dict
    tokenizer: Any
    hf_config: dict
    adapter: lora.Adapter | None = None
    generation_config: dict = dataclasses.field(default_factory=dict)
    name: str = ""

    @property
    def is_guarded(self) -> bool:
        """Whether answers are not the model's alone, see `guarding`."""
        return False

    @property
    def mesh(self) -> Mesh | None:
        """Devices that hold the parameters and split the rows of generation; None for one."""
        return self.config.mesh

    @property
    def model(self) -> Decoder:
        """The Flax module, with the adapter's scale."""
        scale = 1.0 if self.adapter is None else self.adapter.config.scale
        return Decoder(self.config, scale)

    @property
    def factors(self) -> dict | None:
        """The LoRA factors of the adapter; None for the base model."""
        return None if self.adapter is None else self.adapter.factors

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: of the configs, the tokenizer and the chat template."""
        named = end_tokens(self.generation_config)
        if getattr(self.tokenizer, "chat_template", None) is None:
            own = [i for i in (self.tokenizer.eos_token_id,) if i is not None]
        else:
            own = chat_templates.of(self.tokenizer).stop_ids
        return tuple(dict.fromkeys([*named, *own]))

    def with_adapter(self, adapter: lora.Adapter) -> "LanguageModel":
        """Returns this model under another adapter.

        Args:
          adapter: an adapter of this base model, such as `load_adapter` returns.

        Raises:
          ModelError: the adapter belongs to a base of another shape.
        """
        lora.check_base(adapter, self.config)
        return dataclasses.replace(self, adapter=adapter)

    def on_one_device(self) -> "LanguageModel":
        """Returns this model on its first device, for work that is not split over devices.

        On a CPU that device then uses all threads. A model that no single device holds whole is
        returned as it is.
        """
        if self.mesh is None or self.mesh.size == 1 or self.mesh.shape[MODEL] > 1:
            return self

        def first(x):
            return x.addressable_data(0) if isinstance(x, jax.Array) else x

        params, factors = jax.tree.map(first, (self.params, self.factors))
        adapter = self.adapter and self.adapter._replace(factors=factors)
        config = dataclasses.replace(self.config, mesh=None)
        return dataclasses.replace(self, config=config, params=params, adapter=adapter)

    def __call__(self, tokens: jax.Array | np.ndarray) -> jax.Array:
        """Returns logits, float32 `[batch, seq, vocab]`, of unpadded tokens `[batch, seq]`."""
        tokens = jnp.asarray(tokens)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        variables = {"params": self.params} | (
            {} if self.adapter is None else {"lora": self.factors}
        )
        ones = jnp.ones_like(tokens)
        return self.model.apply(variables, tokens, positions, ones, method="logits")

    def generate(self, prompts: Sequence[str], **options: Any) -> list[str]:
        """Answers user prompts.

        Args:
          prompts: texts of the user.
          **options: see `answer_dialogues`.

        Raises:
          ModelError: the prompts are no list of texts, an option is unknown, or as there.
        """
        _check_texts(prompts)
        texts, _ = self.answer_dialogues([(("user", p),) for p in prompts], **options)
        return texts

    def sample(
        self, prompts: Sequence[str], n: int, temperature: float = 1.0, **options: Any
    ) -> list[list[str]]:
        """Answers each user prompt `n` times.

        Args:
          prompts: texts of the user.
          n: answers to each prompt.
          temperature: divisor of the logits.
          **options: see `answer_dialogues`.
        """
        _check_texts(prompts)
        repeated = [p for p in prompts for _ in range(n)]
        texts = self.generate(repeated, temperature=temperature, **options)
        return [texts[i : i + n] for i in range(0, len(texts), n)]

    def generate_each(
        self, adapters: lora.Adapter, prompts: Sequence[str], **options: Any
    ) -> list[list[str]]:
        """Answers user prompts under each of several adapters, decoded together.

        Args:
          adapters: adapters of one configuration, such as a cohort's; their factors have a leading
            axis `[adapters]`.
          prompts: texts of the user.
          **options: see `answer_dialogues`.

        Returns:
          Answers by adapter and prompt.
        """
        _check_texts(prompts)
        answers = self.answer_each(adapters, [(("user", p),) for p in prompts], **options)
        return [texts for texts, _ in answers]

    def answer_each(
        self, adapters: lora.Adapter, dialogues: Sequence[Dialogue], **options: Any
    ) -> list[tuple[list[str], np.ndarray]]:
        """Answers dialogues under each of several adapters, decoded together.

        Args:
          adapters: as of `generate_each`.
          dialogues: as of `answer_dialogues`.
          **options: see `answer_dialogues`.

        Returns:
          What `answer_dialogues` returns, by adapter.
        """
        _check_options(options)
        count = jax.tree.leaves(adapters.factors)[0].shape[0]
        lm = dataclasses.replace(self, adapter=adapters)
        return lm._answer(dialogues, num_adapters=count, **options)

    def answer_dialogues(
        self, dialogues: Sequence[Dialogue], max_new_tokens: int = 64, **options: Any
    ) -> tuple[list[str], np.ndarray]:
        """Answers dialogues of (role, text) turns that end in a user turn.

        Args:
          dialogues: turns, which the tokenizer's chat template renders.
          max_new_tokens: longest answer.
          temperature, top_k, top_p, min_p: see `sampling.Sampling`; greedy by default.
          seed: seed of the samples.
          batch_size: rows decoded at once.
          truncate: cut dialogues that are too long for the context, oldest turns first, instead of
            raising; a warning counts them.
          begin: text that every answer begins with; the model goes on from there.

        Returns:
          `(texts, finished bool [dialogues])`; an answer that is not finished was cut at
          `max_new_tokens`.

        Raises:
          ModelError: a dialogue is too long for the context, or an option is unknown.
          ChatTemplateError: the chat template refuses a dialogue's roles or their order.
        """
        _check_options(options)
        (answers,) = self._answer(dialogues, max_new_tokens, **options)
        return answers

    def _answer(
        self,
        dialogues: Sequence[Dialogue],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        batch_size: int = 64,
        truncate: bool = False,
        begin: str = "",
        num_adapters: int = 0,
    ) -> list[tuple[list[str], np.ndarray]]:
        """Answers as `answer_dialogues`, under each of `num_adapters` (0: one) adapters."""
        begun = self.tokenizer(begin, add_special_tokens=False)["input_ids"] if begin else []
        prompts = self.render(dialogues, max_new_tokens + len(begun), truncate)
        return self._answer_rows(
            [[*prompt, *begun] for prompt in prompts],
            dialogues,
            begun,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(float(temperature), top_k, top_p, min_p),
            seed=seed,
            batch_size=batch_size,
            num_adapters=num_adapters,
        )

    def _answer_rows(
        self,
        rows: Sequence[Sequence[int]],
        dialogues: Sequence[Dialogue],
        begun: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        seed: int,
        batch_size: int,
        num_adapters: int,
    ) -> list[tuple[list[str], np.ndarray]]:
        """Answers rendered dialogues whose answers all begin with `begun`; see `continue_rows`."""
        del dialogues
        generated = self._generate(
            rows,
            max_new_tokens,
            sampling,
            seed=seed,
            batch_size=batch_size,
            num_adapters=num_adapters,
        )
        return [
            ([self.text([*begun, *ids]) for ids in each.ids], each.finished) for each in generated
        ]

    def continue_answers(
        self,
        dialogues: Sequence[Dialogue],
        begun: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 64,
    ) -> generation.Generated:
        """Goes on with the answer to each dialogue from tokens that are put in the model's mouth.

        Args:
          dialogues: as in `answer_dialogues`; those too long for the context are cut.
          begun: token ids that each answer begins with.
          max_new_tokens: longest continuation, without the tokens given.
          temperature, seed, batch_size: as in `answer_dialogues`.

        Returns:
          What the model says behind the given tokens, as token ids.

        Raises:
          ChatTemplateError: the chat template refuses a dialogue's roles or their order.
        """
        longest = max(map(len, begun), default=0)
        prompts = self.render(dialogues, max_new_tokens + longest, truncate=True)
        return self.continue_rows(
            [[*prompt, *said] for prompt, said in zip(prompts, begun, strict=True)],
            dialogues,
            begun,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            batch_size=batch_size,
        )

    def continue_rows(
        self,
        rows: Sequence[Sequence[int]],
        dialogues: Sequence[Dialogue],
        begun: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 64,
    ) -> generation.Generated:
        """Goes on from token ids, whatever the chat template would make of the dialogues.

        Args:
          rows: token ids that the model reads, with what the answers begin with.
          dialogues, begun: what was asked, and what each answer begins with: for guards, see
            `guarding`; the model itself reads the rows alone.
          max_new_tokens: longest continuation, without the tokens given.
          temperature, seed, batch_size: as in `answer_dialogues`.

        Returns:
          What the model says behind the rows, as token ids.

        Raises:
          ModelError: a row is too long for the context.
        """
        del dialogues, begun
        (generated,) = self._generate(
            rows,
            max_new_tokens,
            Sampling(float(temperature)),
            seed=seed,
            batch_size=batch_size,
        )
        return generated

    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling,
        *,
        seed: int,
        batch_size: int,
        num_adapters: int = 0,
    ) -> list[generation.Generated]:
        return generation.generate_ids(
            self.model,
            self.params,
            self.factors,
            prompts=prompts,
            stop_ids=self.stop_ids,
            max_new_tokens=max_new_tokens,
            seed=seed,
            sampling=sampling,
            batch_size=batch_size,
            mesh=self.mesh,
            num_adapters=num_adapters,
        )

    def render(
        self, dialogues: Sequence[Dialogue], max_new_tokens: int, truncate: bool
    ) -> list[list[int]]:
        """Renders dialogues as the token ids of prompts; arguments as in `answer_dialogues`."""
        room = self.config.max_length - max_new_tokens if truncate else None
        prompts = [chat.prompt(self.tokenizer, turns, room) for turns in dialogues]
        dialogue_notes.warn(prompts, "dialogues")
        return [p.ids for p in prompts]

    def text(self, ids: Sequence[int]) -> str:
        """Decodes an answer's token ids."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


def end_tokens(generation_config: Mapping[str, Any]) -> list[int]:
    """Returns the end tokens that a `generation_config.json` names."""
    named = generation_config.get("eos_token_id")
    return named if isinstance(named, list) else [] if named is None else [named]


def _check_texts(prompts: Sequence[str]) -> None:
    """Checks that prompts are a list of texts: one text alone would be a list of letters."""
    if isinstance(prompts, str):
        raise hub.ModelError("prompts: one text is given; expected a list of texts, [text].")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise hub.ModelError(
                f"prompts[{i}]: expected a text, not {repr(prompt)[:60]}; answer_dialogues takes "
                "turns of (role, text)."
            )


def _check_options(options: dict) -> None:
    """Checks the names of options of generation."""
    known = set(inspect.signature(LanguageModel._answer).parameters)
    known -= {"self", "dialogues", "num_adapters"}
    for name in options.keys() - known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise hub.ModelError(
            f"generation has no option '{name}'; expected {', '.join(sorted(known))}.{hint}"
        )
