"""What litellm gets from a server: `python with_litellm.py URL` prints JSON.

Runs in an environment of its own. litellm is imported inside `main`: pytest imports this file
where it is missing.
"""

import json
import sys

TURN = [{"role": "user", "content": "hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA}}


def main(url: str) -> dict:
    import litellm

    def ask(**options):
        options = dict(messages=TURN, temperature=0.0, max_tokens=150) | options
        return litellm.completion(
            model="openai/tiny", api_base=url, api_key="none", num_retries=0, **options
        )

    whole = ask()
    parts = [part.choices[0].delta.content or "" for part in ask(stream=True)]
    schema = ask(response_format=FORMAT).choices[0]
    tools = ask(tools=[TOOL], tool_choice="required").choices[0]
    (call,) = tools.message.tool_calls
    text = litellm.text_completion(
        model="text-completion-openai/tiny",
        prompt="hello",
        max_tokens=8,
        temperature=0.0,
        api_base=url,
        api_key="none",
    )
    return {
        "whole": whole.choices[0].message.content,
        "tokens": whole.usage.completion_tokens,
        "streamed": "".join(parts),
        "schema": json.loads(schema.message.content),
        "call": [call.function.name, json.loads(call.function.arguments)],
        "finish": tools.finish_reason,
        "text": text.choices[0].text,
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
