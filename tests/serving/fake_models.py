"""What `ServedModels` offers, without a model: a token is a byte, an answer the prompt reversed."""

import threading

import numpy as np

from fedsafe_jax.serving.token_scores import TokenScores

END = 0


class FakeModels:
    """Answers with the prompt reversed, four tokens a piece, then the end token.

    Attributes:
      batches: models, sampling or "scores", and prompts of every batch so far.
      gate: set; while it is cleared, the worker waits in its batch.
    """

    names = ["base", "ada"]
    max_length, vocab_size, stop_ids = 64, 256, frozenset([END])
    is_guarded = False

    def __init__(self):
        self.batches, self.gate = [], threading.Event()
        self.gate.set()
        self.pieces = 0

    def render(self, dialogue):
        return [*"".join(f"<{role}>{text}" for role, text in dialogue).encode()]

    def encode(self, text):
        return [*text.encode()]

    def decode(self, ids, skip_special_tokens=True):
        ids = [i for i in ids if i != END] if skip_special_tokens else ids
        return bytes(ids).decode(errors="replace").replace("\0", "<end>")

    def group(self, model):
        return ""

    def generate(self, models, sampling, draws):
        self.batches.append((models, sampling, [self.decode(draw.ids) for draw in draws]))
        if any(draw.ids[0] == ord("!") for draw in draws):
            raise RuntimeError("out of memory")
        answers = [[*reversed(draw.ids), END] for draw in draws]
        longest = max(min(len(a), d.max_tokens) for a, d in zip(answers, draws, strict=True))
        for n in range(1, longest + 4, 4):
            self.gate.wait(10)
            self.pieces += 1
            yield [(a[:n], len(a) <= n) for a in answers]

    def score(self, model, sequences, top):
        self.batches.append((model, "scores", [self.decode(ids) for ids in sequences]))
        self.gate.wait(10)
        return [_scores(ids, top) for ids in sequences]


def _scores(ids, top):
    """The likeliest token is "a" everywhere, each token's log-probability minus its id."""
    ids, order = np.asarray(ids), np.arange(top)
    tops = np.broadcast_to(97 + order, (len(ids), top))
    return TokenScores(-ids[1:].astype(np.float32), tops, -1.0 - np.float32(order) + 0.0 * tops)
