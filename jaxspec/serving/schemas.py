"""What a JSON schema allows, as far as its keywords say it plainly."""

from __future__ import annotations

import urllib.parse
from typing import Any

TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "null": (type(None),),
    "boolean": (bool,),
    "number": (int, float),
    "integer": (int,),
    "array": (list,),
    "object": (dict,),
}
# Keywords that allow or forbid no value.
NOTES = {
    "title", "description", "default", "examples", "example", "deprecated", "readOnly",
    "writeOnly", "nullable", "$comment", "$schema", "$id", "$defs", "definitions",
}  # fmt: skip


def is_of(value: Any, kind: str) -> bool:
    """Whether a JSON value has a type of JSON schema.

    >>> is_of(1, "number"), is_of(True, "number"), is_of(None, "null")
    (True, False, True)
    """
    return isinstance(value, TYPES.get(kind, ())) and (
        kind == "boolean" or not isinstance(value, bool)
    )


def keywords(schema: dict) -> set[str]:
    """The keywords that may allow or forbid values."""
    return schema.keys() - NOTES


def resolved(schema: dict, root: dict) -> dict:
    """The schema behind local references, together with the keywords beside them.

    A schema that keeps its `$ref` could not be resolved. Args: root: what `#` refers to.
    """
    seen = set()
    while "$ref" in schema and (ref := str(schema["$ref"])) not in seen:
        seen.add(ref)
        target = _at(ref, root)
        beside = {key: value for key, value in schema.items() if key != "$ref"}
        if not isinstance(target, dict) or any(
            key in target and target[key] != beside[key] for key in keywords(beside)
        ):
            break
        schema = target | beside
    return schema


def _at(ref: str, root: dict) -> Any:
    """What a reference such as `#/$defs/City` points to; None if it is not local."""
    found: Any = root if ref.startswith("#") else None
    for part in urllib.parse.unquote(ref[1:]).split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list):
            found = {str(i): each for i, each in enumerate(found)}
        found = found.get(key) if isinstance(found, dict) else None
    return found


def alternatives(schema: Any, root: dict) -> list[dict]:
    """Schemas of at most one type each; a value must match one of them.

    They are behind references, `anyOf`, `oneOf`, an `allOf` of one, and lists of types. There
    are none if one of them is not a valid schema.
    """
    found, waiting, seen = [], [schema], set()
    while waiting:
        each = waiting.pop()
        each = {} if each is True else each
        if not isinstance(each, dict):
            return []
        if keywords(each) == {"$ref"}:  # once: more of the same adds nothing
            if (ref := str(each["$ref"])) in seen:
                continue
            seen.add(ref)
        each = resolved(each, root)
        if (parts := _parts(each)) is not None:
            waiting += parts
        elif isinstance(each.get("type", ""), str):
            found.append(each)
        else:
            return []
    return found


def _parts(schema: dict) -> list | None:
    """The schemas that one only stands for; None if it is one of its own."""
    for word in ("anyOf", "oneOf", "allOf"):
        parts = schema.get(word)
        if keywords(schema) == {word} and isinstance(parts, list):
            return None if word == "allOf" and len(parts) != 1 else parts
    kinds = schema.get("type")
    if not keywords(schema):
        kinds = [kind for kind in TYPES if kind != "integer"]
    if isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds):
        return [schema | {"type": kind} for kind in kinds]
    return None
