"""How good a drafter is: tokens per round, speed, and what limits both.

`results` says what a measurement is on disk; `walk` measures tau without decoding, `speed` with
a clock; `metrics` computes, `report` and `plots` show.
"""
