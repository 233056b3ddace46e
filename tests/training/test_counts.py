"""`examples/shipped_drafter/counts.py`: what the target wrote of its own questions."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples/shipped_drafter/counts.py"
PROMPTS = {
    1: {"turns": ["What is 2 + 2?"]},
    2: {"opening": " Find all real", "ending": "\nThink."},
    3: {"opening": "Why"},
}


class Words:
    def encode(self, text: str) -> list[str]:
        return text.split()


@pytest.fixture(scope="module")
def question_tokens():
    spec = importlib.util.spec_from_file_location("counts", SCRIPT)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *rows: module.question_tokens(Words(), [row(*r) for r in rows], PROMPTS)


def row(id: int, question: str) -> dict:
    return {"id": id, "conversations": [{"role": "user", "content": question}]}


def test_openings_endings_and_given_questions_do_not_count(question_tokens):
    own = (2, "Find all real roots of x.\nThink."), (3, "Why not now?")
    assert question_tokens((1, "What is 2 + 2?")) == 0
    assert question_tokens(own[0]) == 3 and question_tokens(own[1]) == 2
    assert question_tokens(*own, (1, "What is 2 + 2?")) == 5


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ((3, "How?"), "does not begin with 'Why'"),
        ((2, "Find all real roots."), "does not begin with 'Find all real'"),
        ((9, "Why?"), "conversation 9 answers none"),
    ],
)
def test_questions_of_other_prompts_are_refused(question_tokens, found, message):
    with pytest.raises(ValueError, match=message):
        question_tokens(found)
