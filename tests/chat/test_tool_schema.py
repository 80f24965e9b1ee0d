import functools
from typing import Annotated, Any, List, Literal, Optional, Union

import pytest
from helpers.example_tools import SEARCH, run, search

from sa2jax.chat.tool_schema import Tool
from sa2jax.chat.toolbox import (
    Toolbox,
)
from sa2jax.errors import PromptError

# --- a tool ------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [SEARCH, SEARCH["function"]])
def test_a_schema_is_kept_in_either_form(given):
    tool = Tool(given)
    assert tool.schema is given
    assert tool.name == "search"
    assert tool.run is None
    assert tool.timeout == 30


@pytest.mark.parametrize(
    "name", [None, "", " ", "a b", "a\n", "<a>", "a{", "b}", "[", "]", 3, "get weather"]
)
def test_a_name_that_no_call_can_have(name):
    for given in ({"name": name}, {"type": "function", "function": {"name": name}}):
        with pytest.raises(PromptError, match="a name of one word"):
            Tool(given)


@pytest.mark.parametrize("name", ["search", "get-weather.v2", "天气", "a:b/c"])
def test_names_that_calls_can_have(name):
    assert Tool({"name": name}).name == name


@pytest.mark.parametrize(
    ("given", "options", "why"),
    [
        ({}, {}, "name"),
        ("search", {}, "as an object, got str"),
        ({"name": "f", "parameters": []}, {}, "f: its parameters"),
        ({"name": "f", "parameters": None}, {}, "f: its parameters"),
        ({"name": "f", "parameters": {"properties": []}}, {}, "f: expected its properties"),
        ({"name": "f", "parameters": {"required": "x"}}, {}, "required as names"),
        ({"name": "f", "parameters": {"required": [1]}}, {}, "required as names"),
        ({"name": "f"}, {"run": "f"}, "f: expected a function, got str"),
        ({"name": "f"}, {"timeout": 0}, "more than 0 s, got 0"),
        ({"name": "f"}, {"timeout": -1.5}, "more than 0 s, got -1.5"),
        ({"name": "f"}, {"timeout": float("nan")}, "more than 0 s, got nan"),
        ({"name": "f"}, {"timeout": float("inf")}, "more than 0 s, got inf"),
        ({"name": "f"}, {"timeout": "30"}, "more than 0 s, got '30'"),
    ],
)
def test_a_bad_tool(given, options, why):
    with pytest.raises(PromptError, match=why):
        Tool(given, **options)


# --- a tool from a function --------------------------------------------------------------------


def example(
    city: str,
    plain,
    days: int = 3,
    factor: float = 1.0,
    exact: bool = False,
    tags: list[str] | None = None,
    *,
    unit: Annotated[Literal["C", "F"], "of the answer"] = "C",
):
    """Look up
    the weather.

    Of any city.

    Args:
        city: where,
            with (country): if needed.
        days (int, optional): how many.
        unit: hidden by the annotation.
        other: not a parameter.

    Returns:
        days: not this one.
    """


def test_a_schema_from_signature_and_docstring():
    tool = Tool.of(example, timeout=5)
    assert tool.run is example
    assert tool.timeout == 5
    assert tool.schema == {
        "type": "function",
        "function": {
            "name": "example",
            "description": "Look up the weather. Of any city.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "where, with (country): if needed."},
                    "plain": {"type": "string"},
                    "days": {"type": "integer", "description": "how many."},
                    "factor": {"type": "number"},
                    "exact": {"type": "boolean"},
                    "tags": {"type": ["array", "null"], "items": {"type": "string"}},
                    "unit": {
                        "type": "string",
                        "enum": ["C", "F"],
                        "description": "of the answer",
                    },
                },
                "required": ["city", "plain"],
                "additionalProperties": False,
            },
        },
    }


def test_name_and_description_can_be_given():
    tool = Tool.of(example, name="weather", description="天气")
    assert tool.name == "weather"
    assert tool.schema["function"]["description"] == "天气"
    assert "description" not in Tool.of(example, description="").schema["function"]


def test_without_parameters_or_docstring():
    assert Tool.of(lambda: 1, name="f").schema == {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("annotation", "want"),
    [
        (str, {"type": "string"}),
        ("int", {"type": "integer"}),
        (float, {"type": "number"}),
        (bool, {"type": "boolean"}),
        (list, {"type": "array"}),
        (List, {"type": "array"}),
        (dict, {"type": "object"}),
        (dict[str, Any], {"type": "object"}),
        (list[int], {"type": "array", "items": {"type": "integer"}}),
        (list[list], {"type": "array", "items": {"type": "array"}}),
        (Literal[1, 2], {"type": "integer", "enum": [1, 2]}),
        (Literal["a", 1], {"type": ["string", "integer"], "enum": ["a", 1]}),
        (Literal["a", None], {"type": ["string", "null"], "enum": ["a", None]}),
        (Optional[str], {"type": ["string", "null"]}),
        (None | float, {"type": ["number", "null"]}),
        (Literal["a"] | None, {"type": ["string", "null"], "enum": ["a", None]}),
        (Annotated[int, 3, "d", "e"], {"type": "integer", "description": "d"}),
        (Annotated[int, 3], {"type": "integer"}),
        (Annotated[int, "d"] | None, {"type": ["integer", "null"], "description": "d"}),
    ],
)
def test_annotations(annotation, want):
    def f(x):
        pass

    f.__annotations__["x"] = annotation
    assert Tool.of(f).schema["function"]["parameters"]["properties"] == {"x": want}


@pytest.mark.parametrize(
    "annotation",
    [
        bytes,
        Any,
        object,
        None,
        int | str,
        Union[int, str, None],
        list[bytes],
        Annotated[bytes, "d"],
        Literal[b"a"],
        tuple[int, int],
        3,
    ],
)
def test_annotations_without_a_schema(annotation):
    def f(x):
        pass

    f.__annotations__["x"] = annotation
    with pytest.raises(PromptError, match="the tool f: expected x to be str, int"):
        Tool.of(f)


def test_signatures_without_a_schema():
    def several(*words):
        pass

    def keywords(**more):
        pass

    def positional(x, /):
        pass

    def unknown(x: "Nowhere"):  # noqa: F821 - there is none
        pass

    for function, why in (
        (several, r"the tool several: a schema cannot describe \*words"),
        (keywords, r"the tool keywords: a schema cannot describe \*\*more"),
        (positional, "the tool positional: x cannot be given by name"),
        (unknown, "the tool unknown: its signature cannot be read .*'Nowhere'"),
        (lambda: 1, "a name of one word.*<lambda>"),
        (type("Thing", (), {"__call__": lambda self: 1})(), "a name of one word.*''"),
    ):
        with pytest.raises(PromptError, match=why):
            Tool.of(function)


def test_a_partial_and_a_method():
    tool = Tool.of(functools.partial(search, query="x"))
    assert tool.schema["function"]["description"] == "Search the web."
    assert tool.schema["function"]["parameters"]["required"] == []
    assert run(Toolbox([tool]), "search").text == "found x"

    class Home:
        def light(self, on: bool) -> str:
            return f"light {on}"

    assert run(Toolbox([Home().light]), "light", on=True).text == "light True"
