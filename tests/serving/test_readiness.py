"""Which programs an engine prepares, and when."""

import types

from jaxspec.decoding.fitting import doubling_sizes
from jaxspec.serving.readiness import Readiness


def opened(*, loaded: int, compiled: int) -> tuple[Readiness, list[int]]:
    """Of programs for batches of 1, 2, 4 and 8 rows, and the list of those prepared."""
    prepared: list[int] = []
    programs = types.SimpleNamespace(
        buckets=[1, 2, 4, 8],
        sizes={rows: doubling_sizes(rows, 1, rows) for rows in (1, 2, 4, 8)},
        adaptive=False,
        kept=types.SimpleNamespace(loaded=loaded, compiled=compiled),
        compile_rows=lambda rows, *, few=False: prepared.append(rows),
        compile_prompts=lambda: None,
    )
    ready = Readiness(programs, None)
    ready.open(None)
    return ready, prepared


def test_batches_whose_programs_load_are_prepared_one_ahead_of_several_users():
    ready, prepared = opened(loaded=9, compiled=0)
    found = []
    for ready.wanted in (0, 1, 2, 3, 4, 3, 9):
        while ready.prepare():
            pass
        found.append(prepared[-1])
    assert found == [1, 1, 4, 4, 8, 8, 8] and prepared == [1, 2, 4, 8]


def test_batches_whose_programs_are_compiled_are_prepared_at_once():
    ready, prepared = opened(loaded=9, compiled=1)
    while ready.prepare():
        pass
    assert prepared == [1, 2, 4, 8]
