"""`sa2jax plan`, by its output; what it computes, tests/plan tests."""

import json

import pytest

from sa2jax import chips


@pytest.mark.both_pairs
def test_table(run):
    code, out, err = run("plan", "--topology", "h100:2", "--batch", 8)
    assert (code, err) == (0, "")
    assert "decode of mini, bfloat16, on h100:2 (on paper)" in out
    for row in (
        "mesh",
        "fits",
        "memory per chip",
        "weights",
        "cache",
        "all-reduce",
        "roofline",
        "bound by memory",
        "tokens/s",
        "real time",
    ):
        assert row in out


def test_json(run):
    code, out, err = run("plan", "--topology", "h100", "--workload", "prefill", "--json")
    assert (code, err) == (0, "")
    made = json.loads(out)
    assert made["fits"] is True
    assert made["on_paper"] is True
    assert made["spec"]["length"] == 2048
    assert made["topology"] == "h100:1"


def test_search(run):
    code, out, err = run("plan", "--topology", "l4", "--batch", 32, "--search")
    assert code == 0
    assert "on l4:2 (on paper)" in out
    assert "l4:1 one chip: " in err
    assert "does not fit" in err


def test_what_does_not_fit(run):
    code, out, _ = run("plan", "--topology", "t4", "--batch", 8)
    assert code == 0  # an answer, not a mistake
    assert "no: too large" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v9:2x2"], "unknown topology 'v9:2x2'; known: v4|v5p:1x1x1|2x2x1|"),
        (["--topology", "h100:8", "--mesh", "tensor=2"], "is of 2 chips, but h100:8 has 8"),
        (["--topology", "h100:8", "--mesh", "tensor"], "expected one axis=size pair per axis"),
        (["--topology", "h100", "--length", 0], "length 0: expected at least 1"),
        (["--topology", "h100", "--batch", -1], "batch -1: expected at least 1"),
        (["--topology", "h100", "--model", "huge"], "no model preset 'huge'"),
        (["--topology", "h100", "--workload", "encode"], "decode and prefill only"),
        (["--topology", "v9", "--search"], "unknown chip 'v9'; known: v4, v5e"),
    ],
)
def test_mistakes(refused, arguments, message):
    assert message in refused("plan", *arguments)


def test_missing_libtpu(refused, monkeypatch):
    monkeypatch.setattr(chips, "find_spec", lambda name: None)
    assert "pip install 'sa2jax[plan]'" in refused("plan", "--topology", "v5e:2x2")
