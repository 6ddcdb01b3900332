"""Evaluations of a language model: tasks, judges, scores of given answers, intervals."""

from fedsafe_jax.evals.judges import JUDGES
from fedsafe_jax.evals.judges.endpoint import ChatEndpoint
from fedsafe_jax.evals.task import Column, EvalOptions, EvalSet, Task
from fedsafe_jax.evals.tasks import TASKS

__all__ = [
    "JUDGES",
    "TASKS",
    "ChatEndpoint",
    "Column",
    "EvalOptions",
    "EvalSet",
    "Task",
]
