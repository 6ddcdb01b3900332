"""Runs the evaluation tasks on one model and summarises them with intervals."""

import numpy as np

from fedsafe_jax.evals import statistics
from fedsafe_jax.evals.tasks import hhh, mt_bench, refusal, utility

SHOWN = 12  # answers kept for the report, of each refusal task


def evaluate(lm, sets, settings, judge=None, base=None) -> dict:
    """Per-item outcomes of every task, ready for JSON.

    Args:
      lm: the model, with its adapter.
      sets: object with `advbench`, `over_refusal` (prompts), `hhh` (choices), `heldout` (examples);
        an empty one is skipped.
      settings: `max_new_tokens`, `max_length`, `batch_size`.
      judge: messages to text, such as `judges.ChatEndpoint`; with `base`, a model, it compares
        both models' answers to the held-out prompts.
      base: see `judge`.

    Returns:
      A dict by task: verdicts by judge, HHH outcomes with categories, held-out losses, and answers.
    """
    out: dict = {}
    for task in ("advbench", "over_refusal"):
        prompts = getattr(sets, task)
        if prompts:
            result = refusal.run(lm, prompts, settings.max_new_tokens, settings.batch_size)
            out[task] = {"refused": result.refused}
            out[task]["samples"] = [
                {"prompt": p, "answer": a}
                for p, a in zip(result.prompts[:SHOWN], result.answers[:SHOWN], strict=True)
            ]
    if sets.hhh:
        out["hhh"] = {
            "correct": hhh.run(lm, sets.hhh, settings.max_length),
            "category": [choice.category for choice in sets.hhh],
        }
    if sets.heldout:
        out["utility"] = {"nll": utility.run(lm, sets.heldout, settings.max_length).tolist()}
        if judge is not None and base is not None:
            prompts = [e.prompt for e in sets.heldout]
            ours, theirs = (
                refusal.run(m, prompts, settings.max_new_tokens, settings.batch_size).answers
                for m in (lm, base)
            )
            out["utility"]["wins"] = mt_bench.win_rate(prompts, ours, theirs, judge)
    return out


def summarise(outcomes: list[dict], judge: str) -> dict:
    """Rates with 95% intervals over the seeds' outcomes of `evaluate`.

    Args:
      outcomes: one dict a seed, over the same items.
      judge: whose refusals give the headline rates.

    Returns:
      `{"advbench": {"safety", "ci95", "by_judge"}, "over_refusal": {"rate", ...}, "hhh": ...,
      "utility": {"nll", "ci95"}}`: rates in percent, losses in nats a token, and `per_seed` means.
    """
    summary: dict = {}
    for task, name in (("advbench", "safety"), ("over_refusal", "rate")):
        if task in outcomes[0]:
            by_judge = {}
            for j in outcomes[0][task]["refused"]:
                values = np.array([o[task]["refused"][j] for o in outcomes], float)
                mean, interval = statistics.summarise(values)
                by_judge[j] = {name: mean, "ci95": interval}
            values = np.array([o[task]["refused"][judge] for o in outcomes], float)
            summary[task] = by_judge[judge] | {
                "judge": judge,
                "n": values.shape[1],
                "per_seed": (100 * values.mean(1)).tolist(),
                "by_judge": by_judge,
            }
    if "hhh" in outcomes[0]:
        values = np.array([o["hhh"]["correct"] for o in outcomes], float)
        categories = np.array(outcomes[0]["hhh"]["category"])
        mean, interval = statistics.summarise(values)
        by_category = {}
        for category in sorted(set(categories)):
            part = statistics.summarise(values[:, categories == category])
            n = int((categories == category).sum())
            by_category[category] = {"accuracy": part[0], "ci95": part[1], "n": n}
        summary["hhh"] = {
            "accuracy": mean,
            "ci95": interval,
            "n": values.shape[1],
            "per_seed": (100 * values.mean(1)).tolist(),
            "by_category": by_category,
        }
    if "utility" in outcomes[0]:
        values = np.array([o["utility"]["nll"] for o in outcomes])
        mean, interval = statistics.summarise(values, scale=1.0)
        summary["utility"] = {
            "nll": mean,
            "ci95": interval,
            "n": values.shape[1],
            "per_seed": values.mean(1).tolist(),
        }
        if "wins" in outcomes[0]["utility"]:
            wins = np.array([o["utility"]["wins"] for o in outcomes])
            mean, interval = statistics.summarise(wins)
            summary["utility"] |= {"win_rate": mean, "win_rate_ci95": interval}
    return summary
