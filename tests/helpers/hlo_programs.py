"""Small optimised programs in text, and what they cost."""

import textwrap

from sa2jax.plan import hlo


def cost(text: str, turns: int = 1, header: str = "HloModule m, num_partitions=4") -> hlo.Cost:
    return hlo.cost(f"{header}\n\n{textwrap.dedent(text)}", turns=turns)


def entry(body: str, others: str = "", **options) -> hlo.Cost:
    """Cost of a program whose parameters and instructions are given."""
    lines = textwrap.indent(textwrap.dedent(body).strip(), "  ")
    return cost(
        f"{textwrap.dedent(others)}\nENTRY %main (p: f32[]) -> f32[] {{\n{lines}\n}}\n", **options
    )
