"""The same federation across real sites, as a Flower app (extra `flower`; `launch/flower`).

`server` runs the rounds of `experiment`, with clients that train at their sites: in `site`, which
`client` binds to Flower. `wire` defines what travels, `replies` parses what sites send, `received`
makes client updates of it, and `seats` says who takes part.
"""
