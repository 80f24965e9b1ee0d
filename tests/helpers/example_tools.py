"""Tools that tests call."""

from typing import Literal

from sa2jax.chat.toolbox import Toolbox, ToolResult
from sa2jax.chat.tools import ToolCall

SEARCH = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "搜索工具",
        "parameters": {
            "type": "object",
            "properties": {"query": {"type": "string", "description": "搜索关键词"}},
            "required": ["query"],
            "additionalProperties": False,
        },
    },
}


def search(query: str) -> str:
    """Search the web."""
    return f"found {query}"


def weather(city: str, unit: Literal["C", "F"] = "C"):
    return {"城市": city, "degrees": 21, "unit": unit}


def schema(name, **properties):
    return {"name": name, "parameters": {"type": "object", "properties": properties}}


def run(box, name, **arguments) -> ToolResult:
    (result,) = box.run([ToolCall(name, arguments)])
    return result


def answer(value) -> ToolResult:
    """The result of a tool that returns `value`."""
    return run(Toolbox([schema("f")], {"f": lambda: value}), "f")
