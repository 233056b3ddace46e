"""A tokenizer that fails, and a server that is told to end: answers end in order."""

import json
import threading
import time

import pytest
import tokenizers
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

from jaxspec.serving.connections import Limits
from jaxspec.tokenizer import Tokenizer
from tests.serving import servers
from tests.serving.servers import sample


class Faulty(Tokenizer):
    """Cannot decode three tokens or more."""

    def decode(self, ids):
        ids = list(ids)
        if len(ids) > 2:
            raise ValueError(f"the tokenizer cannot decode the ids {ids}")
        return super().decode(ids)


def faulty():
    return servers.tokenizer(Faulty)


@pytest.fixture(scope="module")
def port():
    with servers.serve(limits=Limits(), tokenizer=faulty) as (port, _):
        yield port


def ask(port, stream, max_tokens=12):
    body = dict(prompt=[1, 2], max_tokens=max_tokens, temperature=0, stream=stream)
    return servers.post(port, "/v1/completions", json.dumps(body).encode())


def test_a_decoding_fault_is_an_answer(port):
    """500 in JSON; in a stream the error is the last event, and it ends as others do."""
    before = sample(port, "jaxspec_requests_total", finish="error")
    status, text = ask(port, stream=False)
    assert status == 500
    error = json.loads(text)["error"]
    assert error["type"] == "server_error"
    assert "the tokenizer cannot decode the ids" in error["message"]
    status, text = ask(port, stream=True)
    assert status == 200 and text.endswith("data: [DONE]\n\n")
    assert "error" in json.loads(text.split("\n\n")[-3].removeprefix("data: "))
    assert sample(port, "jaxspec_requests_total", finish="error") - before == 2


def test_others_are_served_after_it(port):
    status, text = ask(port, stream=False, max_tokens=2)
    assert status == 200 and json.loads(text)["choices"][0]["finish_reason"] == "length"


def byte_fallback():
    """Llama 2's kind: what has no token of its own comes in bytes."""
    tokens = ["</s>", "▁a", "b", "<0x0A>", "<0xE2>", "<0x82>", "<0xAC>", "▁", "c", "<0xC3>"]
    tokens.append("<0xA9>")
    model = models.BPE({token: i for i, token in enumerate(tokens)}, [], byte_fallback=True)
    made = tokenizers.Tokenizer(model)
    steps = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=made))


def test_bytes_in_any_order_are_streamed_as_they_are_told_whole():
    with servers.serve(limits=Limits(), tokenizer=byte_fallback) as (port, _):
        pieces = 0
        for seed in range(20):
            body = dict(prompt=[1, 2], max_tokens=24, temperature=1.5, seed=seed, stop=["zz"])
            status, text = servers.post(port, "/v1/completions", json.dumps(body).encode())
            assert status == 200
            whole = json.loads(text)["choices"][0]["text"]
            data = json.dumps(body | {"stream": True}).encode()
            status, text = servers.post(port, "/v1/completions", data)
            assert status == 200 and text.endswith("data: [DONE]\n\n")
            events = [json.loads(e[6:]) for e in text.split("\n\n") if e.startswith("data: {")]
            assert "".join(event["choices"][0]["text"] for event in events) == whole
            pieces += len(events)
        assert pieces > 40  # not all at the end


@pytest.mark.parametrize(("seconds", "complete"), [(20, True), (0.2, False)])
def test_answers_may_end_after_the_signal(seconds, complete):
    """One that is not ended in time ends with an error event, not in the middle of one."""
    texts = []
    with servers.serve(limits=Limits(), drain_seconds=seconds) as (port, runner):
        step = runner.engine.step

        def slow():
            time.sleep(0.02)
            return step()

        runner.engine.step = slow
        body = dict(prompt=[1, 2], max_tokens=50, temperature=0, stream=True, ignore_eos=True)
        data = json.dumps(body).encode()
        thread = threading.Thread(
            target=lambda: texts.append(servers.post(port, "/v1/completions", data)[1])
        )
        thread.start()
        while not runner.engine.running:
            time.sleep(0.01)
    thread.join(10)
    (text,) = texts
    assert text.endswith("data: [DONE]\n\n")
    assert ("the engine has stopped: it was closed" in text) == (not complete)
    assert ('"finish_reason": "length"' in text) == complete
