"""An OpenAI-compatible server of one base model, its adapters, and guards.

`admission` says what a request must be, `schema` reads requests with `fields`, `served_models`
holds what is served, `batching` collects what arrives and lets one thread own the device, `calls`
follows a request to its end, `replies` writes what clients expect, `moderation` asks guards, and
`app` binds them to HTTP. `token_scores` gives the log-probabilities of given tokens.
"""
