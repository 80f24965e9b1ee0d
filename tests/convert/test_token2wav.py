"""The detokenizer as a part of a model folder, and alone: there and back, and compared."""

import hashlib
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import onnx
import pytest
from helpers.detokenizers import NETWORKS, WEIGHTS, change_tensor, entries, leaves, stretch
from onnx import numpy_helper

from sa2jax import checkpoint
from sa2jax.convert import hf, token2wav, torch_file
from sa2jax.convert.official import load_official
from sa2jax.convert.verify import inspect, verify
from sa2jax.convert.vocoder import SPELLINGS
from sa2jax.models.speaker_encoder import speaker_encoder
from sa2jax.speech.layout import find
from sa2jax.speech_config import Token2WavConfig


def numbers(path: Path) -> dict[str, np.ndarray]:
    """What a released weight file holds."""
    if path.suffix == ".pt":
        return torch_file.read(path)
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def require_same_release(a: Path, b: Path) -> None:
    """Bit for bit, but for the weight norms."""
    for file in WEIGHTS:
        before, after = numbers(a / file), numbers(b / file)
        assert set(before) == set(after), file
        for name, array in before.items():
            if not name.endswith((*SPELLINGS[0], *SPELLINGS[1])):
                np.testing.assert_array_equal(after[name], array, strict=True, err_msg=name)
    assert (a / "flow.yaml").read_bytes() == (b / "flow.yaml").read_bytes()
    for file in ("campplus.onnx", "speech_tokenizer_v2_25hz.onnx"):
        assert onnx.load(a / file) == onnx.load(b / file)


# --- there and back ---


@pytest.mark.both_pairs
def test_a_whole_model_there_and_back(model, tmp_path):
    calls = []

    def tick(done, total):
        return calls.append((done, total))

    report = hf.convert(model, tmp_path / "ours", progress=tick)
    assert entries(tmp_path) == ["model", "ours"]
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert {total for _, total in calls} == {report.bytes} == {calls[-1][0]}
    assert report.left_out == ()
    speech = tmp_path / "ours" / "token2wav"
    assert set(entries(speech)) == {
        "flow.yaml",
        "params",
        "sa2jax.json",
        "speaker_encoder.graph",
        "speech_tokenizer.graph",
        "tiny_dims.json",
    }
    assert {leaf.dtype for leaf in leaves(speech).values()} == {np.dtype(np.float32)}

    calls.clear()
    back = hf.export(tmp_path / "ours", tmp_path / "back", progress=tick)
    assert calls[-1] == (back.bytes, back.bytes)
    assert (back.tensors, back.parameters) == (report.tensors, report.parameters)
    assert entries(tmp_path / "back" / "token2wav") == entries(model / "token2wav")
    require_same_release(model / "token2wav", tmp_path / "back" / "token2wav")
    for other in ("ours", "back"):
        assert verify(model, tmp_path / other).same
    assert entries(tmp_path) == ["back", "model", "ours"]


@pytest.mark.both_pairs
def test_the_detokenizer_keeps_its_dtype(model, tmp_path):
    there = hf.convert(model, tmp_path / "ours", dtype="float16")
    back = hf.export(tmp_path / "ours", tmp_path / "back", dtype="bfloat16")
    assert all("the detokenizer keeps its dtype" in "".join(r.notes) for r in (there, back))
    assert {a.dtype for a in leaves(tmp_path / "ours").values()} == {np.dtype(np.float16)}
    assert {a.dtype for a in leaves(tmp_path / "ours/token2wav").values()} == {np.dtype("float32")}
    require_same_release(model / "token2wav", tmp_path / "back" / "token2wav")


def test_dtypes_of_pt_files_come_back(official, tmp_path):
    tensors = dict(torch_file.read(official / "flow.pt"))
    for name in list(tensors)[::3]:
        tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)
    torch_file.write(official / "flow.pt", tensors)
    hf.convert(official, tmp_path / "ours")
    hf.export(tmp_path / "ours", tmp_path / "back")
    after = torch_file.read(tmp_path / "back" / "flow.pt")
    for name, array in tensors.items():
        assert after[name].dtype == array.dtype
        assert after[name].tobytes() == np.ascontiguousarray(array).tobytes()


@pytest.mark.both_pairs
def test_a_detokenizer_alone(official, tmp_path):
    (official / "assets").mkdir()
    (official / "assets" / "hum.wav").write_text("no sound")
    report = hf.convert(official, tmp_path / "ours", dtype="bfloat16")
    assert len(report.notes) == 2  # on the recording and on the dtype
    shutil.rmtree(official / "assets")
    params = leaves(tmp_path / "ours")
    cfg, loaded = load_official(official)
    loaded = checkpoint.flatten(loaded)
    assert set(params) == set(loaded)
    for name, array in loaded.items():
        np.testing.assert_array_equal(params[name], array, strict=True)
    info = checkpoint.read_info(tmp_path / "ours")
    assert info["kind"] == "token2wav"
    assert Token2WavConfig.from_dict(info["config"]) == cfg
    assert report.bytes == sum(array.nbytes for array in loaded.values())
    assert report.tensors > len(loaded)
    assert (tmp_path / "ours" / "assets" / "hum.wav").is_file()
    hf.export(tmp_path / "ours", tmp_path / "back")
    require_same_release(official, tmp_path / "back")
    hf.convert(official, tmp_path / "ours", overwrite=True)
    assert not (tmp_path / "ours" / "assets").exists()
    assert entries(tmp_path) == ["back", "official", "ours"]


def test_where_a_detokenizer_is(model, whole, source, tmp_path):
    assert token2wav.is_official(model / "token2wav")
    assert not token2wav.is_official(model)
    assert not token2wav.is_official(whole / "token2wav")
    for folder in (model, whole):
        assert find(folder) == find(folder / "token2wav")
        assert find(folder) == folder / "token2wav"
    assert find(source) is None
    assert find(tmp_path / "nowhere") is None


@pytest.mark.parametrize(("prefix", "spelling"), [("", SPELLINGS[0]), ("generator.", SPELLINGS[1])])
def test_hift_comes_back_as_it_was_spelt(official, tmp_path, prefix, spelling):
    """Measured: 1.2e-7."""
    before = dict(torch_file.read(official / "hift.pt"))
    stretch(official / "hift.pt", prefix, spelling)
    hf.convert(official, tmp_path / "ours")
    hf.export(tmp_path / "ours", tmp_path / "back")
    named, after = (torch_file.read(f / "hift.pt") for f in (official, tmp_path / "back"))
    assert set(after) == set(named)
    assert len(after) == len(before)
    folded = 0
    for name, direction in named.items():
        if name.endswith(spelling[1]):
            partner = name.removesuffix(spelling[1]) + spelling[0]
            kernels = [
                tensors[partner] * v / np.sqrt(np.square(v).sum((1, 2), keepdims=True))
                for tensors, v in ((named, direction), (after, after[name]))
            ]
            np.testing.assert_allclose(*kernels, atol=1e-6)
            folded += not np.array_equal(after[name], direction)
        elif not name.endswith(spelling[0]):
            np.testing.assert_array_equal(after[name], direction, strict=True)
    assert folded > 10


def test_free_norms_of_the_speaker_encoder(official, tmp_path, with_free_norms):
    path = official / "campplus.onnx"
    onnx.save(with_free_norms(onnx.load(path)), path)
    hf.convert(official, tmp_path / "ours")
    hf.export(tmp_path / "ours", tmp_path / "back")
    before, after = numbers(path), numbers(tmp_path / "back" / "campplus.onnx")
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, atol=1e-6, err_msg=name)
    for other in ("ours", "back"):
        result = verify(official, tmp_path / other)
        assert (result.same, result.folded) == (True, 0)

    def little(array):
        return (array * np.float64(1 + 5e-7)).astype(np.float32)

    change_tensor(path, little, lambda _, array: array.ndim == 4)
    result = verify(tmp_path / "ours", official)
    assert (result.same, result.folded) == (True, 1)
    marked = checkpoint.read_info(tmp_path / "ours")["source"]["folded"]
    assert "speaker_encoder.conv_in.kernel" in marked
    assert "speaker_encoder.blocks.block1.layers.squeeze.bias" in marked
    assert "speaker_encoder.blocks.block1.layers.local.kernel" not in marked


def test_side_files(model, tmp_path):
    for name in ("README.md", "voices/a.txt", "flow.decoder.estimator.fp32.onnx", ".cache"):
        path = model / "token2wav" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(name.encode())
    report = hf.convert(model, tmp_path / "ours")
    assert report.left_out == ("token2wav/flow.decoder.estimator.fp32.onnx",)
    report = hf.export(tmp_path / "ours", tmp_path / "back")
    assert report.left_out == ()
    back = tmp_path / "back" / "token2wav"
    assert (back / "voices" / "a.txt").read_text() == "voices/a.txt"
    assert {*WEIGHTS, "flow.yaml", "README.md", "tiny_dims.json", "voices"} == set(entries(back))


def test_a_lost_flow_yaml_is_written_anew(official, ours, tmp_path):
    (ours / "flow.yaml").unlink()
    hf.export(ours, tmp_path / "back")
    assert verify(official, tmp_path / "back").same


def test_leaves_are_those_of_the_networks(official):
    cfg, params = load_official(official)
    abstract = speaker_encoder(cfg.speaker_encoder).abstract
    assert jax.tree.structure(abstract) == jax.tree.structure(params["speaker_encoder"])
    assert sorted(params) == sorted(NETWORKS)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))


# --- hashes ---


def test_hash_of_parameters():
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(2, ml_dtypes.bfloat16)
    text = b"x.a [2, 3] float32\n" + a.tobytes() + b"x.b [2] bfloat16\n" + b.tobytes()
    expected = hashlib.sha256(text).hexdigest()
    assert checkpoint.content_hash({"x": {"b": b, "a": a}}) == expected
    assert checkpoint.content_hash({"x": {"a": jax.numpy.asarray(a), "b": b}}) == expected
    others = [
        {"x": {"a": a.reshape(3, 2), "b": b}},
        {"x": {"a": a.view(np.int32), "b": b}},
        {"y": {"a": a, "b": b}},
        {"x": {"a": a + 1, "b": b}},
        {"x": {"a": a}},
    ]
    assert len({expected, *map(checkpoint.content_hash, others)}) == 6
    assert checkpoint.content_hash({"a": a.T}) == checkpoint.content_hash({"a": a.T.copy()})


def test_analysis_is_the_hash_of_what_analyses_voices(official, ours, tmp_path):
    _, params = load_official(official)
    heard = {name: params[name] for name in ("speech_tokenizer", "speaker_encoder")}
    expected = checkpoint.content_hash(heard)
    assert checkpoint.read_info(ours)["analysis"] == expected
    change_tensor(official / "flow.pt", lambda array: array + 1)
    hf.convert(official, tmp_path / "same voices")
    assert checkpoint.read_info(tmp_path / "same voices")["analysis"] == expected
    change_tensor(official / "campplus.onnx", lambda array: array + 1)
    hf.convert(official, tmp_path / "other voices")
    assert checkpoint.read_info(tmp_path / "other voices")["analysis"] != expected


# --- compared ---


def test_every_pair_of_kinds_is_compared(model, ours, source):
    count = len(leaves(ours))
    for a, b in [(model / "token2wav", ours), (ours, model / "token2wav"), (ours, ours)]:
        same = verify(a, b)
        assert same.same
        assert (same.compared, same.folded) == (count, 0)
    lacking = verify(model, source)
    assert not lacking.same
    assert len(lacking.only_a) == count
    assert all(name.startswith("token2wav.") for name in lacking.only_a)
    assert "only in the first: token2wav." in lacking.summary()
    assert len(verify(source, model).only_b) == count
    mixed = verify(model, ours)
    assert mixed.compared == count
    assert not any(name.startswith("token2wav") for name in mixed.only_a)


@pytest.mark.parametrize(
    ("file", "network"),
    [
        ("flow.pt", "flow"),
        ("campplus.onnx", "speaker_encoder"),
        ("speech_tokenizer_v2_25hz.onnx", "speech_tokenizer"),
    ],
)
def test_one_changed_bit_is_found(official, ours, file, network):

    def flip(array: np.ndarray) -> np.ndarray:
        array.reshape(-1).view(np.uint32)[-1] ^= 1
        return array

    change_tensor(official / file, flip)
    (name,) = verify(ours, official).differing
    assert name.startswith(f"token2wav.{network}.")


def test_a_fold_may_change_numbers_a_little_and_no_more(official, kept):
    """The way back itself changes nothing: the norm of a kernel rounds to the length it had."""
    path = official / "hift.pt"

    def scaled(factor: float, name_ends: str):
        shutil.copy(kept / "official" / "hift.pt", path)

        def change(array):
            return (array * np.float64(factor)).astype(np.float32)

        change_tensor(path, change, lambda name, _: name.endswith(name_ends))
        return verify(kept / "ours", official)

    length = f"conv_pre.{SPELLINGS[0][0]}"
    little, much, broken = (scaled(1 + x, length) for x in (5e-7, 3e-6, np.nan))
    assert (little.same, little.folded) == (True, 1)
    assert 0 < little.max_abs_diff < 1e-6
    assert "1 count as equal, to within 1e-06" in little.summary()
    assert much.differing == broken.differing == ("token2wav.vocoder.pre.kernel",)
    assert (much.folded, broken.max_abs_diff) == (0, np.inf)
    assert scaled(1 + 5e-7, "conv_pre.bias").differing == ("token2wav.vocoder.pre.bias",)


def test_inspect_shows_the_four_networks(model, whole):
    described = {folder: inspect(folder) for folder in (model, whole)}
    for folder, found in described.items():
        parts = {part.name: part for part in found.parts}
        assert [*parts][3:] == [*NETWORKS, "total"]
        spoken = [row for row in found.groups if row.name.startswith("token2wav.")]
        assert {row.part for row in spoken} == set(NETWORKS)
        assert {row.name.split(".")[1] for row in spoken} == set(NETWORKS)
        assert sum(row.parameters for row in found.groups) == parts["total"].parameters
        own = sum(parts[name].parameters for name in NETWORKS)
        rest = parts["total"].parameters - own
        assert found.memory == {"float32": 4 * (rest + own), "bfloat16": 2 * rest + 4 * own}
        alone = inspect(folder / "token2wav")
        assert alone.parts[:-1] == tuple(parts[name] for name in NETWORKS)
        assert alone.kind == ("sa2jax" if found.kind == "sa2jax" else "token2wav")
    tensors = torch_file.read(model / "token2wav" / "flow.pt")
    rows = {row.name: row for row in described[model].groups}
    assert (
        rows["token2wav.flow.input_embedding.weight"].shape
        == tensors["input_embedding.weight"].shape
    )
    assert described[model].parts[3].parameters == sum(a.size for a in tensors.values())
    ours = {row.name: row for row in described[whole].groups}
    assert ours["token2wav.flow.table"].shape == tensors["input_embedding.weight"].shape
