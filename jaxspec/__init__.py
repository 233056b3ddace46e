"""jaxspec: lossless speculative decoding for Qwen3-class language models in JAX.

>>> target = jaxspec.load_target("smollm2-135m")                            # doctest: +SKIP
>>> drafter = jaxspec.load_drafter("ngram", target)                         # doctest: +SKIP
>>> out = jaxspec.generate(target, "What is a tree?", drafter=drafter)      # doctest: +SKIP
>>> out[0].text, out[0].stats.tau                                           # doctest: +SKIP
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxspec.api import generate as generate
    from jaxspec.api import stream as stream
    from jaxspec.api import warm_up as warm_up
    from jaxspec.config import TreeConfig as TreeConfig
    from jaxspec.decoding.sampling import Sampling as Sampling
    from jaxspec.drafters.base import LoadedDrafter as LoadedDrafter
    from jaxspec.evaluation.comparison import Evaluation as Evaluation
    from jaxspec.evaluation.comparison import evaluate as evaluate
    from jaxspec.loading import enable_compilation_cache as enable_compilation_cache
    from jaxspec.loading import load_drafter as load_drafter
    from jaxspec.loading import load_target as load_target
    from jaxspec.models.target import Target as Target
    from jaxspec.pace import Pace as Pace
    from jaxspec.pace import measure_pace as measure_pace
    from jaxspec.results import Completion as Completion
    from jaxspec.scoring import Score as Score
    from jaxspec.scoring import hidden_states as hidden_states
    from jaxspec.scoring import logits as logits
    from jaxspec.scoring import score as score

# Imported on first use, so that `import jaxspec` does not import JAX.
_NAMES = {
    "jaxspec.api": ("generate", "stream", "warm_up"),
    "jaxspec.config": ("TreeConfig",),
    "jaxspec.decoding.sampling": ("Sampling",),
    "jaxspec.drafters.base": ("LoadedDrafter",),
    "jaxspec.evaluation.comparison": ("Evaluation", "evaluate"),
    "jaxspec.loading": ("enable_compilation_cache", "load_drafter", "load_target"),
    "jaxspec.models.target": ("Target",),
    "jaxspec.pace": ("Pace", "measure_pace"),
    "jaxspec.results": ("Completion",),
    "jaxspec.scoring": ("Score", "hidden_states", "logits", "score"),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = list(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxspec' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
