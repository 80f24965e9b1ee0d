"""The command line as a user meets it: results on stdout, one line for a mistake."""

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import safetensors.numpy
import soundfile

from sa2jax import cli, pipeline, testing
from sa2jax.cli import common
from sa2jax.convert.weights import SafetensorsFolder
from sa2jax.inference.requests import Generation

RATE = 16_000


@pytest.fixture(scope="module", autouse=True)
def leave_no_traces(tmp_path_factory):
    """No compilation cache in the home folder; what a command puts into the environment goes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "enable_compilation_cache", lambda: None)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("JAX_PLATFORMS", os.environ.get("JAX_PLATFORMS", "cpu"))
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A Hugging Face folder of several shards in bfloat16."""
    folder = tmp_path_factory.mktemp("models") / "source"
    return testing.save_tiny_checkpoint(folder, dtype="bfloat16", shard_bytes=200_000)


@pytest.fixture(scope="module")
def ours(source) -> Path:
    """The same, converted."""
    out = source.parent / "ours"
    cli.main(["convert", str(source), str(out)])
    return out


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> list[Path]:
    """a.wav: 1 s at 16 kHz, mono. b.flac: 1 s at 48 kHz, stereo. c.ogg: 2 s at 8 kHz."""
    folder = tmp_path_factory.mktemp("recordings")
    rng = np.random.default_rng(0)
    paths = [folder / name for name in ("a.wav", "b.flac", "c.ogg")]
    for path, shape, rate in zip(
        paths, [(RATE,), (48_000, 2), (16_000,)], [RATE, 48_000, 8_000], strict=True
    ):
        soundfile.write(path, rng.standard_normal(shape) / 10, rate)
    return paths


@pytest.fixture
def broken(tmp_path) -> Path:
    """A folder with one float32 file that a test may damage."""
    return testing.save_tiny_checkpoint(tmp_path / "broken")


class Scripted:
    """Stands in for the generator: replies as told, remembers what it was asked."""

    replies: ClassVar[list[bytes]] = []
    asked: ClassVar[list] = []

    def __init__(self, model, params, cfg, *, mesh=None):
        pass

    def generate(self, requests, options, *, numbers, decode_text):
        self.asked.append((requests, options))
        replies = {number: self.replies[number] for number in sorted(numbers)}
        return [[Generation(tuple(replies[number]), "stop")] for number in numbers]


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setattr(pipeline, "Generator", Scripted)
    monkeypatch.setattr(Scripted, "asked", [])

    def use(*replies: str) -> type[Scripted]:
        monkeypatch.setattr(Scripted, "replies", [reply.encode() for reply in replies])
        return Scripted

    return use


def entries(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- listening ---


def test_asr(run, ours, recordings):
    """The whole way, from files to texts."""
    code, out, err = run("asr", *recordings, "--model", ours, "--max-new-tokens", 24, "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert [entry["file"] for entry in found] == [str(path) for path in recordings]
    texts = [entry["text"] for entry in found]
    assert all(texts)
    assert len(set(texts)) == 3


@pytest.mark.parametrize("command", ["asr", "translate", "caption"])
def test_text_of_several_files(run, scripted, ours, recordings, command):
    scripted("eins", "zwei", "drei")
    code, out, err = run(command, *recordings, "--model", ours)
    assert (code, err) == (0, "")
    names = [str(path) for path in recordings]
    assert out == "".join(
        f"{n}\t{t}\n" for n, t in zip(names, ["eins", "zwei", "drei"], strict=True)
    )
    assert run(command, recordings[0], "--model", ours) == (0, "eins\n", "")


def test_options_reach_the_model(run, scripted, ours, recordings):
    script = scripted("ja")
    code, out, err = run(
        "translate", recordings[0], "--model", ours, "--to", "en", "--max-new-tokens", 7,
        "--seed", 3, "--json",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert json.loads(out) == [{"file": str(recordings[0]), "text": "ja"}]
    ((request,), options), *_ = script.asked
    assert bytes(i for i in request.ids.tolist() if i < 245).startswith("system\n请仔细".encode())
    assert (options.max_new_tokens, options.seed, options.sampling.temperature) == (7, 3, 0.1)


def test_base_style(run, scripted, source, recordings):
    script = scripted("ja")
    assert run("asr", recordings[0], "--model", source, "--style", "base")[0] == 0
    ((request,), _), *_ = script.asked
    assert request.ids.tolist()[:3] == list("请".encode())


def test_hugging_face_folder_is_taken_as_it_is(run, scripted, source, recordings):
    scripted("ja")
    assert run("asr", recordings[0], "--model", source) == (0, "ja\n", "")


# --- chat ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--text", "x" * 2000), "expected 1 to 1023, since the model's context of 1024 must also"),
        (("--text", "x", "--temperature", "-1"), "temperature=-1.0: expected at least 0"),
        (("--text", "x", "--max-new-tokens", "0"), "max_new_tokens=0, samples=1: expected at lea"),
        (("--text", "x", "--style", "base"), "a base model knows no turns"),
        (("--text", "x", "--mesh", "tensor=999"), "needs 999 devices"),
        (("nowhere.wav",), "no such file: nowhere.wav"),
    ],
)
def test_refused_chat(refused, ours, options, message):
    assert message in refused("chat", *options, "--model", ours)


# --- recordings that cannot be heard ---


def empty(path: Path) -> None:
    soundfile.write(path, np.zeros(0), RATE)


def not_a_number(path: Path) -> None:
    soundfile.write(path, np.array([0.1, np.nan, 0.2], np.float32), RATE, subtype="FLOAT")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_text("not audio"), "bad.wav cannot be read"),
        (lambda path: path.write_bytes(b""), "bad.wav cannot be read"),
        (empty, "bad.wav holds no samples"),
        (not_a_number, "bad.wav holds NaN or Inf"),
        (lambda path: path.mkdir(), "no such file"),
        (lambda path: None, "no such file"),
    ],
)
def test_bad_recording(refused, ours, recordings, tmp_path, make, message):
    path = tmp_path / "bad.wav"
    make(path)
    assert message in refused("asr", recordings[0], path, "--model", ours)


def test_no_recording(refused, ours):
    assert "no recordings: expected at least one" in refused("asr", "--model", ours)


# --- models that cannot be used ---


def test_no_model(refused, recordings, tmp_path):
    line = refused("asr", recordings[0], "--model", tmp_path / "nowhere")
    assert "expected a model folder" in line
    assert "no config.json" in refused("asr", recordings[0], "--model", tmp_path)


def test_no_tokenizer(refused, broken, recordings):
    for path in [*broken.glob("*token*"), *broken.glob("*vocab*"), broken / "merges.txt"]:
        path.unlink()
    assert "no tokenizer in" in refused("asr", recordings[0], "--model", broken)


def strip_audio_tokens(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    keep = lambda token: not token.startswith("<audio_")  # noqa: E731
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] = {token: i for token, i in vocab.items() if keep(token)}
    content["added_tokens"] = [t for t in content["added_tokens"] if keep(t["content"])]
    path.write_text(json.dumps(content))
    for name in ("tokenizer_config.json", "added_tokens.json"):
        (folder / name).unlink()


def test_tokenizer_without_audio_tokens(refused, broken, recordings, tmp_path):
    strip_audio_tokens(broken)
    expected = "not a Step-Audio 2 tokenizer: it lacks <audio_start>, <audio_end>, <audio_patch>"
    assert expected in refused("asr", recordings[0], "--model", broken)
    assert expected in refused("convert", broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tokenizer_of_another_model(refused, ours, recordings, tmp_path):
    """Its ids lie outside the vocabulary."""
    testing.save_tokenizer_files(tmp_path / "large")
    line = refused("asr", recordings[0], "--model", ours, "--tokenizer", tmp_path / "large")
    assert "outside the vocabulary of 512: is this the checkpoint's own tokenizer?" in line


# --- conversion ---


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_there_and_back_bit_for_bit(run, recorded_checkpoint, tmp_path, dtype):
    source = recorded_checkpoint / "llm"
    extra = [] if dtype is None else ["--dtype", dtype]
    code, out, _ = run("convert", source, tmp_path / "ours", *extra)
    assert code == 0
    assert "peak memory" in out
    assert run("export", tmp_path / "ours", tmp_path / "back", "--max-shard-size", "1MB")[0] == 0
    code, out, err = run("verify", source, tmp_path / "back")
    assert (code, err) == (0, "")
    before, after = SafetensorsFolder(source), SafetensorsFolder(tmp_path / "back")
    assert out == f"{len(before.tensors)} tensors compared, 0 differing, largest difference 0\n"
    assert before.tensors.keys() == after.tensors.keys()
    for name in before.tensors:
        assert before.get(name).tobytes() == after.get(name).tobytes(), name


def test_reports_as_json(run, source, tmp_path):
    code, out, err = run("convert", source, tmp_path / "out", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["tensors"] == len(SafetensorsFolder(source).tensors)
    assert report["bytes"] == 2 * report["parameters"]
    assert report["peak_bytes"] > 10**7


def test_verify_finds_a_difference(run, ours, broken):
    testing.save_tiny_checkpoint(broken, dtype="bfloat16", seed=1)
    code, out, _ = run("verify", ours, broken)
    assert code == 1
    assert "differing: " in out
    code, out, _ = run("verify", ours, broken, "--json")
    assert code == 1
    assert len(json.loads(out)["differing"]) == json.loads(out)["compared"]


def test_verify_compares_answers(run, source, ours, recordings):
    code, out, err = run("verify", source, ours, "--text", "hi", "--wav", recordings[0])
    assert (code, err) == (0, "")
    assert "same best token in 100.0%" in out.splitlines()[-1]


@pytest.mark.parametrize("form", ["source", "ours"])
def test_inspect(run, source, form, request):
    folder = request.getfixturevalue(form)
    code, out, err = run("inspect", folder)
    assert (code, err) == (0, "")
    assert "…" not in out  # names are whole though this is no terminal
    code, out, _ = run("inspect", folder, "--json")
    assert code == 0
    found = json.loads(out)
    infos = SafetensorsFolder(source).tensors.values()
    assert found["parts"][-1]["parameters"] == sum(info.size for info in infos)
    assert {part["name"] for part in found["parts"]} == {
        "adapter", "audio_encoder", "decoder", "total"
    }  # fmt: skip


# --- checkpoints that cannot be converted ---


def edit_tensors(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


def edit_config(folder: Path, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)


def misshape(tensors) -> None:
    for name in ("model.norm.weight", "lm_head.weight", "encoder.conv1.bias"):
        tensors[name] = tensors[name][:-1].copy()


DAMAGE = {
    "missing shard": (
        lambda f: (f / "model-00002-of-00003.safetensors").unlink(),
        ["lacks 1 of 3 shards: model-00002-of-00003.safetensors"],
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["model.safetensors"]),
    "truncated": (truncate, ["model.safetensors is truncated: expected"]),
    "unknown tensor": (
        lambda f: edit_tensors(f, lambda t: t.update({"visual.proj": np.ones(3, np.float32)})),
        ["1 unknown tensors: visual.proj"],
    ),
    "missing tensors": (
        lambda f: edit_tensors(f, lambda t: [t.pop("model.norm.weight"), t.pop("lm_head.weight")]),
        ["2 missing tensors: model.norm.weight, lm_head.weight"],
    ),
    "wrong shapes": (
        lambda f: edit_tensors(f, misshape),
        ["got [31]): model.norm.weight", "lm_head.weight", "got [15]): encoder.conv1.bias"],
    ),
    "architecture": (
        lambda f: edit_config(f, lambda c: c.update(architectures=["LlamaForCausalLM"])),
        ["['LlamaForCausalLM']: this is another model's checkpoint"],
    ),
    "unknown key": (
        lambda f: edit_config(f, lambda c: c["text_config"].update(num_experts=8)),
        ["text_config has unknown keys num_experts"],
    ),
    "wrong type": (
        lambda f: edit_config(f, lambda c: c["text_config"].update(hidden_size="32")),
        ["text_config.hidden_size must be a whole number above 0, got '32'"],
    ),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), ["config.json is not valid JSON"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["no config.json"]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint(refused, tmp_path, damage):
    sharded = {"shard_bytes": 300_000} if damage == "missing shard" else {}
    broken = testing.save_tiny_checkpoint(tmp_path / "broken", **sharded)
    apply, parts = DAMAGE[damage]
    apply(broken)
    line = refused("convert", broken, tmp_path / "out")
    for part in parts:
        assert part in line
    assert os.listdir(tmp_path) == ["broken"]


def test_damaged_checkpoint_is_not_run(refused, broken, recordings):
    truncate(broken)
    assert "is truncated" in refused("asr", recordings[0], "--model", broken)
    assert "is truncated" in refused("inspect", broken)
    assert "is truncated" in refused("verify", broken, broken)


@pytest.mark.parametrize("command", ["convert", "export"])
def test_output_that_holds_something_else(refused, source, ours, tmp_path, command):
    folder = {"convert": source, "export": ours}[command]
    (tmp_path / "notes.txt").write_text("mine")
    for extra in ([], ["--overwrite"]):
        assert "already holds something else" in refused(command, folder, tmp_path, *extra)
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_output_that_holds_a_checkpoint(run, refused, source, tmp_path):
    out = tmp_path / "out"
    assert run("convert", source, out)[0] == 0
    before = entries(tmp_path)
    assert "choose another folder or --overwrite" in refused("convert", source, out)
    assert run("convert", source, out, "--overwrite")[0] == 0
    assert entries(tmp_path) == before


def test_wrong_direction(refused, source, ours, tmp_path):
    assert "is converted already" in refused("convert", ours, tmp_path / "out")
    assert "expected a folder made by `sa2jax convert`" in refused(
        "export", source, tmp_path / "out"
    )
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("command", ["convert", "export"])
def test_full_disk(run, refused, source, ours, tmp_path, monkeypatch, command):
    """Noticed before, when the numbers tell, or in the middle: nothing stays behind."""
    folder, out = {"convert": source, "export": ours}[command], tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
        assert "the disk is full" in refused(command, folder, out)
    assert os.listdir(tmp_path) == []

    @contextmanager
    def bar(title, unit="bytes"):
        def tick(done, total):
            if done > total / 2:
                raise OSError(errno.ENOSPC, "No space left on device")

        yield tick

    with monkeypatch.context() as patch:
        patch.setattr(common, "bar", bar)
        assert "the disk is full" in refused(command, folder, out)
    assert os.listdir(tmp_path) == []
    assert run(command, folder, out)[0] == 0


# --- real processes ---


def process(*arguments: object, script: str = "") -> subprocess.CompletedProcess[str]:
    head = ["-c", textwrap.dedent(script)] if script else ["-m", "sa2jax.cli"]
    return subprocess.run(
        [sys.executable, *head, *map(str, arguments)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_process_asr(source, recordings):
    """What a shell sees: text alone on stdout, nothing on stderr."""
    command = ["asr", *recordings[:2], "--model", source, "--max-new-tokens", 4]
    run = process(*command)
    assert (run.returncode, run.stderr) == (0, "")
    lines = run.stdout.rstrip("\n").split("\n")
    assert lines[0].startswith(f"{recordings[0]}\t")


def test_process_mistake(tmp_path):
    run = process("convert", tmp_path / "nowhere", tmp_path / "out")
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("error: no config.json at ")
    assert run.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_process_interrupted(run, source, tmp_path):
    """Ctrl-C in the middle of a conversion; the next run starts clean."""
    script = """
        import os, signal, sys
        from contextlib import contextmanager
        from sa2jax import cli
        from sa2jax.cli import common

        @contextmanager
        def bar(title, unit="bytes"):
            yield lambda done, total: done > total / 2 and os.kill(os.getpid(), signal.SIGINT)

        common.bar = bar
        cli.main(sys.argv[1:])
    """
    stopped = process("convert", source, tmp_path / "out", script=script)
    assert (stopped.returncode, stopped.stdout, stopped.stderr) == (130, "", "interrupted\n")
    assert os.listdir(tmp_path) == []
    assert run("convert", source, tmp_path / "out")[0] == 0


def test_an_interrupt_in_a_callback_of_the_garbage_collector_counts(tmp_path):
    """Python itself would drop it there."""
    script = """
        import gc, os, signal, time
        from sa2jax import cli

        def _xla_gc_callback(*args):
            gc.callbacks.remove(_xla_gc_callback)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)  # it is handled in here

        def command():
            gc.callbacks.append(_xla_gc_callback)
            gc.collect()
            time.sleep(20)

        cli.COMMANDS = {"a": command, "b": command}
        cli.main(["a"])
    """
    stopped = process(script=script)
    assert (stopped.returncode, stopped.stdout, stopped.stderr) == (130, "", "interrupted\n")


# --- help and mistyped commands ---


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help(run, command):
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "")
    assert f"usage: sa2jax {command}" in out
    summary = (cli.COMMANDS[command].__doc__ or "").splitlines()[0]
    assert summary in out.replace("\n", " ")


def test_help_does_not_import_jax():
    script = """
        import sys
        from sa2jax import cli
        try:
            cli.main(["--help"])
        except SystemExit:
            print("jax" in sys.modules)
    """
    assert process(script=script).stdout.endswith("False\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Expected one of {asr"),
        (["transcribe"], "transcribe"),
        (["asr", "a.wav", "--model", "m", "--beams", "4"], "--beams"),
        (["convert", "a", "b", "--dtype", "int4"], "int4"),
    ],
)
def test_mistyped_command(run, arguments, message):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
