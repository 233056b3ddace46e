"""Measures drafters: tokens per round (tau), speed, and what limits both.

`results` defines the file format, `walk` measures tau without decoding, `speed` times decoding,
`metrics` computes statistics, `report` and `plots` present them.
"""
