"""The same federation across real sites, as a Flower app (extra `flower`; `launch/flower`).

`server` runs the rounds of `experiment`, with clients that train elsewhere: in `site`, which
`client` binds to Flower. `wire` says what travels.
"""
