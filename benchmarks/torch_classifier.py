"""The peer of `filter_sets.py`: the same encoder, fine-tuned in transformers on torch.

Its own training loop: dynamic padding, AdamW, a tenth of warm-up and a cosine, class weights, the
epoch of the best validation loss.
"""

import copy
import math

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer


class TorchClassifier:
    """Fine-tunes an encoder folder on (prompt, response) pairs."""

    def __init__(self, folder, max_length, seed):
        torch.manual_seed(seed)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
        self.max_length, self.rng = max_length, np.random.default_rng(seed)

    def _forward(self, pairs):
        batch = self.tokenizer(
            [p.dialogue for p in pairs], [p.response for p in pairs], padding=True,
            truncation=True, max_length=self.max_length, return_tensors="pt",
        )  # fmt: skip
        return self.model(**batch).logits

    @torch.inference_mode()
    def log_odds(self, pairs):
        """Float `[n]`."""
        self.model.eval()
        order = np.argsort([len(p.dialogue) + len(p.response) for p in pairs])
        out = np.zeros(len(pairs))
        for start in range(0, len(order), 32):
            chosen = order[start : start + 32]
            logits = self._forward([pairs[i] for i in chosen])
            out[chosen] = (logits[:, 1] - logits[:, 0]).numpy()
        return out

    def train(self, pairs, unsafe, held, held_unsafe, epochs, batch_size, learning_rate):
        """Trains, and keeps the epoch of the least validation loss."""
        weights = len(unsafe) / (2 * np.bincount(unsafe))
        loss_fn = torch.nn.CrossEntropyLoss(weight=torch.tensor(weights, dtype=torch.float32))
        optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=learning_rate, eps=1e-8, weight_decay=0.01
        )
        total = epochs * math.ceil(len(pairs) / batch_size)
        warmup = max(total // 10, 1)

        def factor(step):
            if step < warmup:
                return step / warmup
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        best, kept = math.inf, None
        for _ in range(epochs):
            self.model.train()
            order = self.rng.permutation(len(pairs))
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                logits = self._forward([pairs[i] for i in chosen])
                loss = loss_fn(logits, torch.tensor(unsafe[chosen], dtype=torch.long))
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
            sign = np.where(held_unsafe == 1, 1.0, -1.0)
            each = np.logaddexp(0, -sign * self.log_odds(held)) * weights[held_unsafe]
            found = each.sum() / weights[held_unsafe].sum()
            if found < best:
                best, kept = found, copy.deepcopy(self.model.state_dict())
        self.model.load_state_dict(kept)
