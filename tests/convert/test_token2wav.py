"""The detokenizer as a part of a model folder, and alone: there and back, compared, damaged."""

import errno
import hashlib
import json
import pickle
import shutil
import sys
import zipfile
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from sa2jax import checkpoint
from sa2jax.convert import hf, token2wav, torch_file
from sa2jax.convert.verify import inspect, verify
from sa2jax.convert.vocoder import SPELLINGS
from sa2jax.errors import CheckpointError, ConfigError
from sa2jax.inference.speech_folder import find
from sa2jax.models.speaker_encoder import speaker_encoder
from sa2jax.speech_config import Token2WavConfig

WEIGHTS = ("flow.pt", "hift.pt", "campplus.onnx", "speech_tokenizer_v2_25hz.onnx")
NETWORKS = ("flow", "speaker_encoder", "speech_tokenizer", "vocoder")


@pytest.fixture(scope="module")
def kept(golden, tmp_path_factory) -> Path:
    """A released folder whose vocoder has weight norms that are not folded, and its conversion."""
    folder = tmp_path_factory.mktemp("kept")
    shutil.copytree(golden / "token2wav", folder / "official")
    stretch(folder / "official" / "hift.pt")
    hf.convert(folder / "official", folder / "ours")
    hf.convert(golden / "micro" / "llm", folder / "whole")
    shutil.copytree(folder / "ours", folder / "whole" / "token2wav")
    return folder


@pytest.fixture
def official(kept, tmp_path) -> Path:
    """A released folder that a test may damage."""
    return Path(shutil.copytree(kept / "official", tmp_path / "official"))


@pytest.fixture
def ours(kept, tmp_path) -> Path:
    """Its conversion, to be damaged."""
    return Path(shutil.copytree(kept / "ours", tmp_path / "ours"))


@pytest.fixture
def whole(kept, tmp_path) -> Path:
    """Language model and detokenizer, converted."""
    return Path(shutil.copytree(kept / "whole", tmp_path / "whole"))


@pytest.fixture
def model(source, kept, tmp_path) -> Path:
    """A Hugging Face folder of language model and detokenizer, to be damaged."""
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    shutil.copytree(kept / "official", folder / "token2wav")
    return folder


def stretch(path: Path, prefix="generator.", spelling=SPELLINGS[0]) -> None:
    """Make a weight norm's directions longer than its lengths, with other names if need be."""
    tensors, rng = {}, np.random.default_rng(1)
    for name, array in torch_file.read(path).items():
        if name.endswith(SPELLINGS[0][1]):
            array = (array * rng.uniform(0.5, 2, (len(array), 1, 1))).astype(np.float32)
        name = name.replace("generator.", prefix)
        for old, new in zip(SPELLINGS[0], spelling, strict=True):
            name = name.replace(old, new)
        tensors[name] = array
    torch_file.write(path, tensors)


def entries(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def leaves(folder: Path) -> dict[str, np.ndarray]:
    return {n: np.asarray(a) for n, a in checkpoint.flatten(checkpoint.load(folder)).items()}


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


def test_a_whole_model_there_and_back(model, tmp_path):
    calls = []
    tick = lambda done, total: calls.append((done, total))  # noqa: E731
    report = hf.convert(model, tmp_path / "ours", progress=tick)
    assert entries(tmp_path) == ["model", "ours"]
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert {total for _, total in calls} == {report.bytes} == {calls[-1][0]}
    assert report.left_out == ()
    speech = tmp_path / "ours" / "token2wav"
    assert set(entries(speech)) == {
        "flow.yaml", "params", "sa2jax.json", "speaker_encoder.graph", "speech_tokenizer.graph",
        "tiny_dims.json",
    }  # fmt: skip
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


def test_a_detokenizer_alone(official, tmp_path):
    (official / "assets").mkdir()
    (official / "assets" / "hum.wav").write_text("no sound")
    report = hf.convert(official, tmp_path / "ours", dtype="bfloat16")
    assert len(report.notes) == 2  # on the recording and on the dtype
    shutil.rmtree(official / "assets")
    params = leaves(tmp_path / "ours")
    cfg, loaded = token2wav.load_official(official)
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
    little = lambda array: (array * np.float64(1 + 5e-7)).astype(np.float32)  # noqa: E731
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
    _, params = token2wav.load_official(official)
    heard = {name: params[name] for name in ("speech_tokenizer", "speaker_encoder")}
    expected = checkpoint.content_hash(heard)
    assert checkpoint.read_info(ours)["analysis"] == expected
    change_tensor(official / "flow.pt", lambda array: array + 1)
    hf.convert(official, tmp_path / "same voices")
    assert checkpoint.read_info(tmp_path / "same voices")["analysis"] == expected
    change_tensor(official / "campplus.onnx", lambda array: array + 1)
    hf.convert(official, tmp_path / "other voices")
    assert checkpoint.read_info(tmp_path / "other voices")["analysis"] != expected


def change_tensor(path: Path, change, pick=lambda name, array: array.ndim == 3) -> str:
    """Change the first tensor of a released file that `pick` picks."""
    if path.suffix == ".pt":
        tensors = dict(torch_file.read(path))
        name = next(n for n, a in tensors.items() if pick(n, a))
        tensors[name] = change(np.array(tensors[name]))
        torch_file.write(path, tensors)
        return name
    graph = onnx.load(path)
    tensor = next(t for t in graph.graph.initializer if pick(t.name, np.empty(t.dims, np.float16)))
    array = np.asarray(change(np.array(numpy_helper.to_array(tensor))))
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(graph, path)
    return tensor.name


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
        change = lambda array: (array * np.float64(factor)).astype(np.float32)  # noqa: E731
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
        spoken = [row for row in found.rows if row.name.startswith("token2wav.")]
        assert {row.part for row in spoken} == set(NETWORKS)
        assert {row.name.split(".")[1] for row in spoken} == set(NETWORKS)
        assert sum(row.parameters for row in found.rows) == parts["total"].parameters
        own = sum(parts[name].parameters for name in NETWORKS)
        rest = parts["total"].parameters - own
        assert found.memory == {"float32": 4 * (rest + own), "bfloat16": 2 * rest + 4 * own}
        alone = inspect(folder / "token2wav")
        assert alone.parts[:-1] == tuple(parts[name] for name in NETWORKS)
        assert alone.kind == ("sa2jax" if found.kind == "sa2jax" else "token2wav")
    tensors = torch_file.read(model / "token2wav" / "flow.pt")
    rows = {row.name: row for row in described[model].rows}
    assert (
        rows["token2wav.flow.input_embedding.weight"].shape
        == tensors["input_embedding.weight"].shape
    )
    assert described[model].parts[3].parameters == sum(a.size for a in tensors.values())
    ours = {row.name: row for row in described[whole].rows}
    assert ours["token2wav.flow.table"].shape == tensors["input_embedding.weight"].shape


# --- bad input: one clear line, nothing left behind ---


def refused(model: Path, message: str, kind=CheckpointError) -> str:
    """The error of a conversion; whole and alone it is the same, and leaves nothing."""
    before = entries(model.parent)
    errors = []
    for source in (model, model / "token2wav"):
        with pytest.raises(kind, match=message) as error:
            hf.convert(source, model.parent / "out")
        errors.append(str(error.value))
    assert errors[0] == errors[1]
    assert entries(model.parent) == before
    assert "config.json" not in errors[0]
    return errors[0]


@pytest.mark.parametrize("file", WEIGHTS)
def test_a_missing_file_is_named_with_its_place(model, file):
    (model / "token2wav" / file).unlink()
    error = refused(model, "lacks 1 of the 5 files of a detokenizer")
    assert f"{model / 'token2wav'} lacks" in error
    assert file in error


def test_without_flow_yaml_there_is_no_detokenizer(model, tmp_path):
    (model / "token2wav" / "flow.yaml").unlink()
    report = hf.convert(model, tmp_path / "ours")
    assert set(report.left_out) == {f"token2wav/{file}" for file in WEIGHTS}
    assert any("token2wav has no flow.yaml" in note for note in report.notes)
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors|config"):
        verify(model / "token2wav", tmp_path / "ours")


@pytest.mark.parametrize("file", WEIGHTS)
@pytest.mark.parametrize("part", [0.0, 0.9])
def test_a_truncated_file(model, file, part):
    path = model / "token2wav" / file
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    assert str(path) in refused(model, r"truncated|is no \.pt file")


@pytest.mark.parametrize("file", ["flow.pt", "hift.pt"])
def test_a_pickle_that_would_run_code(model, file, tmp_path):
    class Attack:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harmed",)

    path = model / "token2wav" / file
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({"w": Attack()}, 2))
    error = refused(model, "refused: it asks for")
    assert str(path) in error
    assert not (tmp_path / "harmed").exists()


def test_two_swapped_graphs(model):
    a, b = (model / "token2wav" / file for file in WEIGHTS[2:])
    a.rename(a.with_suffix(".tmp"))
    b.rename(a)
    a.with_suffix(".tmp").rename(b)
    error = refused(model, "another model's graph")
    assert str(b) in error


def test_two_swapped_state_dicts(model):
    folder = model / "token2wav"
    shutil.copy(folder / "flow.pt", folder / "hift.pt")
    error = refused(model, "does not hold the tensors of a HiFT vocoder")
    assert str(folder / "hift.pt") in error


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("num_blocks: 2", "num_blocks: 3", r"missing tensors: encoder\.encoders\.2\."),
        ("depth: 2", "depth: 1", r"unknown tensors: decoder\.estimator\.blocks\.1\."),
        ("vocab_size: 6561", "vocab_size: 729", r"expected \[729, 32\], got \[6561, 32\]"),
    ],
)
def test_flow_yaml_of_other_sizes(model, old, new, message):
    path = model / "token2wav" / "flow.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    error = refused(model, message)
    assert f"{path.with_name('flow.pt')} does not fit its flow.yaml" in error


def test_flow_yaml_of_another_model(model):
    path = model / "token2wav" / "flow.yaml"
    path.write_text(path.read_text().replace("depth", "deep"))
    assert str(path) in refused(model, "unknown key estimator.deep", ConfigError)


@pytest.mark.parametrize(
    ("key", "size", "tensor", "message"),
    [
        (
            "vocab_size: 6561", 729, "input_embedding.weight",
            r"flow\.yaml has 729 codes, speech_tokenizer_v2_25hz\.onnx 6561",
        ),
        (
            "spk_embed_dim: 192", 64, "spk_embed_affine_layer.weight",
            r"flow\.yaml has 64 numbers in a speaker vector, campplus\.onnx 192",
        ),
    ],
)  # fmt: skip
def test_files_of_different_detokenizers(model, key, size, tensor, message):
    path = model / "token2wav" / "flow.yaml"
    path.write_text(path.read_text().replace(key, f"{key.split()[0]} {size}"))
    smaller = lambda a: a[:size] if len(a) > 192 else a[:, :size]  # noqa: E731
    change_tensor(path.with_name("flow.pt"), smaller, lambda name, _: name == tensor)
    error = refused(model, message)
    assert f"{model / 'token2wav'} holds files of different detokenizers" in error


def test_a_tensor_of_integers(model):
    path = model / "token2wav" / "hift.pt"
    name = change_tensor(path, lambda array: array.astype(np.int32))
    assert f"{name} (int32)" in refused(model, "expected float32, float16, bfloat16")


def test_direction_mistakes(official, ours, tmp_path):
    with pytest.raises(CheckpointError, match="converted already"):
        hf.convert(ours, tmp_path / "out")
    with pytest.raises(CheckpointError, match="expected a folder made by `sa2jax convert`"):
        hf.export(official, tmp_path / "out")
    with pytest.raises(CheckpointError, match="--overwrite"):
        hf.convert(official, ours)
    assert entries(tmp_path) == ["official", "ours"]


def test_a_model_around_a_converted_detokenizer(model, ours, tmp_path):
    shutil.rmtree(model / "token2wav")
    ours.rename(model / "token2wav")
    with pytest.raises(CheckpointError, match="token2wav is converted already"):
        hf.convert(model, tmp_path / "out")


CTRL_C, FULL = KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("action", "alone", "interruption"),
    [
        (hf.convert, False, CTRL_C),
        (hf.convert, True, FULL),
        (hf.export, False, FULL),
        (hf.export, True, CTRL_C),
    ],
)
def test_interrupted_in_the_middle_nothing_is_left(
    model, whole, tmp_path, alone, action, interruption
):
    source = model if action is hf.convert else whole
    source = source / "token2wav" if alone else source
    before = entries(tmp_path)

    def interrupt(done: int, total: int) -> None:
        if done > 0.6 * total:
            raise interruption

    raised, message = (CheckpointError, "disk is full") if interruption is FULL else (
        KeyboardInterrupt, None
    )  # fmt: skip
    with pytest.raises(raised, match=message):
        action(source, tmp_path / "out", progress=interrupt)
    assert entries(tmp_path) == before
    left = tmp_path / ".out.sa2jax-partial"  # of a run that was killed
    (left / "token2wav" / "params").mkdir(parents=True)
    (left / "token2wav" / "flow.pt").write_text("half")
    action(source, tmp_path / "out")
    assert verify(source, tmp_path / "out").same
    assert entries(tmp_path) == sorted([*before, "out"])


@pytest.mark.parametrize("action", [hf.convert, hf.export])
def test_the_disk_must_hold_both_parts(model, whole, tmp_path, monkeypatch, action):
    source = model if action is hf.convert else whole
    free = shutil._ntuple_diskusage(10**9, 0, 3 * 10**6)  # the language model alone would fit
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(CheckpointError, match="the disk is full"):
        action(source, tmp_path / "out")
    assert entries(tmp_path) == ["model", "whole"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("speech_tokenizer.graph", r"cannot read .*speech_tokenizer\.graph .*convert it again"),
        ("params/flow.table/0.0", r"token2wav\.flow\.table|input_embedding\.weight cannot be read"),
        ("params/vocoder.pre.bias/.zarray", "is damaged"),
        ("params/_METADATA", "is no Orbax checkpoint"),
    ],
)
def test_a_damaged_folder_is_not_exported(ours, tmp_path, name, message):
    (ours / name).unlink()
    with pytest.raises(CheckpointError, match=message):
        hf.export(ours, tmp_path / "out")
    assert entries(tmp_path) == ["ours"]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["source"], None, "is damaged"),
        (["source", "form", "vocoder"], {"prefix": ""}, r"is damaged \(KeyError\('spelling'\)"),
        (["source", "form", "flow", "dtypes"], {"all": "int4", "but": {}}, "is damaged"),
        (["config", "flow", "mels"], 81, "flow and vocoder must have the same mel bands"),
        (["config", "flow", "estimator", "layers"], 1, r"flow\.estimator\.blocks.*expected \[1, "),
        (["config", "vocoder"], {}, r"token2wav\.vocoder: unknown or missing"),
    ],
)
def test_damaged_info(ours, tmp_path, path, value, message):
    file = ours / "sa2jax.json"
    info = json.loads(file.read_text())
    node = info
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    file.write_text(json.dumps(info))
    with pytest.raises((CheckpointError, ConfigError), match=message):
        hf.export(ours, tmp_path / "out")
    assert entries(tmp_path) == ["ours"]


def test_only_files_in_onnx_need_its_package(official, ours, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert verify(ours, ours).same
    assert inspect(ours).parts
    for action, source in ((hf.convert, official), (hf.export, ours)):
        with pytest.raises(CheckpointError, match=r'pip install "sa2jax\[convert\]"'):
            action(source, tmp_path / "out")
    assert entries(tmp_path) == ["official", "ours"]


def test_leaves_are_those_of_the_networks(official):
    cfg, params = token2wav.load_official(official)
    abstract = speaker_encoder(cfg.speaker_encoder).abstract
    assert jax.tree.structure(abstract) == jax.tree.structure(params["speaker_encoder"])
    assert sorted(params) == sorted(NETWORKS)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
