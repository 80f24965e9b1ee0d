import csv

import numpy as np
import pytest

from sa2jax.config import StepAudio2Config
from sa2jax.convert import hf
from sa2jax.convert.rules import Join, Op, Split, Transpose, expand, fold, match, rule
from sa2jax.convert.step_audio2 import llm_rules
from sa2jax.errors import CheckpointError


class Concatenate(Join):
    """Two sources of known sizes along the first axis."""

    def __init__(self, *sizes: int):
        self.sizes = sizes

    def forward(self, arrays):
        return np.concatenate(arrays)

    def inverse(self, array):
        return np.split(array, np.cumsum(self.sizes)[:-1])

    def forward_shape(self, shapes):
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def inverse_shape(self, shape):
        return [(size, *shape[1:]) for size in self.sizes]


@pytest.mark.parametrize(
    ("op", "shape", "expected"),
    [
        (Transpose(1, 0), (2, 3), (3, 2)),
        (Transpose(2, 0, 1), (2, 3, 4), (4, 2, 3)),
        (Split(0, (2, 3)), (6, 5), (2, 3, 5)),
        (Split(1, (2, 2)), (3, 4), (3, 2, 2)),
        (Split(0, (4,)), (4,), (4,)),
    ],
)
def test_op_inverts_and_knows_its_shape(op: Op, shape, expected, rng):
    array = rng.standard_normal(shape)
    result = op.forward(array)
    assert result.shape == op.forward_shape(shape) == expected
    assert op.inverse_shape(expected) == shape
    np.testing.assert_array_equal(op.inverse(result), array)


def test_transpose_moves_numbers_as_numpy_does(rng):
    array = rng.standard_normal((2, 3, 4))
    result = Transpose(2, 0, 1).forward(array)
    assert result[3, 1, 2] == array[1, 2, 3]


def test_split_keeps_heads_together():
    result = Split(0, (2, 3)).forward(np.arange(6))
    np.testing.assert_array_equal(result, [[0, 1, 2], [3, 4, 5]])


def test_rule_runs_its_steps_in_order_and_back(rng):
    r = rule(["q", "k"], "qk", Concatenate(4, 2), Transpose(1, 0), Split(1, (3, 2)))
    arrays = [rng.standard_normal((4, 5)), rng.standard_normal((2, 5))]
    leaf = r.forward(arrays)
    assert leaf.shape == r.forward_shape([(4, 5), (2, 5)]) == (5, 3, 2)
    assert r.inverse_shape((5, 3, 2)) == [(4, 5), (2, 5)]
    np.testing.assert_array_equal(leaf[:, 2], arrays[1].T)
    for before, after in zip(arrays, r.inverse(leaf), strict=True):
        np.testing.assert_array_equal(before, after)


def test_rule_is_exact_only_if_all_its_steps_are():
    class Approximate(Concatenate):
        exact = False

    assert rule("a", "b", Transpose(1, 0)).exact
    assert not rule(["g", "v"], "w", Approximate(1, 1), Transpose(1, 0)).exact


@pytest.mark.parametrize(("sources", "steps"), [(["a", "b"], ()), ("a", (Concatenate(1, 1),))])
def test_rule_needs_a_join_exactly_for_several_sources(sources, steps):
    with pytest.raises(TypeError, match="joining first step"):
        rule(sources, "leaf", *steps)


RULES = [
    rule("embed", "table"),
    rule("layers.{layer}.w", "layers.w", Transpose(1, 0)),
]
LEAVES = {"table": (5, 4), "layers.w": (3, 4, 2)}
TENSORS = {"embed": (5, 4)} | {f"layers.{i}.w": (2, 4) for i in range(3)}


def test_match_places_every_layer():
    placements = match(RULES, TENSORS, LEAVES, "x")
    assert [(p.sources, p.leaf, p.layer) for p in placements] == [
        (("embed",), "table", None),
        (("layers.0.w",), "layers.w", 0),
        (("layers.1.w",), "layers.w", 1),
        (("layers.2.w",), "layers.w", 2),
    ]


def test_match_reports_every_fault_of_a_checkpoint_at_once():
    tensors = TENSORS | {"layers.3.w": (2, 4), "extra": (1,), "layers.1.w": (4, 2)}
    del tensors["embed"]
    with pytest.raises(CheckpointError) as error:
        match(RULES, tensors, LEAVES, "folder")
    message = str(error.value)
    assert "2 unknown tensors: layers.3.w, extra" in message
    assert "1 missing tensors: embed" in message
    assert "1 wrong shape (expected [2, 4], got [4, 2]): layers.1.w" in message
    assert "\n" not in message


def test_more_layers_than_tensors_are_refused_before_they_are_spelt():
    with pytest.raises(CheckpointError) as error:
        match(RULES, TENSORS, LEAVES | {"layers.w": (10**12, 4, 2)}, "folder")
    assert "expected 1000000000000 of layers.{layer}.w, got 3. Use" in str(error.value)


def test_match_says_what_its_caller_wants_said():
    wording = "{where} is odd: {problems}. Look at {{it}}"
    with pytest.raises(CheckpointError) as error:
        match(RULES, TENSORS | {"a.{0}": (1,)}, LEAVES, "x.pt", wording=wording, problems=["wet"])
    assert str(error.value) == "x.pt is odd: wet; 1 unknown tensors: a.{0}. Look at {it}"
    with pytest.raises(CheckpointError, match=r"x\.pt is odd: wet\. Look"):
        match(RULES, TENSORS, LEAVES, "x.pt", wording=wording, problems=["wet"])


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (RULES[:1], "1 leaves without a rule: layers.w"),
        ([*RULES, RULES[0]], "1 leaves filled twice: table"),
        ([*RULES, RULES[0]], "1 tensors used twice: embed"),
        ([*RULES, rule("more", "nowhere")], "1 rules without a leaf: nowhere"),
        ([rule("embed", "table", Split(0, (2, 2))), RULES[1]], "rule for table makes [2, 2, 4]"),
    ],
)
def test_match_reports_faults_of_the_table(rules, message):
    leaves = LEAVES if "makes" not in message else LEAVES | {"table": (2, 3, 4)}
    with pytest.raises(CheckpointError) as error:
        match(rules, TENSORS, leaves, "folder")
    assert message in str(error.value)


def test_fold_names_ranges():
    names = ["a.0.w", "a.1.w", "a.3.w", "b", "a.10.w", "c.7.d", "m.0.2.x", "m.1.2.x"]
    assert fold(names) == {
        "a.{0-1,3,10}.w": ["a.0.w", "a.1.w", "a.3.w", "a.10.w"],
        "b": ["b"],
        "c.7.d": ["c.7.d"],
        "m.{0-1}.2.x": ["m.0.2.x", "m.1.2.x"],
    }


def test_full_size_table_matches_every_released_name(golden):
    with (golden / "names" / "names_llm.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    released = {row["name"]: tuple(int(n) for n in row["shape"].split("x")) for row in rows}
    cfg = StepAudio2Config.preset("mini")
    leaves = hf.leaf_shapes(cfg)
    placements = match(llm_rules(cfg), released, leaves, "names_llm.tsv")
    assert sorted(name for p in placements for name in p.sources) == sorted(released)
    assert {p.leaf for p in placements} == set(leaves)
    assert sum(int(row["numel"]) for row in rows) == sum(
        int(np.prod(shape)) for shape in leaves.values()
    )
    assert all(p.rule.exact for p in placements)


def test_table_reads_and_writes_the_same_names():
    cfg = StepAudio2Config.preset("tiny")
    leaves = hf.leaf_shapes(cfg)
    tensors = {
        name: shape
        for p in expand(llm_rules(cfg), leaves)
        for name, shape in zip(p.sources, p.shapes, strict=True)
    }
    assert {p.leaf for p in match(llm_rules(cfg), tensors, leaves, "x")} == set(leaves)
    assert tensors["lm_head.weight"] == tensors["model.embed_tokens.weight"]
