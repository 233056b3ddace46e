"""From conversations to tokens and what the target wrote of them."""

import pytest

from jaxspec.data.conversations import encode


class Words:
    """A backend whose tokens are the words between blanks."""

    eos_token_id = 1

    def __init__(self, chat_template):
        self.chat_template, self.words = chat_template, ["", "<end>"]

    def apply_chat_template(
        self,
        messages,
        *,
        add_generation_prompt=False,
        return_dict,
        return_assistant_tokens_mask=False,
        **options,
    ):
        import jinja2

        def render(messages, ask):
            text = self.chat_template.replace("{% generation %}", "").replace(
                "{% endgeneration %}", ""
            )
            return jinja2.Template(text).render(
                messages=messages, add_generation_prompt=ask, **options
            )

        ids = [self._id(word) for word in render(messages, add_generation_prompt).split()]
        if return_assistant_tokens_mask:
            answers = {m["content"] for m in messages if m["role"] == "assistant"}
            mask = [int(self.words[i] in answers) for i in ids]
            return {"input_ids": ids, "assistant_masks": mask}
        return ids

    def decode(self, ids, **options):
        return " ".join(self.words[i] for i in ids)

    def _id(self, word):
        if word not in self.words:
            self.words.append(word)
        return self.words.index(word)


def tokenizer(template):
    from jaxspec.tokenizer import Tokenizer

    return Tokenizer(Words(template))


PLAIN = (
    "{% for m in messages %} {{ m.role }} {{ m.content }} <end> nl {% endfor %}"
    "{% if add_generation_prompt %} assistant {% endif %}"
)
# Only the last answer keeps its thoughts.
FORGETFUL = (
    "{% for m in messages %} {{ m.role }}"
    " {{ m.content if loop.last else m.content.replace('thought ', '') }} <end> nl"
    " {% endfor %}"
    "{% if add_generation_prompt %} assistant {% endif %}"
)
TALK = [
    {"role": "user", "content": "a b"},
    {"role": "assistant", "content": "c d"},
    {"role": "user", "content": "e"},
    {"role": "assistant", "content": "f"},
]


def shown(tokenizer, example):
    """Words, those of the target in capitals."""
    words = [tokenizer.decode([token]) for token in example.tokens]
    return " ".join(
        word.upper() if mine else word
        for word, mine in zip(words, example.supervised, strict=True)
    )


def test_answers_are_what_the_template_adds_to_their_prompts():
    t = tokenizer(PLAIN)
    (example,) = encode(t, TALK)
    assert shown(t, example) == (
        "user a b <end> nl assistant C D <END> nl user e <end> nl assistant F <END>"
    )


def test_an_answer_cut_short_has_no_supervised_end():
    t = tokenizer(PLAIN)
    (example,) = encode(t, TALK[:2], finished=False)
    assert shown(t, example) == "user a b <end> nl assistant C D"


def test_answers_rendered_differently_later_are_sequences_of_their_own():
    t = tokenizer(FORGETFUL)
    thoughts = [{"role": x["role"], "content": f"thought {x['content']}"} for x in TALK]
    first, second = encode(t, [TALK[0], thoughts[1], TALK[2], thoughts[3]])
    assert shown(t, first) == "user a b <end> nl assistant THOUGHT C D <END>"
    assert shown(t, second) == (
        "user a b <end> nl assistant c d <end> nl user e <end> nl assistant THOUGHT F <END>"
    )


def test_marks_of_the_template_are_used():
    t = tokenizer(PLAIN + "{% generation %}{% endgeneration %}")
    (example,) = encode(t, [TALK[0], {"role": "assistant", "content": "c"}])
    assert shown(t, example) == "user a b <end> nl assistant C <end> nl"


def test_a_conversation_without_an_answer_is_refused():
    with pytest.raises(ValueError, match="no message of the role 'assistant'"):
        encode(tokenizer(PLAIN), TALK[:1])


def test_a_template_that_puts_the_answer_elsewhere_is_refused():
    t = tokenizer("{% if add_generation_prompt %} ask {% endif %} {{ messages[0].content }}")
    with pytest.raises(ValueError, match="message 1: the chat template does not render"):
        encode(t, TALK)


def written(tokenizer, example) -> str:
    """What is trained on, special tokens too."""
    ids = example.tokens[example.supervised].tolist()
    return tokenizer.fast.decode(ids, skip_special_tokens=False)


@pytest.mark.real
def test_the_small_targets_own_template(smollm2_path):
    from jaxspec import checkpoints

    t = checkpoints.load_tokenizer(smollm2_path)
    (example,) = encode(t, TALK)
    assert written(t, example) == "c d<|im_end|>f<|im_end|>"


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (PLAIN.replace("{{ m.content }}", "{{ m.content | upper }}"), "'C D' for 'c d'"),
        (PLAIN.replace("<end>", "!"), "'c d ! nl' for 'c d'"),
        (PLAIN.replace("{{ m.content }}", "<end> {{ m.content }}"), "'' for 'c d'"),
        (PLAIN.replace("{{ m.content }}", "{{ m.content[2:] }}"), "'d' for 'c d'"),
    ],
    ids=["other", "more", "ends early", "less"],
)
def test_a_rendering_that_is_not_the_answer_is_refused(template, found):
    with pytest.raises(ValueError, match="message 1: the chat template renders .*" + found):
        encode(tokenizer(template), TALK[:2])


@pytest.mark.parametrize("answer", ["c", ""])
def test_marks_of_an_answer_cut_short(answer):
    """The end of the first answer is no end of the second."""
    t = tokenizer(PLAIN + "{% generation %}{% endgeneration %}")
    messages = [TALK[0], {"role": "assistant", "content": "f"}, TALK[2]]
    (example,) = encode(
        t, [*messages, {"role": "assistant", "content": answer}], finished=False
    )
    shown_first = "user a b <end> nl assistant F"
    if answer:
        shown_first += " <end> nl user e <end> nl assistant C"
    assert shown(t, example).startswith(shown_first)
    assert example.supervised.sum() == 1 + len(answer)


@pytest.mark.parametrize("marks", ["", "{% generation %}{% endgeneration %}"])
def test_empty_answers(marks):
    """Of an answer cut before its first token nothing is known; an empty one is its end."""
    t = tokenizer(PLAIN + marks)
    messages = [TALK[0], {"role": "assistant", "content": ""}]
    assert encode(t, messages, finished=False) == []
    (example,) = encode(t, messages)
    assert example.supervised.sum() == (0 if marks else 1)


@pytest.mark.parametrize(
    ("answer", "finished", "thinking"),
    [
        ("<think>\nEasy: let me", False, True),
        ("<think>\nEasy.\n</think>", False, True),
        ("4", True, True),
        ("<think>\nEasy.\n</think>\n\n\n4", True, True),
        ("<think>\nA </think> ends it.\n</think>\n\n4", True, True),
        ("It ends with </think>, always.", True, False),
        ("One<|im_end|>two", True, False),
        ("One<|im_start|>two", True, False),
    ],
)
def test_what_qwen3s_template_renders_otherwise(qwen3, answer, finished, thinking):
    messages = [TALK[0], {"role": "assistant", "content": answer}]
    with pytest.raises(
        ValueError, match="message 1: the chat template (renders|does not render) the answer"
    ):
        encode(qwen3, messages, finished=finished, thinking=thinking)


@pytest.mark.parametrize(
    ("answer", "finished", "thinking"),
    [
        ("<think>\nEasy.\n</think>\n\n4", True, True),
        ("<think>\nEasy.\n</think>\n\n4 is", False, True),
        ("4", True, False),
        ("  4  \n", True, False),
        ("日本語 🎉", False, False),
    ],
)
def test_what_qwen3s_template_renders_as_it_was_written(qwen3, answer, finished, thinking):
    messages = [TALK[0], {"role": "assistant", "content": answer}]
    (example,) = encode(qwen3, messages, finished=finished, thinking=thinking)
    written = example.tokens[example.supervised].tolist()
    assert qwen3.decode(written) == answer
    assert (written[-1] == 151645) == finished
    prompt = qwen3.chat(messages[:1], thinking=thinking)
    assert example.tokens.tolist() == prompt + written


# Llama 2's puts blanks around every answer; those are its own, not the answer's.
BLANKS = "{% for m in messages %}{{ m.role }} {{ m.content | trim }} <|im_end|>{% endfor %}"


@pytest.mark.real
def test_blanks_that_a_template_puts_around_answers(smollm2_path):
    from jaxspec import checkpoints

    t = checkpoints.load_tokenizer(smollm2_path)
    t.chat_template = BLANKS + "{% if add_generation_prompt %}assistant{% endif %}"
    (example,) = encode(t, TALK[:2])
    assert written(t, example) == " c d <|im_end|>"
    spaced = [TALK[0], {"role": "assistant", "content": "  c d"}]
    with pytest.raises(ValueError, match=r"' c d ' for '   c d '"):
        encode(t, spaced)
