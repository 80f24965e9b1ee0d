"""The network is Silero's: as recorded, as it runs on onnxruntime, and as its file says."""

import numpy as np
import pytest
from helpers.silero import original, released, sounds
from safetensors.numpy import save_file

from sa2jax.assets import SILERO_VAD
from sa2jax.audio.silero import SHAPES, SileroVAD
from sa2jax.audio.vad import SpeechDetector, SpeechStream, VADState, push_streams
from sa2jax.convert.silero_vad import convert_silero_vad
from sa2jax.errors import AudioError, CheckpointError
from sa2jax.files.safetensors_files import read_safetensors

NEEDS = pytest.mark.skipif(released() is None, reason="needs silero-vad: install sa2jax[parity]")


@pytest.fixture(scope="module")
def heard() -> dict[str, np.ndarray]:
    return sounds()


@pytest.mark.both_pairs
def test_probabilities_are_those_that_were_recorded(heard, golden):
    recorded = np.load(golden / "silero_vad.npz")
    assert set(recorded) == set(heard)
    for name, samples in heard.items():
        found = SpeechStream().push(samples)
        np.testing.assert_allclose(found, recorded[name], atol=1e-5, rtol=0, err_msg=name)
    # And so that they mean something: speech is, the rest is not.
    assert {name: bool(np.median(recorded[name]) > 0.9) for name in recorded} == {
        "speech": True,
        "noisy speech": True,
        "music": False,
        "noise": False,
        "silence": False,
    }
    assert max(recorded[name].max() for name in ("noise", "silence")) < 0.3


@NEEDS
@pytest.mark.oracle
def test_probabilities_are_those_of_onnxruntime(heard):
    pytest.importorskip("onnxruntime")
    network = original(released())
    for name, samples in heard.items():
        samples = samples[: 512 * 300]
        found = SpeechStream().push(samples)
        np.testing.assert_allclose(found, network(samples), atol=1e-5, rtol=0, err_msg=name)


@NEEDS
@pytest.mark.oracle
def test_the_file_is_made_from_the_released_one(tmp_path):
    pytest.importorskip("onnx")
    made = convert_silero_vad(released(), tmp_path / "made.safetensors")
    shipped, _ = read_safetensors(SILERO_VAD)
    assert made.keys() == shipped.keys()
    for name, array in made.items():
        np.testing.assert_array_equal(array, shipped[name], err_msg=name)
    assert (tmp_path / "made.safetensors").read_bytes() == SILERO_VAD.read_bytes()


def test_the_license_comes_along():
    assert "MIT License" in SILERO_VAD.with_name("LICENSE").read_text(encoding="utf-8")


@pytest.mark.parametrize("change", ["lost", "shape"])
def test_other_files_are_refused(tmp_path, change):
    tensors = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    wrong = tensors.pop("lstm.bias")
    if change == "shape":
        tensors["lstm.bias"] = wrong[:100]
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"lstm.bias are missing or have other shapes"):
        SileroVAD.load(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="install sa2jax again"):
        SileroVAD.load(tmp_path / "gone.safetensors")


@pytest.mark.parametrize("damage", ["names", "spectrum"])
def test_other_networks_are_not_converted(tmp_path, damage):
    """A graph with the names of Silero's, and numbers that are not its own."""
    onnx = pytest.importorskip("onnx")
    from sa2jax.convert.silero_vad import TENSORS

    arrays = {name: np.zeros(shape, np.float32) for name, shape in TENSORS.items()}
    if damage == "names":
        del arrays["model.decoder.rnn.bias_hh"]
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Identity", ["input"], ["output"])
    ends = [value(name, onnx.TensorProto.FLOAT, [1]) for name in ("input", "output")]
    graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:], tensors)
    onnx.save(onnx.helper.make_model(graph), tmp_path / "a.onnx")
    expected = "it has no model.decoder.rnn.bias_hh" if damage == "names" else "the spectrum is not"
    with pytest.raises(CheckpointError, match=expected):
        convert_silero_vad(tmp_path / "a.onnx", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


# --- many streams ---


def test_a_stream_does_not_depend_on_the_others(heard):
    """Nor on the blocks that it comes in, nor on when others begin and end."""
    x = heard["speech"][: 512 * 40]
    alone = SpeechStream().push(x)
    detector = SpeechDetector()
    both = np.stack([x, x[::-1]])
    first, state = detector.step(both[:, : 512 * 15], detector.start(2))
    second, _ = detector.step(both[:, 512 * 15 :], state)
    np.testing.assert_allclose(np.concatenate([first[0], second[0]]), alone, atol=2e-6)
    again, _ = detector.step(both[:, 512 * 15 :], state)  # a state is not used up
    np.testing.assert_array_equal(again, second)
    third, _ = detector.step(both[:1, 512 * 15 :], VADState.concat([state[:1]]))
    np.testing.assert_allclose(third[0], alone[15:], atol=2e-6)


def test_streams_come_in_blocks_of_any_length(heard):
    x = heard["speech"][: 512 * 20 + 100]
    alone = SpeechStream().push(x)
    streams = [SpeechStream() for _ in range(3)]
    found, rng, sent = [[], [], []], np.random.default_rng(0), [0, 0, 0]
    while min(sent) < len(x):
        sizes = rng.integers(0, 1300, 3)
        blocks = [x[at : at + size] for at, size in zip(sent, sizes, strict=True)]
        for row, given in zip(found, push_streams(streams, blocks), strict=True):
            row.append(given)
        sent = [at + len(block) for at, block in zip(sent, blocks, strict=True)]
    for row, stream in zip(found, streams, strict=True):
        np.testing.assert_allclose(np.concatenate(row), alone, atol=2e-6)
        assert stream.held == 100
    assert push_streams([], []) == []


def test_what_is_no_samples_is_refused():
    stream, detector = SpeechStream(), SpeechDetector()
    with pytest.raises(AudioError, match="divide int16 samples by 32768"):
        stream.push(np.zeros(512, np.int16))
    with pytest.raises(AudioError, match="expected finite samples"):
        stream.push(np.full(512, np.nan, np.float32))
    with pytest.raises(AudioError, match=r"a multiple of 512, got \[1, 500\]"):
        detector.step(np.zeros((1, 500), np.float32), detector.start())
    with pytest.raises(AudioError, match=r"expected samples \[1, T\]"):
        detector.step(np.zeros((2, 512), np.float32), detector.start())
    assert len(stream.push(np.zeros(512, np.float32))) == 1  # it lives on
