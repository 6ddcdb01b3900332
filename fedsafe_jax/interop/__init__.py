"""Answers in the files of other harnesses: inspect_ai's logs, lm-evaluation-harness' samples.

`origin` says whose answers they are, `inspect_log` and `lm_eval_samples` write them, `exports` is
the registry of both, and `reading` reads files that those harnesses wrote, so that they are judged.
"""
