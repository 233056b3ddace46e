"""Bodies of OpenAI's completion and chat requests, parsed to engine requests."""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from jaxspec.decoding.requests import check_tokens
from jaxspec.decoding.sampling import Sampling
from jaxspec.models.target import Target
from jaxspec.serving.calls import OPEN
from jaxspec.serving.config import EngineConfig
from jaxspec.serving.fields import BadRequest, Fields, is_number
from jaxspec.serving.formats import FORMATS, is_json, read_format
from jaxspec.serving.grammars import Grammar, Grammars, Lead
from jaxspec.serving.messages import THOUGHTS, read_messages, thoughts_in_content
from jaxspec.serving.requests import Request
from jaxspec.serving.thoughts import BEGIN, CLOSE, LEAD, Start, after_thoughts, start_of
from jaxspec.serving.tools import TOOLS, Tools, call_form, read_tools
from jaxspec.tokenizer import Tokenizer

SAMPLED = {"temperature", "top_p", "top_k", "min_p", "seed"}
PENALTIES = {"presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias"}
STOPS = {"stop", "stop_token_ids", "ignore_eos", "min_tokens"}
LENGTHS = {"max_tokens", "max_completion_tokens"}
COMMON = {"model", "n", "stream", "stream_options", "logprobs", "cache_salt"}
COMMON |= SAMPLED | PENALTIES | STOPS | LENGTHS | FORMATS
MAX_STOPS, MAX_STOP_CHARACTERS, MAX_CHOICES = 64, 256, 128
THINKING = "enable_thinking"
SWITCHES = (THINKING, "preserve_thinking")  # of chat templates; the second of Qwen3.8's
CHAT = COMMON | TOOLS | {"messages", "chat_template_kwargs", "top_logprobs"}


@dataclasses.dataclass(frozen=True)
class Asked:
    """A parsed request body.

    Attributes:
      requests: one per choice of every prompt; those of a prompt are adjacent.
      prompt_tokens: number of tokens of all prompts.
      echo: per prompt, the text that precedes its answer.
      silent: return only the echo, without the answers.
      thoughts: where the model's thoughts begin, which are given apart; None: it has none.
      tools: those that answers may call.
    """

    requests: tuple[Request, ...]
    prompt_tokens: int
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool = False
    usage_in_every_chunk: bool = False
    echo: tuple[str, ...] = ()
    silent: bool = False
    thoughts: Start | None = None
    tools: Tools | None = None

    @property
    def choices(self) -> int:
        """Number of answers per prompt."""
        return len(self.requests) // len(self.echo)


def parse_body(data: bytes) -> Any:
    """The JSON value of a request's body."""
    try:
        value = json.loads(data.decode())
        json.dumps(value, ensure_ascii=False).encode()  # raises on lone surrogates
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON ({error})") from error
    return value


def read_completion(
    body: Any, target: Target, config: EngineConfig, grammars: Grammars
) -> Asked:
    """Reads `POST /v1/completions`, whose prompts are texts or lists of token ids."""
    fields = Fields(body, COMMON | {"prompt", "echo"})
    prompts = fields.get("prompt", None)
    if not isinstance(prompts, list) or not any(isinstance(p, (str, list)) for p in prompts):
        prompts = [prompts]
    ids, top, echo = [_ids(p, target) for p in prompts], None, None
    if fields.get("logprobs", False) is not False:
        top = _top_logprobs(fields, "logprobs", config)
    if fields.flag("echo"):
        decode = target.tokenizer.decode
        echo = [p if isinstance(p, str) else decode(p) for p in prompts]
    grammar = _grammar(fields, read_format(fields), grammars)
    own = dict(default=16, top=top, echo=echo, grammar=grammar)
    return _asked(fields, ids, target, config, **own)


def _grammar(
    fields: Fields,
    asked: tuple[str, str] | None,
    grammars: Grammars,
    *,
    lead: Lead | None = None,
    tools: Tools | None = None,
) -> Grammar | None:
    """Args:
    asked: the field that asks for a grammar, and the grammar's text.
    lead: comes before what the text describes.
    tools: whose grammar it is, if it is that of tools.
    """
    if asked is None:
        return None
    field, text = asked
    longer = {
        "ignore_eos": fields.flag("ignore_eos"),
        "min_tokens": fields.integer("min_tokens", 0),
    }
    for name in filter(longer.get, longer):
        raise BadRequest(f"{name} excludes {field}, which decides where the answer ends", name)
    try:
        return grammars.of(text, lead)
    except ValueError as error:
        if tools is not None:
            tools.check(grammars)
        raise BadRequest(f"{field} cannot be used: {error}", field) from error


def _top_logprobs(fields: Fields, name: str, config: EngineConfig) -> int:
    top = fields.integer(name, 0)
    if not 0 <= top <= config.top_logprobs:
        raise BadRequest(f"{name} is {top}; expected 0 … {config.top_logprobs}", name)
    return top


def _ids(prompt: Any, target: Target) -> list[int]:
    if isinstance(prompt, str):
        if not prompt:
            raise BadRequest("prompt is empty; expected some text", "prompt")
        return target.tokenizer.encode(prompt)
    if not isinstance(prompt, list) or not all(type(t) is int for t in prompt) or not prompt:
        raise BadRequest("prompt must be a text, token ids, or a list of either", "prompt")
    return prompt


def read_chat(body: Any, target: Target, config: EngineConfig, grammars: Grammars) -> Asked:
    """Reads `POST /v1/chat/completions`: text messages, and tools."""
    fields = Fields(body, CHAT)
    messages = read_messages(fields.get("messages", None))
    form = call_form(target.tokenizer)
    asked = read_format(fields)
    tools = read_tools(fields, form, asked and asked[1])
    if tools is not None:
        if asked is not None and not is_json(asked[1]):  # its start tells it from a call
            raise BadRequest(f"tools exclude {asked[0]} unless it is JSON; give one", asked[0])
        asked = asked[0] if asked else "tools", tools.grammar
    lead = tools and tools.lead
    strict = asked is not None and lead is None
    switches = _switches(fields, target, strict=strict)
    prompt = _chat(messages, tools, target, switches)
    thoughts = start_of(target.tokenizer, prompt)
    if strict and thoughts and (switches.get(THINKING) or thoughts == "prompt"):
        if thoughts == "answer":  # the answer must begin with them
            prompt += target.tokenizer.encode(BEGIN, special=False)
        lead, thoughts = LEAD, "prompt"
        asked = asked[0], after_thoughts(asked[1])
    top = _top_logprobs(fields, "top_logprobs", config)
    if not fields.flag("logprobs"):
        if top:
            raise BadRequest("top_logprobs needs logprobs to be true", "top_logprobs")
        top = None
    grammar = _grammar(fields, asked, grammars, lead=lead, tools=tools)
    own = dict(grammar=grammar, thoughts=thoughts, tools=tools)
    return _asked(fields, [prompt], target, config, default=None, top=top, **own)


def _switches(fields: Fields, target: Target, *, strict: bool) -> dict[str, bool]:
    """The switches of the chat template that are set.

    Args: strict: the answer has a given format; the model thinks before it only if asked to.
    """
    options = fields.part("chat_template_kwargs", set(SWITCHES))
    given = {name: options.flag(name, None) for name in SWITCHES}
    switches = {name: value for name, value in given.items() if value is not None}
    for name in switches:
        if not target.tokenizer.template_has(name):
            raise BadRequest(
                f"this model's chat template has no switch {name!r}; leave it out",
                f"chat_template_kwargs.{name}",
            )
    if strict and target.tokenizer.switches_thinking:
        switches.setdefault(THINKING, False)
    return switches


def _chat(
    messages: list[dict[str, Any]],
    tools: Tools | None,
    target: Target,
    switches: dict[str, bool],
) -> list[int]:
    """Token ids of a chat."""
    tokenizer = target.tokenizer
    _check_tools(messages, tools, tokenizer)
    if any(THOUGHTS in m for m in messages) and not tokenizer.template_has(THOUGHTS):
        if not tokenizer.template_has(CLOSE):
            message = f"this model's chat template has no {THOUGHTS}; leave it out"
            raise BadRequest(message, "messages")
        messages = [thoughts_in_content(m) for m in messages]
    try:
        offered = tools.offered if tools else ()
        return tokenizer.chat(messages, tools=offered, **switches)
    except (ValueError, TemplateError) as error:  # templates refuse orders of roles
        raise BadRequest(str(error), "messages") from error


def _check_tools(
    messages: list[dict[str, Any]], tools: Tools | None, tokenizer: Tokenizer
) -> None:
    """Raises BadRequest if the chat template does not take tools, or teaches no calls that
    would be found."""
    calls = any("tool_calls" in m or m["role"] == "tool" for m in messages)
    if (calls or tools) and not tokenizer.takes_tools:
        field = "tools" if tools else "messages"
        raise BadRequest("this model's chat template does not support tools", field)
    if tools and tools.free and not tokenizer.template_has(OPEN):
        raise BadRequest(
            f"this model's chat template teaches tool calls without {OPEN}, which this server "
            "does not find; set tool_choice to 'required' or to one of the tools",
            "tool_choice",
        )


def _asked(
    fields: Fields,
    prompts: list[list[int]],
    target: Target,
    config: EngineConfig,
    *,
    default: int | None,
    top: int | None,
    grammar: Grammar | None,
    echo: Sequence[str] | None = None,
    **own: Any,
) -> Asked:
    """Args: own: fields of `Asked` that only chats have."""
    longest, room = max(map(len, prompts)), config.room
    left = room - longest
    if left < 1:
        field = "prompt" if fields.get("messages", None) is None else "messages"
        raise _too_long(
            room, f"the prompt has {longest} and leaves none for an answer; shorten it", field
        )
    choices = fields.integer("n", 1)
    if not 1 <= choices <= MAX_CHOICES:
        raise BadRequest(f"n is {choices}; expected 1 … {MAX_CHOICES}", "n")
    usage = fields.part("stream_options", {"include_usage", "continuous_usage_stats"})
    seed = fields.integer("seed", -1)
    if seed == -1:
        seed = secrets.randbelow(2**32)
    new_tokens = _longest(fields, left, room, default, least=1 if echo is None else 0)
    sampling = _sampling(fields, target)
    if sampling.min_tokens > new_tokens:
        raise BadRequest(
            f"min_tokens is {sampling.min_tokens}; expected at most the maximum of new tokens, "
            f"{new_tokens}",
            "min_tokens",
        )
    request = Request(
        (),
        max(new_tokens, 1),
        sampling,
        cache_salt=fields.text("cache_salt"),
        logprobs=top,
        prompt_logprobs=echo is not None and top is not None,
        grammar=grammar,
    )
    return Asked(
        requests=tuple(
            # Seeds of further choices lie beyond the 64 bits of users' seeds.
            dataclasses.replace(request, prompt=tuple(prompt), seed=seed + (choice << 64))
            for prompt in prompts
            for choice in range(choices)
        ),
        prompt_tokens=sum(map(len, prompts)),
        stops=_stops(fields),
        stream=fields.flag("stream"),
        include_usage=usage.flag("include_usage"),
        usage_in_every_chunk=usage.flag("continuous_usage_stats"),
        echo=tuple(echo or [""] * len(prompts)),
        silent=not new_tokens,
        **own,
    )


def _too_long(room: int, problem: str, field: str) -> BadRequest:
    """The code and the first words are OpenAI's, by which clients know to shorten a chat."""
    message = f"this model's maximum context length is {room} tokens; {problem}"
    return BadRequest(message, field, code="context_length_exceeded")


def _longest(fields: Fields, left: int, room: int, default: int | None, least: int) -> int:
    """Maximum new tokens; -1 asks for as many as fit.

    Args: left: tokens that fit after the prompt; room: tokens of prompt and answer.
    """
    longest = left if default is None else min(default, left)
    expected = f"{least} … {left}"
    for name in sorted(LENGTHS, reverse=True):  # the newer name wins
        longest = fields.integer(name, longest)
        if longest == -1:
            longest = left
        if longest > left:
            found = f"the prompt has {room - left}, and {name} is {longest}"
            raise _too_long(room, f"{found}; expected {expected}, or a shorter prompt", name)
        if longest < least:
            raise BadRequest(f"{name} is {longest}; expected {expected}", name)
    return longest


def _sampling(fields: Fields, target: Target) -> Sampling:
    options = {
        "temperature": fields.number("temperature", 1.0),
        "top_k": max(fields.integer("top_k", 0), 0),  # -1 keeps all, as in vLLM
        "top_p": fields.number("top_p", 1.0),
        "min_p": fields.number("min_p", 0.0),
        "stop_ids": _stop_ids(fields, target),
        "min_tokens": fields.integer("min_tokens", 0),
        "logit_bias": _logit_bias(fields),
        "presence_penalty": fields.number("presence_penalty", 0.0),
        "frequency_penalty": fields.number("frequency_penalty", 0.0),
        "repetition_penalty": fields.number("repetition_penalty", 1.0),
    }
    for name, value in options.items():
        try:
            check_tokens(Sampling(**{name: value}), target.config)
        except ValueError as error:
            asked_for = "stop_token_ids" if name == "stop_ids" else name
            raise BadRequest(str(error).removeprefix("Sampling."), asked_for) from error
    return Sampling(**options)


def _logit_bias(fields: Fields) -> dict[int, float]:
    given = fields.get("logit_bias", {})
    if not isinstance(given, dict):
        raise BadRequest(f"logit_bias must be a JSON object, not {given!r}", "logit_bias")
    biases = {}
    for token, bias in given.items():
        if not (token.isascii() and token.isdecimal() and is_number(bias)):
            raise BadRequest(
                f"logit_bias has {token!r}: {bias!r}; expected numbers by token id",
                "logit_bias",
            )
        biases[int(token)] = bias
    return biases


def _stop_ids(fields: Fields, target: Target) -> tuple[int, ...]:
    more = fields.get("stop_token_ids", [])
    if not isinstance(more, list) or not all(type(token) is int for token in more):
        raise BadRequest("stop_token_ids must be a list of token ids", "stop_token_ids")
    ends = () if fields.flag("ignore_eos") else target.config.eos_token_ids
    return tuple(dict.fromkeys((*ends, *more)))


def _stops(fields: Fields) -> tuple[str, ...]:
    stops = fields.get("stop", [])
    stops = [stops] if isinstance(stops, str) else stops
    good = isinstance(stops, list) and all(isinstance(s, str) and s for s in stops)
    if not good or len(stops) > MAX_STOPS or any(len(s) > MAX_STOP_CHARACTERS for s in stops):
        raise BadRequest(
            f"stop must be up to {MAX_STOPS} texts of 1 … {MAX_STOP_CHARACTERS} characters",
            "stop",
        )
    return tuple(stops)
