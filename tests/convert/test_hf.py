import errno
import json
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from helpers.devices import environment, run_on_devices

from sa2jax import checkpoint
from sa2jax.assets import model_folder
from sa2jax.config import StepAudio2Config
from sa2jax.convert import hf, weights
from sa2jax.convert.verify import verify
from sa2jax.errors import CheckpointError, ConfigError
from sa2jax.models.step_audio import step_audio2


@pytest.fixture
def tensors(source) -> dict[str, np.ndarray]:
    """Every tensor of the source in float32."""
    return read(source, np.float32)


def read(folder: Path, dtype=None) -> dict[str, np.ndarray]:
    found = weights.SafetensorsFolder(folder)
    return {name: np.array(found.get(name), dtype) for name in found.tensors}


def write_single(folder: Path, source: Path, tensors: dict[str, np.ndarray]) -> Path:
    """A folder with one file, written by the safetensors library."""
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def entries(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# --- there and back ---


@pytest.mark.both_pairs
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_round_trip_is_bit_for_bit(source, tmp_path, dtype):
    report = hf.convert(source, tmp_path / "ours", dtype=dtype)
    hf.export(tmp_path / "ours", tmp_path / "back", max_shard_size="300KB")
    before, after = weights.SafetensorsFolder(source), weights.SafetensorsFolder(tmp_path / "back")
    assert set(before.tensors.items()) == set(after.tensors.items())
    assert report.tensors == len(before.tensors)
    for name in before.tensors:
        assert before.get(name).tobytes() == after.get(name).tobytes(), name
    for file in source.iterdir():
        if file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
            assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()
    assert entries(tmp_path) == ["back", "ours"]


@pytest.mark.both_pairs
def test_cast_is_recorded_and_stored(source, tmp_path):
    hf.convert(source, tmp_path / "ours", dtype="float32")
    leaves = checkpoint.open_leaves(tmp_path / "ours")
    assert {leaf.dtype.name for leaf in leaves.values()} == {"float32"}
    info = checkpoint.read_info(tmp_path / "ours")
    assert info["dtype"] == "float32"
    assert info["source_dtypes"] == {"all": "bfloat16", "but": {}}


def test_export_in_float32_is_what_the_safetensors_library_reads(source, tmp_path, tensors):
    hf.convert(source, tmp_path / "ours")
    hf.export(tmp_path / "ours", tmp_path / "back", dtype="float32")
    theirs = safetensors.numpy.load_file(tmp_path / "back" / "model.safetensors")
    assert set(theirs) == set(tensors)
    for name, array in tensors.items():
        np.testing.assert_array_equal(theirs[name], array)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["torch_dtype"] == "float32"
    assert config["text_config"]["torch_dtype"] == "float32"


def test_single_file_of_mixed_dtypes_comes_back_as_it_was(source, tmp_path, tensors):
    norm = "model.layers.1.input_layernorm.weight"  # its stack also holds a float16 layer
    mixed = {name: array.astype(np.float16) for name, array in tensors.items()}
    mixed[norm] = tensors[norm] + np.float32(1e-7)
    folder = write_single(tmp_path / "mixed", source, mixed)
    hf.convert(folder, tmp_path / "ours")
    hf.export(tmp_path / "ours", tmp_path / "back")
    after = safetensors.numpy.load_file(tmp_path / "back" / "model.safetensors")
    for name, array in mixed.items():
        assert after[name].dtype == array.dtype
        assert after[name].tobytes() == array.tobytes()


def test_both_vocabulary_matrices_survive_and_differ(source, tmp_path, tensors):
    hf.convert(source, tmp_path / "ours")
    decoder = checkpoint.load_params(tmp_path / "ours", dtype=jnp.float32)["decoder"]
    np.testing.assert_array_equal(decoder["table"], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(decoder["head"]["kernel"], tensors["lm_head.weight"])
    assert not np.array_equal(decoder["table"], decoder["head"]["kernel"])


def test_large_tensors_are_moved_in_blocks(source, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 600)
    monkeypatch.setattr(checkpoint, "SMALL_BYTES", 300)
    calls = []
    hf.convert(source, tmp_path / "ours", progress=lambda done, total: calls.append((done, total)))
    hf.export(tmp_path / "ours", tmp_path / "back")
    assert len(calls) > 500
    assert calls[-1][0] == calls[-1][1]
    assert verify(source, tmp_path / "back").same
    assert len(list((tmp_path / "ours" / "params" / "decoder.table").iterdir())) > 100


def test_shards_respect_their_limit(source, tmp_path):
    hf.convert(source, tmp_path / "ours")
    hf.export(tmp_path / "ours", tmp_path / "back", max_shard_size=400_000)
    shards = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        names = [n for n in json.loads(_header(shard)) if n != "__metadata__"]
        assert shard.stat().st_size < 410_000 or len(names) == 1
    assert json.loads(_header(shards[0]))["__metadata__"] == {"format": "pt"}


def _header(path: Path) -> bytes:
    data = path.read_bytes()
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def test_side_files_are_kept_and_foreign_weights_left_out(broken, tmp_path):
    for name in ("preprocessor.json", "assets/voice.wav", "modeling_step_audio_2.py"):
        path = broken / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(name.encode())
    (broken / "token2wav").mkdir()
    for name in ("token2wav/flow.pt", "training_args.bin", ".gitattributes"):
        (broken / name).write_bytes(b"x")
    report = hf.convert(broken, tmp_path / "ours")
    hf.export(tmp_path / "ours", tmp_path / "back")
    assert (tmp_path / "back" / "assets" / "voice.wav").read_bytes() == b"assets/voice.wav"
    assert (tmp_path / "back" / "preprocessor.json").exists()
    assert (tmp_path / "back" / "modeling_step_audio_2.py").exists()
    assert report.left_out == ("token2wav/flow.pt", "training_args.bin")
    assert any("token2wav has no flow.yaml" in note for note in report.notes)
    assert not (tmp_path / "back" / ".gitattributes").exists()
    assert not (tmp_path / "back" / "sa2jax.json").exists()


# --- onto devices ---


def test_buffers_are_no_weights(source, tmp_path, tensors):
    """Older versions of transformers saved rotary frequencies; int64 and bool count or mask."""
    buffers = {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32) for i in range(2)
    }
    buffers |= {"encoder.positions": np.arange(9), "encoder.mask": np.ones(3, np.bool_)}
    folder = write_single(tmp_path / "saved", source, tensors | buffers)
    report = hf.convert(folder, tmp_path / "ours")
    names = "encoder.positions, encoder.mask"
    (note,) = (note for note in report.notes if note.startswith("left out"))
    assert note.startswith(f"left out of {folder}: ")
    assert sorted(note.split(": ")[1].split(", ")) == sorted(
        [*names.split(", "), "model.layers.{0-1}.self_attn.rotary_emb.inv_freq"]
    )
    assert verify(folder, tmp_path / "ours").same


def test_plain_orbax_restores_what_convert_wrote(source, tmp_path):
    hf.convert(source, tmp_path / "ours")
    abstract = step_audio2(StepAudio2Config.from_hf(source)).abstract
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=place), abstract
    )
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "ours" / "params", target)
    jax.tree.map(np.testing.assert_array_equal, restored, hf.load_hf(source))


def test_loading_a_hugging_face_folder_equals_converting_it(source, tmp_path):
    hf.convert(source, tmp_path / "ours", dtype="float32")
    converted = checkpoint.load_params(tmp_path / "ours")
    loaded = hf.load_hf(source, dtype=np.float32)
    assert jax.tree.structure(loaded) == jax.tree.structure(converted)
    jax.tree.map(np.testing.assert_array_equal, loaded, converted)
    assert {x.dtype for x in jax.tree.leaves(loaded)} == {np.dtype(np.float32)}
    assert hf.load_hf(source)["decoder"]["table"].dtype == ml_dtypes.bfloat16


@pytest.mark.both_pairs
def test_both_ways_of_loading_fill_shards(source, tmp_path):
    script = """
        import sys, jax, numpy as np
        from pathlib import Path
        from sa2jax import checkpoint
        from sa2jax.config import StepAudio2Config
        from sa2jax.convert import hf
        from sa2jax.models.step_audio import step_audio2
        from sa2jax.sharding import make_mesh
        source, out = map(Path, sys.argv[1:])
        hf.convert(source, out)
        plain = hf.load_hf(source)
        mesh = make_mesh("fsdp=2,tensor=2")
        shardings = step_audio2(StepAudio2Config.from_hf(source)).shardings(mesh)
        for loaded in (hf.load_hf(source, shardings), checkpoint.load_params(out, shardings)):
            jax.tree.map(np.testing.assert_array_equal, loaded, plain)
            for leaf, place in zip(jax.tree.leaves(loaded), jax.tree.leaves(shardings)):
                assert leaf.sharding == place, (leaf.sharding, place)
        parts = [x.sharding.shard_shape(x.shape) != x.shape for x in jax.tree.leaves(loaded)]
        print("split leaves", sum(parts))
    """
    command = ["-c", textwrap.dedent(script), source, tmp_path / "ours"]
    run = run_on_devices(4, command, tmp_path / "cache")
    assert int(run.stdout.split()[-1]) > 10


def test_a_detokenizer_that_was_never_released_stays_behind(tmp_path):
    """The model that comes along: its language model goes to and fro, the rest cannot."""
    nano = model_folder("nano")
    report = hf.export(nano, tmp_path / "out")
    (note,) = report.notes
    assert "token2wav was trained from nothing" in note
    assert "it is left out" in note
    assert not (tmp_path / "out" / "token2wav").exists()
    hf.convert(tmp_path / "out", tmp_path / "back")
    result = verify(nano, tmp_path / "back")
    assert result.differing == ()
    assert all(name.startswith("token2wav.") for name in result.only_a)
    with pytest.raises(CheckpointError, match="no released form"):
        hf.export(nano / "token2wav", tmp_path / "alone")
    assert not (tmp_path / "alone").exists()


# --- bad input: one clear line, nothing left behind ---


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_another_architecture_is_refused(broken, tmp_path):
    edit_config(broken, architectures=["Qwen2ForCausalLM"])
    with pytest.raises(ConfigError, match="Qwen2ForCausalLM"):
        hf.convert(broken, tmp_path / "out")
    assert entries(tmp_path) == ["broken"]


def test_wrong_tensors_are_reported_all_at_once(source, tmp_path, tensors):
    tensors["visual.patch.weight"] = tensors["lm_head.weight"]
    del tensors["model.norm.weight"], tensors["adapter.conv.bias"]
    tensors["encoder.conv1.bias"] = np.zeros(3, np.float32)
    folder = write_single(tmp_path / "wrong", source, tensors)
    with pytest.raises(CheckpointError) as error:
        hf.convert(folder, tmp_path / "out")
    message = str(error.value)
    assert "1 unknown tensors: visual.patch.weight" in message
    assert "2 missing tensors: model.norm.weight, adapter.conv.bias" in message
    assert "got [3]): encoder.conv1.bias" in message
    assert entries(tmp_path) == ["wrong"]


def test_config_of_another_size_is_refused(broken, tmp_path):
    text = json.loads((broken / "config.json").read_text())["text_config"]
    edit_config(broken, text_config=text | {"num_hidden_layers": text["num_hidden_layers"] + 1})
    with pytest.raises(CheckpointError, match=r"12 missing tensors: model\.layers\.2\."):
        hf.convert(broken, tmp_path / "out")


# Value and message. More than 1024 layers are refused before any tensor is read.
NO_SUCH_SIZES = {
    "text_config.num_hidden_layers": (1000, "expected 1000 of model.layers.{layer}.input_la"),
    "audio_encoder_config.n_audio_layer": (1000, "expected 1000 of encoder.blocks.{layer}"),
    "text_config.intermediate_size": (10**6, "expected [1000000, 64], got [160, 64]"),
    "audio_encoder_config.n_audio_ctx": (10**6, "expected [1000000, 48], got [1500, 48]"),
    "text_config.vocab_size": (10**6, "the vocabulary was resized to 512 tokens, vocab_size says"),
}


@pytest.mark.parametrize("place", NO_SUCH_SIZES)
def test_sizes_that_no_tensor_has_are_refused_by_the_tensors(broken, tmp_path, place):
    (section, key), (size, message) = place.split("."), NO_SUCH_SIZES[place]
    raw = json.loads((broken / "config.json").read_text())[section]
    edit_config(broken, **{section: raw | {key: size}})
    with pytest.raises(CheckpointError) as error:
        hf.convert(broken, tmp_path / "out")
    assert message in str(error.value)
    assert entries(tmp_path) == ["broken"]


@pytest.mark.parametrize("action", [hf.convert, hf.export])
def test_unknown_dtype_is_refused(source, tmp_path, action):
    if action is hf.export:
        hf.convert(source, tmp_path / "ours")
        source = tmp_path / "ours"
    with pytest.raises(CheckpointError, match="'int4': expected one of float32, float16, bfloat16"):
        action(source, tmp_path / "out", dtype="int4")
    assert not (tmp_path / "out").exists()


def test_direction_mistakes_are_explained(source, tmp_path):
    hf.convert(source, tmp_path / "ours")
    with pytest.raises(CheckpointError, match="converted already"):
        hf.convert(tmp_path / "ours", tmp_path / "out")
    with pytest.raises(CheckpointError, match="expected a folder made by `sa2jax convert`"):
        hf.export(source, tmp_path / "out")


def test_output_that_holds_something_else_is_never_touched(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="already holds something else"):
            hf.convert(source, out, overwrite=overwrite)
    assert entries(out) == ["thesis.txt"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="already holds something else"):
        hf.convert(source, tmp_path / "file", overwrite=True)
    assert entries(tmp_path) == ["file", "out"]


def test_existing_checkpoint_needs_overwrite(source, tmp_path):
    hf.convert(source, tmp_path / "out")
    (tmp_path / "out" / "old").write_text("")
    with pytest.raises(CheckpointError, match="--overwrite"):
        hf.convert(source, tmp_path / "out")
    assert (tmp_path / "out" / "old").exists()
    hf.convert(source, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "old").exists()
    assert entries(tmp_path) == ["out"]


def test_empty_output_folder_is_used(source, tmp_path):
    (tmp_path / "out").mkdir()
    hf.convert(source, tmp_path / "out")
    assert verify(source, tmp_path / "out").same


@pytest.mark.parametrize("action", ["convert", "export"])
@pytest.mark.parametrize(
    ("interruption", "raised"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.ENOSPC, "No space left on device"), CheckpointError),
        (
            ValueError("Error writing /x/0.0: [tensorstore] No space left on device"),
            CheckpointError,
        ),
    ],
)
def test_interrupted_run_leaves_nothing_and_can_be_repeated(
    source, tmp_path, action, interruption, raised
):
    run = hf.convert
    if action == "export":
        hf.convert(source, tmp_path / "ours")
        run, source = hf.export, tmp_path / "ours"
    before, calls = entries(tmp_path), []

    def interrupt(done: int, total: int) -> None:
        calls.append(done)
        if done > total / 2:
            raise interruption

    with pytest.raises(raised, match="disk is full" if raised is CheckpointError else None):
        run(source, tmp_path / "out", progress=interrupt)
    assert len(calls) > 3
    assert entries(tmp_path) == before
    run(source, tmp_path / "out")
    assert verify(source, tmp_path / "out").same


def test_interrupted_overwrite_keeps_the_old_checkpoint(source, tmp_path):
    hf.convert(source, tmp_path / "out")

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hf.convert(source, tmp_path / "out", overwrite=True, progress=interrupt)
    assert verify(source, tmp_path / "out").same
    assert entries(tmp_path) == ["out"]


def test_rerun_clears_what_a_killed_run_left(source, tmp_path):
    script = """
        import os, signal, sys
        from sa2jax.convert import hf
        hf.convert(*sys.argv[1:], progress=lambda done, total: os.kill(os.getpid(), signal.SIGKILL))
    """
    command = [sys.executable, "-c", textwrap.dedent(script), source, tmp_path / "out"]
    run = subprocess.run(command, env=environment(1, tmp_path), timeout=600)
    assert run.returncode == -signal.SIGKILL
    assert entries(tmp_path) == [".out.sa2jax-lock", ".out.sa2jax-partial"]
    hf.convert(source, tmp_path / "out")
    assert entries(tmp_path) == ["out"]
    assert verify(source, tmp_path / "out").same


@pytest.mark.parametrize("run", [hf.convert, hf.export])
def test_too_small_a_disk_is_noticed_before_writing(source, tmp_path, monkeypatch, run):
    if run is hf.export:
        hf.convert(source, tmp_path / "ours")
        source = tmp_path / "ours"
    usage = shutil._ntuple_diskusage(10, 9, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"the disk is full: .* GB are needed"):
        run(source, tmp_path / "out")
    assert "out" not in "".join(entries(tmp_path))


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("decoder.table/0.0", r"model\.embed_tokens\.weight cannot be read"),
        ("decoder.norm.scale/.zarray", "is damaged"),
        ("_METADATA", "is no Orbax checkpoint"),
    ],
)
def test_damaged_model_folder_is_not_exported(source, tmp_path, missing, message):
    hf.convert(source, tmp_path / "ours")
    (tmp_path / "ours" / "params" / missing).unlink()
    with pytest.raises(CheckpointError, match=message):
        hf.export(tmp_path / "ours", tmp_path / "out")
    assert entries(tmp_path) == ["ours"]


def test_model_folder_with_another_config_is_not_exported(source, tmp_path):
    hf.convert(source, tmp_path / "ours")
    text = json.loads((tmp_path / "ours" / "config.json").read_text())["text_config"]
    edit_config(tmp_path / "ours", text_config=text | {"intermediate_size": 8})
    with pytest.raises(CheckpointError, match=r"decoder\.layers\.mlp\.down\.kernel: expected"):
        hf.export(tmp_path / "ours", tmp_path / "out")
