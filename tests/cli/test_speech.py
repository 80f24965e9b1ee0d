"""The commands of speech alone, as a user runs them."""

import json

import numpy as np
import pytest
import soundfile
from helpers.small_speech import SPEAKER, save_networks

from sa2jax import audio, cli
from sa2jax.speech import store


@pytest.fixture(scope="module")
def model(golden, tmp_path_factory):
    """A small detokenizer with a voice."""
    folder = save_networks(tmp_path_factory.mktemp("model") / "ours", SPEAKER)
    prompt = golden / "t2w_golden" / "prompt.wav"
    cli.main(["voice", "add", "anna", str(prompt), "--model", str(folder)])
    return folder


@pytest.fixture(scope="module")
def recording(golden, tmp_path_factory):
    """1.2 s at 24 kHz, stereo."""
    samples, rate = soundfile.read(golden / "t2w_golden" / "prompt.wav", dtype="float32")
    samples = samples if samples.ndim == 1 else samples[:, 0]
    path = tmp_path_factory.mktemp("recordings") / "clip.flac"
    soundfile.write(path, np.stack([samples, samples], axis=1), rate)
    return path


@pytest.fixture
def codes(tmp_path):
    path = tmp_path / "codes.json"
    path.write_text(json.dumps([7, 12, 4218, 6561, 99] * 6))
    return path


@pytest.mark.both_pairs
def test_recording_to_codes_and_back(run, model, recording, tmp_path):
    code, out, err = run("tokenize", recording, "--model", model)
    assert (code, err) == (0, "")
    codes = json.loads(out)
    seconds = soundfile.info(recording).duration
    assert len(codes) == -(-seconds // 0.04)
    (tmp_path / "codes.json").write_text(out)
    wav = tmp_path / "out.wav"
    command = ["vocode", tmp_path / "codes.json", "--voice", recording, "-o", wav]
    code, out, err = run(*command, "--model", model)
    assert (code, err) == (0, "")
    assert out.startswith(f"{wav}: {len(codes) / 25:.2f} s in the voice clip, made in ")
    info = soundfile.info(wav)
    assert (info.samplerate, info.channels, info.subtype) == (24_000, 1, "PCM_16")
    assert info.frames == 960 * len(codes)
    again = tmp_path / "again.wav"
    assert run("reconstruct", recording, "-o", again, "--model", model)[0] == 0
    assert again.read_bytes() == wav.read_bytes()


def test_tokenize_many(run, model, recording):
    one = json.loads(run("tokenize", recording, "--model", model)[1])
    single = json.loads(run("tokenize", recording, "--json", "--model", model)[1])
    assert single == {"file": str(recording), "codes": one}
    both = json.loads(run("tokenize", recording, recording, "--model", model)[1])
    assert both == [single, single]


def test_tokenize_leaves_out_what_cannot_be_read(run, model, recording, tmp_path):
    bad, click = tmp_path / "bad.wav", tmp_path / "click.wav"
    bad.write_text("no sound")
    soundfile.write(click, np.ones(80) / 2, 16_000)
    code, out, err = run("tokenize", bad, recording, click, "--model", model)
    found = json.loads(out)
    assert (code, [list(entry)[1] for entry in found]) == (1, ["error", "codes", "error"])
    assert err.count("\n") == err.count("error: ") == 2
    assert f"{bad} cannot be read" in err
    assert f"{click}: expected at least 320 samples" in err


def test_the_channel_of_a_voice(run, model, recording, tmp_path):
    """Without one, codes are of the first and mel frames of the mean, as officially."""
    samples, rate = soundfile.read(recording, always_2d=True)
    stereo = tmp_path / "stereo.wav"
    soundfile.write(stereo, np.stack([samples[:, 0] * 0, samples[:, 0]], axis=1), rate)
    line = run("tokenize", stereo, "--channel", 1, "--model", model)[1]
    assert line == run("tokenize", recording, "--model", model)[1]
    code, _, err = run("voice", "add", "eve", stereo, "--model", model)
    assert (code, "channel 0 stays below -60 dB" in err, "another --channel" in err) == (
        2,
        True,
        True,
    )
    assert run("voice", "add", "eve", stereo, "--channel", 1, "--model", model)[0] == 0
    made, whole = (store.SpeechFolder(model).voice(v) for v in ("eve", recording))
    np.testing.assert_array_equal(made.codes, whole.codes)
    np.testing.assert_allclose(made.mel, whole.mel, atol=1e-4)
    store.SpeechFolder(model).voices["eve"].unlink()


def test_the_channel_of_a_voice_that_is_a_recording(run, model, recording, codes, tmp_path):
    samples, rate = soundfile.read(recording, always_2d=True)
    stereo, out = tmp_path / "stereo.wav", tmp_path / "out.wav"
    soundfile.write(stereo, np.stack([samples[:, 0] * 0, samples[:, 0]], axis=1), rate)
    say = ("vocode", codes, "-o", out, "--model", model, "--voice", stereo)
    code, _, err = run(*say)
    assert (code, "channel 0 stays below -60 dB" in err) == (2, True)
    assert run(*say, "--voice-channel", 1)[0] == 0
    shown = json.loads(run("voice", "show", stereo, "--channel", 1, "--json", "--model", model)[1])
    with_python = store.SpeechFolder(model).voice(audio.AudioSource(stereo, 1))
    assert shown["hash"] == with_python.hash
    for voice, got in (("anna", "'anna', which is none"), (tmp_path / "no.wav", "no.wav', which")):
        code, _, err = run(*say[:-1], voice, "--voice-channel", 0)
        assert (code, err.count("\n")) == (2, 1)
        assert "--voice-channel 0 is for a recording of a voice, got" in err
        assert got in err
    code, _, err = run(*say[:-2], "--voice-channel", 0)
    assert (code, "got no voice" in err) == (2, True)
    assert (
        "--channel 1 is for a recording"
        in run("voice", "show", "anna", "--channel", 1, "--model", model)[2]
    )


@pytest.mark.slow
def test_stream(run, model, codes, tmp_path):
    whole, stream, official = (tmp_path / f"{name}.wav" for name in ("whole", "stream", "official"))
    where = ["--model", model]
    assert run("vocode", codes, "-o", whole, *where)[0] == 0
    assert run("vocode", codes, "-o", stream, "--stream", "--chunk", 20, *where)[0] == 0
    more = ["--stream", "--parity", "--chunk", 20, *where]
    assert run("vocode", codes, "-o", official, *more)[0] == 0
    first, second, third = (soundfile.read(p)[0] for p in (whole, stream, official))
    assert first.shape == second.shape == third.shape == (24 * 960,)
    assert np.abs(second - third).max() > 1e-3
    other = tmp_path / "other.wav"
    assert run("vocode", codes, "-o", other, "--seed", 3, *where)[0] == 0
    assert whole.read_bytes() != other.read_bytes()


def test_codes_in_an_object_and_from_stdin(run, model, codes, tmp_path, monkeypatch):
    first, second, third = (tmp_path / f"{i}.wav" for i in range(3))
    assert run("vocode", codes, "-o", first, "--model", model)[0] == 0
    line = json.loads(codes.read_text())
    codes.write_text(json.dumps({"codes": line, "file": "a.wav"}))
    assert run("vocode", codes, "-o", second, "--model", model)[0] == 0
    monkeypatch.setattr("sys.stdin", codes.open())
    assert run("vocode", "-", "-o", third, "--model", model)[0] == 0
    assert first.read_bytes() == second.read_bytes() == third.read_bytes()


@pytest.mark.both_pairs
def test_voices(run, refused, model, recording):
    code, out, err = run("voice", "list", "--model", model)
    assert (code, out, err) == (0, f"anna\t{model}/voices/anna.safetensors\n", "")
    code, out, err = run("voice", "add", "bert", recording, "--model", model)
    assert (code, err) == (0, "")
    assert out == "bert: 1.2 s, 31 codes\n"
    assert "already" in refused("voice", "add", "bert", recording, "--model", model)
    assert run("voice", "add", "bert", recording, "--overwrite", "--model", model)[0] == 0
    listed = json.loads(run("voice", "list", "--json", "--model", model)[1])
    assert list(listed) == ["anna", "bert"]
    shown = json.loads(run("voice", "show", "bert", "--json", "--model", model)[1])
    assert (shown["name"], shown["codes"]) == ("bert", 31)
    plain = run("voice", "show", "anna", "--model", model)[1]
    assert plain.splitlines()[0] == "name\tanna"
    (model / "voices" / "bert.safetensors").unlink()


@pytest.mark.slow
def test_speech_of_a_released_folder(run, golden, codes, recording, tmp_path):
    """Not converted first."""
    wav = tmp_path / "out.wav"
    command = ["vocode", codes, "--voice", recording, "-o", wav, "--model", golden / "token2wav"]
    assert run(*command)[0] == 0
    assert soundfile.info(wav).frames == 24 * 960


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "no codes"),
        ("[1, 2", "not valid JSON"),
        ('{"ids": [1]}', "expected a JSON list of whole numbers"),
        ("[1, 2.5]", "expected a JSON list of whole numbers"),
        ("[true]", "expected a JSON list of whole numbers"),
        ("[1, -4]", "code -4 at place 1: expected 0 to 6560"),
        ("[151700]", "subtract the id of <audio_0>"),
    ],
)
@pytest.mark.parametrize("how", [[], ["--stream"]], ids=["whole", "stream"])
def test_bad_codes(refused, model, tmp_path, text, message, how):
    path = tmp_path / "codes.json"
    path.write_text(text)
    out = tmp_path / "out.wav"
    assert message in refused("vocode", path, "-o", out, *how, "--model", model)
    assert not out.exists()


def test_mistakes(refused, model, codes, recording, tmp_path):
    wav, where = tmp_path / "out.wav", ["--model", model]
    short, silent = tmp_path / "short.wav", tmp_path / "silent.wav"
    soundfile.write(short, np.random.default_rng(0).normal(0, 0.1, 3200), 16_000)
    soundfile.write(silent, np.zeros(48_000), 24_000)
    mistakes = [
        (["vocode", tmp_path / "no.json", "-o", wav], "cannot be read"),
        (["vocode", codes, "-o", tmp_path / "out.mp3"], "ending in .wav"),
        (["vocode", codes, "-o", tmp_path / "no" / "out.wav"], "make it first"),
        (["vocode", codes, "-o", wav, "--voice", "nobody"], "no voice 'nobody'"),
        (["vocode", codes, "-o", wav, "--stream", "--chunk", 0], "at least 1 code"),
        (["vocode", codes, "-o", wav, "--steps", 0], "steps"),
        (["vocode", codes, "-o", wav, "--voice", short], "got 0.20 s"),
        (["tokenize"], "no recordings"),
        (["tokenize", tmp_path / "no.wav"], "no such file"),
        (["reconstruct", silent, "-o", wav], "stays below -60 dB"),
        (["reconstruct", codes, "-o", wav], "cannot be read"),
        (["voice", "add", "a/b", recording], "voice name"),
        (["voice", "add", "bert", tmp_path / "no.wav"], "no such file"),
        (["voice", "add", "bert", short], "got 0.20 s"),
        (["voice", "show", "nobody"], "no voice 'nobody'"),
    ]
    for command, message in mistakes:
        assert message in refused(*command, *where), command
    assert not wav.exists()
    assert list(store.SpeechFolder(model).voices) == ["anna"]
    assert "no folder" in refused("voice", "list", "--model", tmp_path / "nowhere")
    assert "has no detokenizer" in refused("voice", "list", "--model", tmp_path)


def test_help_of_actions(run):
    for action in ("add", "list", "show"):
        code, out, err = run("voice", action, "--help")
        assert (code, err) == (0, "")
        assert f"usage: sa2jax voice {action}" in out
