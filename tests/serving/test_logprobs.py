"""Log-probabilities as clients get them: the `openai` client, lm-evaluation-harness's body."""

import itertools
import json
import math

import jax
import numpy as np
import openai
import pytest

from jaxspec.decoding.sampling import Sampling
from jaxspec.decoding.schedule import Fixed
from jaxspec.serving.connections import Limits
from jaxspec.serving.requests import Request
from tests import tiny
from tests.serving import engines, servers
from tests.serving.engines import alone

SAMPLED = Sampling(temperature=0.9)
TURN = [{"role": "user", "content": "abcab"}]


@pytest.fixture(scope="module")
def port():
    with servers.serve(limits=Limits()) as (port, _):
        yield port


@pytest.fixture(scope="module")
def client(port):
    url = f"http://127.0.0.1:{port}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as made:
        yield made


def laws(tokens) -> np.ndarray:
    """[T - 1, V]: the law of every token but the first."""
    return np.array(jax.nn.log_softmax(tiny.logits(tiny.target(), list(tokens))))[:-1]


def check(found, tokens, law, top):
    """What an engine gives out for tokens of these laws."""
    assert [one.token for one in found] == list(tokens)
    own = law[np.arange(len(tokens)), list(tokens)]
    np.testing.assert_allclose([one.logprob for one in found], own, atol=1e-4)
    for one, row in zip(found, law, strict=True):
        assert len(one.top) == top
        np.testing.assert_allclose([x for _, x in one.top], -np.sort(-row)[:top], atol=1e-4)


@pytest.mark.slow
def test_of_a_crowded_engine():
    """Beside others, packed and in trees; the tokens are those of requests that do not ask."""
    engine = engines.engine(schedule=Fixed(), slots=2, budget=4)
    asked = []
    for i, request in enumerate(engines.requests(8)):
        options = [{}, dict(logprobs=0), dict(logprobs=3), dict(logprobs=5, prompt_logprobs=1)]
        asked.append(Request(**(vars(request) | options[i % 4])))
    ids = [engine.submit(request) for request in asked]
    updates = engines.drain(engine)
    for id, request in zip(ids, asked, strict=True):
        plain = Request(**(vars(request) | dict(logprobs=None, prompt_logprobs=False)))
        tokens = engines.tokens(updates[id])
        assert tokens == alone(plain)
        found = [one for update in updates[id] for one in update.logprobs]
        prompt = updates[id][0].prompt_logprobs
        if request.logprobs is None:
            assert not found and not prompt
            continue
        text = (*request.prompt, *tokens)
        law = laws(text)
        check(found, tokens, law[len(request.prompt) - 1 :], request.logprobs)
        if request.prompt_logprobs:
            assert prompt[0].token == text[0] and prompt[0].logprob is None
            check(prompt[1:], request.prompt[1:], law[: len(request.prompt) - 1], 5)


@pytest.mark.parametrize("stream", [False, True])
def test_chat(client, stream):
    options = dict(model="tiny", max_tokens=10, temperature=0.9, seed=4)
    done = client.chat.completions.create(
        messages=TURN, logprobs=True, top_logprobs=2, stream=stream, **options
    )
    events = list(done) if stream else [done]
    content = [x for e in events for c in e.choices if c.logprobs for x in c.logprobs.content]
    prompt = servers.tokenizer().encode("abcab")
    tokens = alone(Request(tuple(prompt), 10, SAMPLED, 4))
    law = laws((*prompt, *tokens))[len(prompt) - 1 :]
    own = law[np.arange(len(tokens)), list(tokens)]
    np.testing.assert_allclose([x.logprob for x in content], own, atol=1e-4)
    raw = [servers.tokenizer().token_bytes(token) for token in tokens]
    assert [bytes(x.bytes) for x in content] == raw
    for x, row in zip(content, law, strict=True):
        best = [y.logprob for y in x.top_logprobs]
        np.testing.assert_allclose(best, -np.sort(-row)[:2], atol=1e-4)


@pytest.mark.parametrize("stream", [False, True])
def test_completions_with_an_echo(client, stream):
    done = client.completions.create(
        model="tiny",
        prompt=["abca", [1, 2, 3]],
        max_tokens=6,
        temperature=0,
        logprobs=2,
        echo=True,
        stream=stream,
    )
    events = list(done) if stream else [done]
    prompts = [servers.tokenizer().encode("abca"), [1, 2, 3]]
    for i, prompt in enumerate(prompts):
        choices = [c for e in events for c in e.choices if c.index == i]
        tokens = [*prompt, *alone(Request(tuple(prompt), 6))]
        assert "".join(c.text for c in choices) == servers.tokenizer().decode(tokens)
        logprobs = [c.logprobs for c in choices if c.logprobs]
        found = list(itertools.chain(*(x.token_logprobs for x in logprobs)))
        best = list(itertools.chain(*(x.top_logprobs for x in logprobs)))
        offsets = list(itertools.chain(*(x.text_offset for x in logprobs)))
        shown = list(itertools.chain(*(x.tokens for x in logprobs)))
        assert found[0] is None and best[0] is None
        law = laws(tokens)
        own = law[np.arange(len(tokens) - 1), tokens[1:]]
        np.testing.assert_allclose(found[1:], own, atol=1e-4)
        assert all(max(x.values()) == y for x, y in zip(best[-6:], found[-6:], strict=True))
        assert offsets[: len(prompt) + 1] == list(range(len(prompt) + 1))
        assert offsets == sorted(offsets) and len(offsets) == len(tokens)
        assert shown[: len(prompt)] == [servers.tokenizer().decode([t]) for t in prompt]


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_loglikelihoods_of_lm_evaluation_harness(port, max_tokens):
    """The body of its `local-completions`, and what it reads of the answer."""
    rows, context = [[1, 2, 3, 4, 1, 2], [5, 1, 4]], 2
    body = {
        "model": "tiny", "prompt": rows, "temperature": 0, "max_tokens": max_tokens,
        "logprobs": 1, "seed": 1234, "echo": True,
    }  # fmt: skip
    status, text = servers.post(port, "/v1/completions", json.dumps(body).encode())
    assert status == 200, text
    answer = json.loads(text)
    assert answer["usage"]["completion_tokens"] == max_tokens * 2
    for row, choice in zip(rows, answer["choices"], strict=True):
        end = len(row)
        own = choice["logprobs"]["token_logprobs"]
        assert len(own) == end + max_tokens
        law = laws(row)[context - 1 :]
        expected = law[np.arange(end - context), row[context:]].sum()
        assert math.isclose(sum(own[context:end]), expected, abs_tol=1e-3)
        best = choice["logprobs"]["top_logprobs"][context:end]
        greedy = [x == max(y.values()) for x, y in zip(own[context:end], best, strict=True)]
        assert greedy == (law.argmax(1) == row[context:]).tolist()


def test_a_stop_text_ends_the_log_probabilities(client):
    prompt, decode = servers.tokenizer().encode("abc"), servers.tokenizer().decode
    tokens = alone(Request(tuple(prompt), 30, Sampling(1.5), 1))
    stop = decode(tokens)[5:7]
    done = client.completions.create(
        model="tiny", prompt="abc", max_tokens=30, temperature=1.5, seed=1, stop=stop,
        logprobs=0,
    )  # fmt: skip
    (choice,) = done.choices
    assert choice.text == decode(tokens).partition(stop)[0]
    taken = next(n for n in range(30) if stop in decode(tokens[:n]))
    assert len(choice.logprobs.tokens) == done.usage.completion_tokens == taken


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(logprobs=6), "logprobs is 6; expected 0 … 5 here"),
        (dict(prompt_logprobs=True), "prompt_logprobs needs logprobs"),
    ],
)
def test_requests_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Request((1,), 5, **options).check(tiny.QWEN3, 60, 5)
    with pytest.raises(ValueError, match="keeps no log-probabilities: its top_logprobs is 0"):
        Request((1,), 5, logprobs=0).check(tiny.QWEN3, 60, 0)
