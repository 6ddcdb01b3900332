"""An OpenAI-compatible server of one base model and its adapters.

`schema` reads requests, `served_models` holds what is served, `batching` collects what arrives and
lets one thread own the device, `calls` follows a request to its end, `replies` writes what clients
expect, and `app` binds them to HTTP. `token_scores` gives the log-probabilities of given tokens.
"""
