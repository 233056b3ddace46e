"""Old names of `jaxspec.api` and `decoding.requests`, for code that still has to follow."""

from jaxspec.api import Completion as Completion
from jaxspec.api import Interrupted as Interrupted
from jaxspec.api import generate as generate
from jaxspec.api import stream as stream
from jaxspec.api import warm_up as warm_up
from jaxspec.decoding.requests import Prompt as Prompt
from jaxspec.decoding.requests import as_token_ids as as_token_ids
from jaxspec.decoding.requests import check_positions as check_positions
from jaxspec.decoding.requests import decoder_for as bind  # noqa: F401
from jaxspec.decoding.requests import request_keys as request_keys
from jaxspec.decoding.requests import token_ids as token_ids
from jaxspec.decoding.requests import usable_prompts as usable_prompts
from jaxspec.drafters.base import LoadedDrafter as LoadedDrafter
from jaxspec.drafters.plain import PLAIN as PLAIN
from jaxspec.models.target import Target as Target
