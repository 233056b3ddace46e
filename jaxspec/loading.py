"""Old names of `jaxspec.api` and `drafters`, for code that still has to follow."""

from jaxspec.api import enable_compilation_cache as enable_compilation_cache
from jaxspec.api import load_drafter as load_drafter
from jaxspec.api import load_target as load_target
from jaxspec.drafters.joined import beside_lookup as beside_lookup
from jaxspec.drafters.joined import change_drafter as change_drafter
from jaxspec.drafters.joined import with_lookup as with_lookup
from jaxspec.drafters.joined import with_survival as with_survival
from jaxspec.drafters.registry import LOOKUP_TOO as LOOKUP_TOO
