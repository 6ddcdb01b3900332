"""A critic of unfinished answers: will the budget last, and what will the answer be worth?

"Almost Surely Safe Alignment of Large Language Models at Inference-Time" (Ji et al., 2025, arXiv
2502.01208): two heads on the model's last hidden state and the budget that is left, trained on the
model's own answers. The paper does not give the heads' shape; these are one hidden layer.
"""

import functools
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from safetensors.numpy import load_file

from fedsafe_jax import random_streams
from fedsafe_jax.filters import stream
from fedsafe_jax.guarding.contract import GuardError
from fedsafe_jax.guarding.trajectories import Moments, Trajectory
from fedsafe_jax.guarding.weighing import Foresight
from fedsafe_jax.inference.language_model import LanguageModel
from fedsafe_jax.models.decoder import Decoder
from fedsafe_jax.models.model_files import read_json, write_json
from fedsafe_jax.models.tensor_files import save_file
from fedsafe_jax.random_streams import Purpose, generator

NAME, TENSORS = "critic.json", "critic.safetensors"
BATCH_TOKENS = 4096  # tokens of a batch of rows, padding included
HELD_OUT = 0.2  # share of the prompts that the best epoch is chosen on


class Heads(nn.Module):
    """Two heads on a hidden state and the budget that is left.

    Attributes:
      width: units of the hidden layer.
    """

    width: int = 128

    @nn.compact
    def __call__(self, hidden: jax.Array, budget: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns `(log-odds that the budget lasts, expected reward)`, float32 `[n]` each.

        Args:
          hidden: `[n, hidden]`.
          budget: `[n]`, as a share of the whole.
        """
        x = jnp.concatenate([nn.LayerNorm()(hidden), budget[:, None]], axis=-1)
        out = nn.Dense(2)(nn.gelu(nn.Dense(self.width)(x)))
        return out[:, 0], out[:, 1]


class Critic(NamedTuple):
    """A trained critic of one model.

    Attributes:
      params: parameters of `Heads`.
      hidden_size: width of the hidden states that it reads.
      budget: the whole budget, in nats.
      width: units of its hidden layer.
      center, scale: mean and standard deviation of the rewards it was trained on.
    """

    params: dict
    hidden_size: int
    budget: float
    width: int = 128
    center: float = 0.0
    scale: float = 1.0

    def of(self, lm: LanguageModel) -> Foresight:
        """Returns the critic as a search asks it, with the hidden states of a model.

        Raises:
          GuardError: the model's hidden states have another width.
        """
        if lm.config.hidden_size != self.hidden_size:
            raise GuardError(
                f"the critic reads hidden states of {self.hidden_size} numbers, the model's have "
                f"{lm.config.hidden_size}: it was trained on another model."
            )

        def foresee(
            rows: Sequence[Sequence[int]], budget: np.ndarray
        ) -> tuple[np.ndarray, np.ndarray]:
            hidden = hidden_states(lm, rows, [[len(row) - 1] for row in rows])
            return self.heads(np.concatenate(hidden), budget)

        return foresee

    def heads(self, hidden: np.ndarray, budget: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns `(probability that the budget lasts, expected reward)`, float32 `[n]` each.

        Args:
          hidden: float32 `[n, hidden]`.
          budget: float32 `[n]`, what is left, in nats.
        """
        odds, reward = Heads(self.width).apply(
            {"params": self.params}, hidden, jnp.asarray(budget) / self.budget
        )
        return np.asarray(jax.nn.sigmoid(odds)), np.asarray(reward) * self.scale + self.center


class Trained(NamedTuple):
    """How a critic does on prompts it was not trained on.

    Attributes:
      epoch: the epoch whose weights are kept, from 1.
      loss: cross-entropy and squared error there, the sum.
      constant: the same of the best constants, which know nothing of the answer.
      lasts: share of the moments in which the budget lasts.
      moments: how many there are, trained on and held out.
    """

    epoch: int
    loss: float
    constant: float
    lasts: float
    moments: tuple[int, int]


@functools.partial(jax.jit, static_argnames="model")
def _hidden(model: Decoder, params, factors, tokens, lengths, places):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segments = (positions < lengths[:, None]).astype(jnp.int32)
    variables = {"params": params} | ({} if factors is None else {"lora": factors})
    hidden, _ = model.apply(variables, tokens, positions, segments)
    return jnp.take_along_axis(hidden, places[..., None], axis=1).astype(jnp.float32)


def hidden_states(
    lm: LanguageModel, rows: Sequence[Sequence[int]], places: Sequence[Sequence[int]]
) -> list[np.ndarray]:
    """Returns the last layer's hidden states at places of rows, float32 `[places, hidden]` each.

    Args:
      lm: the model, under its adapter.
      rows: token ids.
      places: of each row the tokens whose states are asked for.
    """
    out: list[np.ndarray] = [np.zeros((0, lm.config.hidden_size), np.float32)] * len(rows)
    most = max(map(len, places), default=0)
    for chosen, width, count in stream.batches([len(row) for row in rows], BATCH_TOKENS):
        lengths, asked = np.ones(count, np.int32), np.zeros((count, most), np.int32)
        lengths[: len(chosen)] = [len(rows[i]) for i in chosen]
        for n, i in enumerate(chosen):
            asked[n, : len(places[i])] = places[i]
        tokens = stream.stack([rows[i] for i in chosen], width, count)
        hidden = np.asarray(
            _hidden(lm.model, lm.params, lm.factors, tokens=tokens, lengths=lengths, places=asked)
        )
        for n, i in enumerate(chosen):
            out[i] = hidden[n, : len(places[i])]
    return out


def moments_of(lm: LanguageModel, answered: Sequence[Trajectory]) -> Moments:
    """Returns the moments of a model's answers with its hidden states.

    Args:
      lm: the model, under its adapter.
      answered: its answers, see `trajectories.collect`.
    """
    hidden = hidden_states(lm, [one.ids for one in answered], [one.places for one in answered])
    counts = [len(one.places) for one in answered]
    return Moments(
        np.repeat([one.prompt for one in answered], counts),
        np.concatenate(hidden),
        np.concatenate([np.asarray(one.to_come, np.float32) for one in answered]),
        np.repeat(np.array([one.reward for one in answered], np.float32), counts),
    )


def train(
    moments: Moments,
    budget: float,
    seed: int = 0,
    epochs: int = 50,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    width: int = 128,
) -> tuple[Critic, Trained]:
    """Trains a critic by AdamW; every moment stands with a budget drawn anew in each epoch.

    What costs an answer still has does not depend on what is left to pay it, so one moment teaches
    about every budget.

    Args:
      moments: moments of a model's own answers.
      budget: the whole budget, in nats.
      seed: seed of weights, split, order and budgets.
      epochs: passes over the moments; the best on held-out prompts is kept.
      batch_size: moments a step.
      learning_rate: of AdamW.
      width: units of the hidden layer.

    Raises:
      GuardError: there are not two prompts with unfinished answers.
    """
    held, ours = _split(moments, seed)
    model, center = Heads(width), float(moments.reward.mean())
    scale = float(moments.reward.std()) or 1.0
    reward = (moments.reward - center) / scale
    dim = moments.hidden.shape[1]
    start = model.init(
        random_streams.key(Purpose.CRITIC_START, seed), np.zeros((1, dim)), np.zeros(1)
    )
    optimizer = optax.adamw(learning_rate)

    def loss_fn(params, hidden, share, lasts, worth):
        odds, expected = model.apply({"params": params}, hidden, share)
        detected = optax.sigmoid_binary_cross_entropy(odds, lasts).mean()
        return detected + jnp.square(expected - worth).mean()

    @jax.jit
    def step(params, state, *batch):
        updates, state = optimizer.update(jax.grad(loss_fn)(params, *batch), state, params)
        return optax.apply_updates(params, updates), state

    params = start["params"]
    state, measured = optimizer.init(params), jax.jit(loss_fn)
    even = np.linspace(0, 1, len(held) + 2)[1:-1]  # budgets of the held-out moments, all of them
    shares = generator(Purpose.CRITIC_DRAWS, seed).permutation(even)
    lasts = (shares * budget > moments.to_come[held]).astype(np.float32)
    held_out = (moments.hidden[held], shares.astype(np.float32), lasts, reward[held])
    best = (np.inf, 0, params)
    for epoch in range(1, epochs + 1):
        rng = generator(Purpose.CRITIC_DRAWS, seed, epoch)
        order, drawn = rng.permutation(ours), rng.uniform(size=len(ours))
        for first in range(0, len(order) - len(order) % batch_size or len(order), batch_size):
            chosen = order[first : first + batch_size]
            share = drawn[first : first + batch_size].astype(np.float32)
            enough = (share * budget > moments.to_come[chosen]).astype(np.float32)
            params, state = step(
                params, state, moments.hidden[chosen], share, enough, reward[chosen]
            )
        best = min(best, (float(measured(params, *held_out)), epoch, params), key=lambda b: b[0])
    loss, epoch, params = best
    critic = Critic(
        jax.tree.map(np.asarray, params), dim, budget, width=width, center=center, scale=scale
    )
    constant = _constant(lasts, reward[ours], reward[held])
    return critic, Trained(
        epoch, loss, constant, lasts=float(lasts.mean()), moments=(len(ours), len(held))
    )


def _split(moments: Moments, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the moments of held-out prompts, and the others."""
    prompts = np.unique(moments.prompt)
    if len(prompts) < 2:
        raise GuardError(
            f"a critic learns from unfinished answers to at least two prompts, found "
            f"{len(prompts)}; give more prompts, or a smaller block."
        )
    order = generator(Purpose.CRITIC_DRAWS, seed, 0).permutation(prompts)
    chosen = order[: max(round(HELD_OUT * len(prompts)), 1)]
    held = np.isin(moments.prompt, chosen)
    return np.flatnonzero(held), np.flatnonzero(~held)


def _constant(lasts: np.ndarray, ours: np.ndarray, held: np.ndarray) -> float:
    """Returns the loss of the share that lasts, and of the mean reward, on held-out moments."""
    share = np.clip(lasts.mean(), 1e-6, 1 - 1e-6)
    entropy = -np.mean(np.where(lasts > 0, np.log(share), np.log(1 - share)))
    return float(entropy + np.mean(np.square(held - ours.mean())))


def save(critic: Critic, folder: str | os.PathLike, notes: dict) -> None:
    """Writes a critic: `critic.json` and safetensors.

    Args:
      critic: the critic.
      folder: made if missing.
      notes: what else `critic.json` is to say, such as the model it was trained on.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(traverse_util.flatten_dict(critic.params, sep="/"), folder / TENSORS)
    fields = {name: getattr(critic, name) for name in Critic._fields if name != "params"}
    write_json(folder / NAME, fields | notes)


def load(folder: str | os.PathLike) -> Critic:
    """Reads what `save` wrote.

    Raises:
      GuardError: there is no critic, or a damaged one.
    """
    folder = pathlib.Path(folder)
    if not os.path.isfile(folder / NAME):
        raise GuardError(
            f"critic '{folder}': no {NAME} there; give a folder that `fedsafe train-critic` wrote."
        )
    try:
        content = read_json(folder / NAME)
        fields = {name: content[name] for name in Critic._fields if name != "params"}
        params = traverse_util.unflatten_dict(load_file(folder / TENSORS), sep="/")
        critic = Critic(params, **fields)
        critic.heads(np.zeros((1, critic.hidden_size), np.float32), np.ones(1, np.float32))
    except Exception as error:  # of flax too, whose errors share no other base
        raise GuardError(f"critic '{folder}' cannot be read ({error}); train it again.") from None
    return critic
