"""From recordings to a detokenizer that has learnt, as a user types it."""

import json
import shutil
from contextlib import contextmanager

import jax
import numpy as np
import pytest
import soundfile
import yaml
from helpers.small_speech import SPEAKER, save_networks
from helpers.small_training import interrupt_after, save_model, save_pairs

from sa2jax import Speech, checkpoint, cli
from sa2jax.cli import common
from sa2jax.train.log import read_metrics
from sa2jax.train.networks.task import read_network_recipe, train_network

NAMED = (
    "step",
    "loss",
    "grad_norm",
    "learning_rate",
    "frames",
    "dropped",
    "prompted",
    "evaluate/loss",
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("flow")


@pytest.fixture(scope="module")
def model(golden, home):
    """A small detokenizer with a voice."""
    folder = save_networks(home / "ours", SPEAKER)
    prompt = golden / "t2w_golden" / "prompt.wav"
    cli.main(["voice", "add", "anna", str(prompt), "--model", str(folder)])
    return folder


@pytest.fixture(scope="module")
def recordings(home):
    """Four chords, and three files that are of no use."""
    rng, folder = np.random.default_rng(0), home / "recordings"
    folder.mkdir()
    for number in range(4):
        time = np.arange(int(16_000 * rng.uniform(1.1, 1.7))) / 16_000
        tones = [np.sin(2 * np.pi * time * pitch) for pitch in rng.uniform(150, 3000, 4)]
        soundfile.write(folder / f"{number}.wav", 0.1 * np.sum(tones, axis=0), 16_000)
    soundfile.write(folder / "short.flac", np.ones(8_000) / 9, 16_000)
    soundfile.write(folder / "still.wav", np.zeros(32_000), 16_000)
    (folder / "torn.wav").write_bytes((folder / "0.wav").read_bytes()[:30])
    return folder


@pytest.fixture(scope="module")
def config(home, model, recordings):
    """A recipe of six updates, and its prepared data."""
    cli.main(["data", "prepare-flow", *map(str, (recordings, home / "ready", "--model", model))])
    plan = {
        "kind": "flow",
        "network": {"folder": str(model)},
        "data": {"folder": str(home / "ready"), "rows": 2, "buckets": [50]},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2, "steps": 6, "weight_decay": 0.0},
        "evaluate": {"folder": str(home / "ready"), "batches": 2, "draws": 2},
        "intervals": {"log_every": 1, "evaluate_every": 3, "save_every": 2},
    }
    (home / "own.yaml").write_text(yaml.safe_dump(plan))
    return home / "own.yaml"


@pytest.fixture(scope="module")
def whole(home, config):
    """The folder of a run that nothing disturbed."""
    cli.main(["train", "--config", str(config), "--out", str(home / "whole")])
    return home / "whole"


def leaves(folder):
    return checkpoint.flatten(jax.device_get(checkpoint.load_params(folder)))


def learnt(folder):
    """What depends on nothing but the recipe."""
    return [[line.get(name) for name in NAMED] for line in read_metrics(folder / "metrics.jsonl")]


# --- prepare-flow -------------------------------------------------------------------------------


def test_prepared_recordings_are_shown(run, home, config):
    code, said, error = run("data", "show", home / "ready")
    assert (code, error) == (0, "")
    for words in ("4, ", "3, see rejects.jsonl", "audio heard", "speech tokenizer", "fingerprint"):
        assert words in said
    about = json.loads(run("data", "show", home / "ready", "--json")[1])
    assert about == json.loads((home / "ready" / "dataset.json").read_text())
    rejects = [json.loads(line) for line in (home / "ready" / "rejects.jsonl").open()]
    assert [reject["where"] for reject in rejects] == ["short.flac", "still.wav", "torn.wav"]
    assert "cannot be read" in rejects[2]["reason"]


def test_recordings_by_name_are_the_same(run, home, model, recordings, config, tmp_path):
    words = [*(recordings / f"{n}.wav" for n in range(4)), tmp_path / "ready", "--model", model]
    code, said, _ = run("data", "prepare-flow", *words, "--json")
    assert code == 0
    about = json.loads((home / "ready" / "dataset.json").read_text())
    assert json.loads(said)["fingerprint"] == about["fingerprint"]
    assert "already" in run("data", "prepare-flow", *words)[2]
    assert run("data", "prepare-flow", *words, "--overwrite")[0] == 0


def test_an_interrupt_leaves_nothing(run, model, recordings, tmp_path, monkeypatch):
    @contextmanager
    def bar(title, unit):
        def tick(done, total):
            if done == 3:
                raise KeyboardInterrupt

        yield tick

    monkeypatch.setattr(common, "progress_bar", bar)
    code, _, error = run("data", "prepare-flow", recordings, tmp_path / "out", "--model", model)
    assert (code, error) == (130, "interrupted\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{recordings}"], "expected SOURCE ... OUT"),
        (["{recordings}", "{recordings}", "out"], "is given twice"),
        (["nowhere", "out"], "nowhere cannot be read"),
        (["{recordings}/torn.wav", "out"], "none of 1 recordings can be used; torn.wav: "),
        (["{recordings}", "out", "--max-rejects", "2"], "3 records cannot be used, more than"),
    ],
)
def test_recordings_that_cannot_be_prepared(
    refused, model, recordings, tmp_path, monkeypatch, words, said
):
    monkeypatch.chdir(tmp_path)
    words = [word.format(recordings=recordings) for word in words]
    assert said in refused("data", "prepare-flow", *words, "--model", model)
    assert not (tmp_path / "out").exists()


# --- train --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_leaves_a_detokenizer_that_speaks(whole, model):
    lines = read_metrics(whole / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 3, 4, 5, 6, 6]
    held = [line["evaluate/loss"] for line in lines if "evaluate/loss" in line]
    assert held[1] < held[0]
    old, new = leaves(model), leaves(whole / "model")
    assert old.keys() == new.keys()
    moved = {name for name in old if not np.array_equal(old[name], new[name])}
    assert moved == {name for name in old if name.startswith("flow.")}
    for name, leaf in old.items():
        assert (leaf.shape, leaf.dtype) == (new[name].shape, new[name].dtype)
    files = {path.relative_to(model): path for path in model.rglob("*") if path.is_file()}
    for name, path in files.items():
        if name.parts[0] != checkpoint.PARAMS:
            assert (whole / "model" / name).read_bytes() == path.read_bytes(), name
    before, after = (Speech.from_pretrained(at, steps=1) for at in (model, whole / "model"))
    assert list(after.folder.voices) == ["anna"]
    waves = [speech.vocode([7, 12, 4218, 99] * 3, "anna") for speech in (before, after)]
    assert waves[0].shape == waves[1].shape == (12 * 960,)
    assert np.isfinite(waves[1]).all()
    assert np.abs(waves[0] - waves[1]).max() > 1e-4


@pytest.mark.slow
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(run, home, config, whole):
    out, seen = home / "interrupted", []
    stop = interrupt_after(3, seen)
    first = train_network(read_network_recipe(config), out, quiet=True, on_step=stop)
    assert (first.step, first.finished, first.results) == (3, False, {})
    assert not (out / "model").exists()
    code, said, error = run("train", "--config", config, "--out", out, "--json")
    assert code == 0
    assert json.loads(said)["results"]["model"] == str(out / "model")
    assert "going on after step 3" in error
    assert seen == [1, 2, 3]
    one, other = leaves(whole / "model"), leaves(out / "model")
    for name, leaf in one.items():
        np.testing.assert_array_equal(leaf, other[name], err_msg=name)
    assert learnt(out) == learnt(whole)


@pytest.mark.slow
def test_a_run_does_not_go_on_as_another(refused, home, config, whole, tmp_path):
    words = "train", "--config", config, "--out", whole
    assert "which it would be made from" in refused(*words, "--model", whole / "model")
    learnt_model = shutil.copytree(whole / "model", tmp_path / "model")
    said = refused(*words, "--model", learnt_model)
    assert "the model that it began with (network.folder: " in said
    assert "--fresh" in said
    other = shutil.copytree(home / "ready", tmp_path / "ready")
    about = json.loads((other / "dataset.json").read_text())
    (other / "dataset.json").write_text(json.dumps(about | {"fingerprint": "0" * 64}))
    assert "the contents of the data or the tokenizer (data.folder: " in refused(
        *words, "--data", other
    )
    assert "loss.cfg_dropout: 0.2 → 0.5" in refused(*words, "--set", "loss.cfg_dropout=0.5")


@pytest.mark.slow
def test_dry_run(run_json, config):
    found = run_json("train", "--config", config, "--dry-run")
    groups = {group["name"]: group for group in found["groups"]}
    assert set(groups) == {"encoder", "estimator", "speaker", "table", "to_mel"}
    total = sum(group["parameters"] for group in groups.values())
    assert found["memory"]["parameters"] == 4 * total
    assert found["memory"]["optimizer"] >= 8 * total
    assert (found["units_per_step"], found["unit"], found["steps"]) == (100, "codes at most", 6)


def test_what_the_flow_cannot_be_trained_with(refused, golden, home, config, model, tmp_path):
    tiny, pairs = save_model(tmp_path / "tiny"), save_pairs(tmp_path / "pairs", 1)
    inside = model / "runs"
    alien = shutil.copytree(home / "ready", tmp_path / "alien")
    about = json.loads((alien / "dataset.json").read_text()) | {"speech_tokenizer": "other"}
    (alien / "dataset.json").write_text(json.dumps(about))
    mistakes = [
        (["--model", golden / "token2wav"], "as it was released: convert it first"),
        (["--model", tiny], "has no detokenizer"),
        (["--data", pairs], "make it with `sa2jax data prepare-flow`"),
        (["--data", pairs, "--data", alien], "the flow learns from one folder"),
        (["--data", alien], "heard by another checkpoint"),
        (["--set", "evaluate.folder=nowhere"], "nowhere is no folder of recordings"),
        (
            ["--set", "evaluate.draws=0", "--set", "intervals.keep=3"],
            "expected batches and draws of at least 1",
        ),
        (["--set", "kind=vocoders"], "kind 'vocoders': expected language, audio_encoder"),
        (["--set", "lora={rank: 2}"], "there is no lora; expected one of network,"),
        (
            ["--set", "network.dtype=int8"],
            "there is no network.dtype; expected one of folder, compute",
        ),
        (["--set", "loss.cfg_dropout=2"], "cfg_dropout=2.0: expected a number from 0 to 1"),
        (["--set", "data.buckets=[25]"], "expected a bucket that large"),
        (["--set", "optimizer.learning_rate_overrides={'': 0}"], "nothing to train"),
        (["--mesh", "fsdp=3"], "3 devices"),
        (["--out", inside], "which it would be made from: choose another folder"),
    ]
    for words, said in mistakes:
        assert said in refused("train", "--config", config, "--out", tmp_path / "run", *words), said
    assert not (tmp_path / "run").exists()
    assert not inside.exists()
