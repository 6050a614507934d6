"""Values of a JSON schema, values that are none, and whether one is: the part of JSON Schema that the examples use."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import strategies as st

__all__ = ["broken", "holds", "values"]

Schema = dict[str, Any]
KNOWN = {
    "type",
    "enum",
    "anyOf",
    "minimum",
    "exclusiveMinimum",
    "maximum",
    "minLength",
    "minItems",
    "maxItems",
    "items",
} | {
    "properties",
    "required",
    "additionalProperties",
}
TYPES: dict[str, tuple[type, ...]] = {
    "array": (list,),
    "boolean": (bool,),
    "integer": (int,),
    "null": (type(None),),
    "number": (int, float),
    "object": (dict,),
    "string": (str,),
}

ANYTHING: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-2, 2)
    | st.floats()
    | st.text(st.characters(), max_size=4)
    | st.sampled_from(["\ud800", "\x00", "10", "none"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


def holds(schema: Schema, value: Any) -> bool:
    """Whether a value is one of the schema's; a truth value is no number, and 1.0 is no integer."""
    assert schema.keys() <= KNOWN, schema
    if "anyOf" in schema:
        return any(holds(each, value) for each in schema["anyOf"])
    if "enum" in schema:
        return any(type(each) is type(value) and each == value for each in schema["enum"])
    kinds = [schema["type"]] if isinstance(schema.get("type"), str) else schema.get("type")
    if kinds is None:
        return True
    named = [
        kind for kind in kinds if isinstance(value, TYPES[kind]) and isinstance(value, bool) == (kind == "boolean")
    ]
    return bool(named) and _within(schema, value)


def _within(schema: Schema, value: Any) -> bool:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
        return bool(math.isfinite(value) and low <= value <= high and value > schema.get("exclusiveMinimum", -math.inf))
    if isinstance(value, str):
        return len(value) >= schema.get("minLength", 0)
    if isinstance(value, list):
        fits = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", math.inf)
        return fits and all(holds(schema.get("items", {}), each) for each in value)
    if isinstance(value, dict):
        known: Schema = schema.get("properties", {})
        closed = schema.get("additionalProperties", True) is False
        return (
            value.keys() >= set(schema.get("required", ()))
            and (not closed or value.keys() <= known.keys())
            and all(holds(known[name], each) for name, each in value.items() if name in known)
        )
    return True


def values(schema: Schema) -> st.SearchStrategy[Any]:
    """Values of the schema, small ones: what a server does with them takes time."""
    if "anyOf" in schema:
        return st.one_of([values(each) for each in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kinds = (
        [schema["type"]] if isinstance(schema.get("type"), str) else schema.get("type", ["null", "integer", "string"])
    )
    return st.one_of([_of(kind, schema) for kind in kinds])


def _of(kind: str, schema: Schema) -> st.SearchStrategy[Any]:
    if kind == "array":
        least = schema.get("minItems", 0)
        return st.lists(values(schema.get("items", {})), min_size=least, max_size=least + 2)
    if kind == "object":
        known, required = schema.get("properties", {}), set(schema.get("required", ()))
        fixed = {name: values(each) for name, each in known.items() if name in required}
        optional = {name: values(each) for name, each in known.items() if name not in required}
        return st.fixed_dictionaries(fixed, optional=optional)
    if kind == "string":
        return st.text(min_size=schema.get("minLength", 0), max_size=8) | st.just("half of a character: \ud800")
    if kind == "integer":
        least = schema.get("minimum", -3)
        return st.integers(least, min(least + 2, schema.get("maximum", math.inf)))
    if kind == "number":
        low, high = schema.get("minimum", schema.get("exclusiveMinimum", -10.0)), schema.get("maximum", 1e308)
        inside = st.floats(low, high, exclude_min="exclusiveMinimum" in schema)
        return inside | st.just(1) | st.floats(max(low, 0.1), min(high, 2.0))
    return st.booleans() if kind == "boolean" else st.none()


def broken(schema: Schema) -> st.SearchStrategy[Any]:
    """Objects that are not quite of the schema: one option of another kind, missing, or not known."""

    @st.composite
    def draw_one(draw: st.DrawFn) -> Any:
        value = dict(draw(values(schema)))
        name = draw(st.sampled_from([*schema["properties"], *schema["required"] * 8, "colour", "\ud800"]))
        if name in schema["required"] and draw(st.booleans()):
            del value[name]
        else:
            value[name] = draw(ANYTHING)
        return value

    return draw_one().filter(lambda value: not holds(schema, value))
