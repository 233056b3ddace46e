"""Bodies that public clients send: what changes nothing passes, what they ask for is done."""

import json
import pathlib
import re
import threading
import time

import pytest

from jaxspec.decoding.sampling import Sampling
from jaxspec.serving import fields, protocol
from jaxspec.serving.connections import Limits
from jaxspec.serving.formats import KINDS
from jaxspec.serving.messages import read_messages
from jaxspec.serving.requests import Request
from tests.serving import servers
from tests.serving.engines import alone

PROMPT = (1, 2, 3)
TURN = [{"role": "user", "content": "abc"}]


@pytest.fixture(scope="module")
def port():
    with servers.serve(limits=Limits()) as (port, _):
        yield port


def ask(port, body, path="/v1/completions"):
    status, text = servers.post(port, path, json.dumps(body).encode())
    assert status == 200, text
    return text


def answer(port, **body) -> str:
    return json.loads(ask(port, {"prompt": list(PROMPT), **body}))["choices"][0]["text"]


def expected(seed=0, max_new_tokens=12, **sampling) -> str:
    request = Request(PROMPT, max_new_tokens, Sampling(**sampling), seed)
    return servers.tokenizer().decode(alone(request))


VLLM_BENCH = {
    "model": "tiny",
    "prompt": "abc",
    "repetition_penalty": 1.0,
    "temperature": 0.0,
    "max_tokens": 12,
    "logprobs": None,
    "ignore_eos": True,
    "stream": True,
    "stream_options": {"include_usage": True},
}
GUIDELLM = {
    "model": "org/tiny",
    "messages": [{"role": "user", "content": [{"type": "text", "text": "abc"}]}],
    "stream": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    "max_completion_tokens": 12,
    "stop": None,
    "ignore_eos": True,
    "temperature": 0,
}
LITELLM = {
    "model": "tiny",
    "messages": [
        {"role": "developer", "content": "ab"},
        {"role": "assistant", "content": "c", "tool_calls": None, "refusal": None},
        {"role": "user", "content": "a", "name": "somebody"},
    ],
    "n": 1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0,
    "logit_bias": {},
    "user": "somebody",
    "response_format": {"type": "text"},
    "tools": [],
    "tool_choice": "auto",
    "logprobs": False,
    "top_logprobs": 0,
    "seed": None,
    "max_tokens": -1,
    "extra": None,
}
LM_EVAL = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "abc", "type": "text"}],
    "max_tokens": 4,
    "temperature": 0,
    "stop": ["\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```", "<file_sep>", "</s>"],
    "seed": 1234,
}
AGENT = {"model": "tiny", "messages": TURN, "store": False, "metadata": {"a": "b"}, "seed": -1}


@pytest.mark.parametrize("body", [VLLM_BENCH, GUIDELLM, LITELLM, LM_EVAL, AGENT])
def test_bodies_of_public_clients(port, body):
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    text = ask(port, body, path)
    if not body.get("stream"):
        assert json.loads(text)["usage"]["completion_tokens"] >= 1
        return
    events = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
    assert text.endswith("data: [DONE]\n\n")
    assert events[-1]["usage"]["completion_tokens"] == 12 and not events[-1]["choices"]
    told = [e["usage"]["completion_tokens"] for e in events if e["choices"] and "usage" in e]
    every = body["stream_options"].get("continuous_usage_stats")
    assert told == sorted(told) and len(told) == (len(events) - 1 if every else 0)


def test_messages_of_assistants_that_said_nothing():
    call = {"id": "c", "type": "function", "function": {"name": "clock", "arguments": ""}}
    told = [{"role": "assistant", "content": None}, {"role": "assistant", "tool_calls": [call]}]
    empty, called = read_messages(told)
    assert empty == {"role": "assistant", "content": ""}
    assert called["tool_calls"][0]["function"] == {"name": "clock", "arguments": {}}
    with pytest.raises(fields.BadRequest, match=r"messages\[0\] must have text"):
        read_messages([{"role": "user", "content": None}])


def test_what_clients_add_to_messages_has_no_effect():
    """Fields of the openai package after `parse`, of litellm, OpenRouter and agents."""
    own = {"name": "clock", "arguments": "{}"}
    call = {"id": "c", "type": "function", "function": own | {"parsed_arguments": {"a": 1}}}
    added = {
        "parsed": {"city": "Rome"},
        "reasoning_details": [{"type": "reasoning.text", "text": "so"}],
        "provider_specific_fields": {"refusal": None},
        "cache_control": {"type": "ephemeral"},
    }
    part = {"type": "text", "text": "ab", "cache_control": {"type": "ephemeral"}}
    told = [
        {"role": "user", "content": [part], "cache_control": {"type": "ephemeral"}},
        {"role": "assistant", "content": "", "tool_calls": [call]} | added,
    ]
    function = {"name": "clock", "arguments": {}}
    assert read_messages(told) == [
        {"role": "user", "content": "ab"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": function}],
        },
    ]


@pytest.mark.parametrize("seed", [0, 2**32, 2**40, 2**63, -2])
def test_seeds_of_any_size(port, seed):
    found = answer(port, max_tokens=12, temperature=0.9, seed=seed)
    assert found == expected(seed, temperature=0.9)


def test_options_without_a_bound(port):
    found = answer(port, max_tokens=12, temperature=0.9, seed=3, top_k=2**40, min_p=0)
    assert found == expected(3, temperature=0.9)
    assert answer(port, max_tokens=12, temperature=1, top_p=1e-300) == expected()
    found = answer(port, max_tokens=12, temperature=1e300, seed=3)
    assert found == expected(3, temperature=1e300)


def test_stop_token_ids_come_beside_the_targets_own(port):
    whole = alone(Request(PROMPT, 12, Sampling(stop_ids=())))
    stop = whole[4]
    body = dict(prompt=list(PROMPT), max_tokens=12, temperature=0, stop_token_ids=[stop])
    done = json.loads(ask(port, body))
    assert done["choices"][0]["finish_reason"] == "stop"
    assert done["usage"]["completion_tokens"] == whole.index(stop) + 1


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_and_choices(port, stream):
    """Every choice is what it would be alone; that of number i has the seed plus i * 2**64."""
    body = dict(prompt=[[1, 2, 3], [4, 5]], n=2, max_tokens=12, temperature=0.9, seed=5)
    usage = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    text = ask(port, body | usage)
    if stream:
        lines = [line for line in text.split("\n\n") if line.startswith("data: {")]
        events = [json.loads(line.removeprefix("data: ")) for line in lines]
    else:
        events = [json.loads(text)]
    texts = [""] * 4
    for event in events:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    sampling, decode = Sampling(temperature=0.9), servers.tokenizer().decode
    assert texts == [
        decode(alone(Request(prompt, 12, sampling, seed)))
        for prompt in ((1, 2, 3), (4, 5))
        for seed in (5, 5 + 2**64)
    ]
    assert len(set(texts)) == 4
    told = events[-1]["usage"]
    assert (told["prompt_tokens"], told["completion_tokens"]) == (5, 48)
    reasons = [c["finish_reason"] for e in events for c in e["choices"] if c["finish_reason"]]
    assert reasons == ["length"] * 4


def test_a_chat_goes_on_where_its_last_prompt_ended(port):
    """37 tokens of rules are two chunks of 16 and five more."""
    rules = [{"role": "system", "content": "abcabcd" * 5 + "ab"}]
    before = servers.sample(port, "jaxspec_prompt_tokens_cached_total")

    def cached(salt, messages, **options):
        body = dict(messages=rules + messages, max_tokens=4, temperature=0, cache_salt=salt)
        text = ask(port, body | options, "/v1/chat/completions")
        return json.loads(text)["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached("one", TURN) == 0
    assert cached("one", TURN, n=2) == 32
    assert cached("two", TURN) == 0
    assert servers.sample(port, "jaxspec_prompt_tokens_cached_total") - before == 32
    assert servers.sample(port, "jaxspec_prefix_pages_used") >= 4


def test_choices_are_taken_all_or_none():
    with servers.serve(limits=Limits(), queue=3, slots=1) as (port, runner):
        step, runner.engine.step = runner.engine.step, lambda: []  # nothing leaves the queue
        body = json.dumps({"prompt": "a", "max_tokens": 2, "n": 2}).encode()
        first = threading.Thread(target=servers.post, args=(port, "/v1/completions", body))
        first.start()
        while runner.engine.waiting < 2:
            time.sleep(0.01)
        assert servers.post(port, "/v1/completions", body)[0] == 429
        assert runner.tickets == 2
        runner.engine.step = step
        first.join()
        servers.await_idle(runner)


def test_one_model_under_its_names(port):
    for name in ("tiny", "org/tiny"):
        status, text = servers.get(port, f"/v1/models/{name}")
        assert status == 200 and json.loads(text)["id"] == name
        assert json.loads(text)["max_model_len"] == 60
    status, text = servers.get(port, "/v1/models/other")
    assert status == 404 and "model 'other' is not here" in json.loads(text)["error"]["message"]


def test_it_is_ready_until_its_queue_is_full():
    with servers.serve(limits=Limits(), queue=1, slots=1) as (port, runner):
        assert servers.get(port, "/ready") == (200, '{"status":"ready"}')
        runner.engine.config.__dict__["queue"] = 0  # as many wait as may
        assert servers.get(port, "/ready") == (503, '{"status":"full"}')
        assert servers.get(port, "/health")[0] == 200


@pytest.mark.parametrize(
    "sampling",
    [
        dict(repetition_penalty=1.3, temperature=0.0),
        dict(presence_penalty=0.7, frequency_penalty=-0.3, temperature=0.9),
        dict(logit_bias={"3": 5, "4": -100.0}, temperature=0.0),
        dict(min_tokens=12, stop_token_ids=list(range(1, 6)), temperature=0.0),
    ],
)
def test_penalties_biases_and_least_lengths(port, sampling):
    own = dict(sampling)
    if "logit_bias" in own:
        own["logit_bias"] = {int(token): bias for token, bias in own["logit_bias"].items()}
    stops = own.pop("stop_token_ids", [])
    request = Request(PROMPT, 14, Sampling(**own, stop_ids=tuple(stops)), 5)
    found = answer(port, max_tokens=14, seed=5, **sampling)
    assert found == servers.tokenizer().decode(alone(request))


def test_stop_texts_wait_for_the_least_length(port):
    whole = expected(max_new_tokens=12)
    cut = answer(port, max_tokens=12, temperature=0, stop=whole[0], min_tokens=6)
    assert len(cut) >= 6 and whole.startswith(cut)


def test_the_guide_names_every_field():
    guide = (pathlib.Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    named = {"model", *re.findall(r"`([a-z_]+)(?:\.[a-z_]+)?`", guide)}
    taken = protocol.CHAT | {"prompt", "echo"} | KINDS
    neutral = {*fields.IGNORED, *fields.NEUTRAL, *fields.NEUTRAL_IN_MESSAGES}
    assert taken | neutral | fields.IGNORED_IN_MESSAGES <= named
