"""An untrained model made of two others: every tensor in its place, what is new drawn well."""

import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from helpers.qwen_sources import (
    AUDIO,
    TEXT,
    USED,
    VOCAB,
    audio_tensors,
    save,
    save_tokenizer,
    text_tensors,
)

from sa2jax import checkpoint, cli, testing
from sa2jax.chat import tokenizer_files
from sa2jax.chat.tokenizer import Tokenizer
from sa2jax.config import StepAudio2Config
from sa2jax.convert import hf
from sa2jax.convert.init import init
from sa2jax.convert.weights import SafetensorsFolder
from sa2jax.errors import CheckpointError, ConfigError, Sa2jaxError, TokenizerError
from sa2jax.models.step_audio import step_audio2


@pytest.fixture
def qwen(tmp_path) -> Path:
    folder = save(tmp_path / "qwen2.5", TEXT, text_tensors())
    save_tokenizer(folder)
    return folder


@pytest.fixture
def ears(tmp_path) -> Path:
    config = {"model_type": "qwen2_audio", "audio_config": AUDIO, "text_config": TEXT}
    return save(tmp_path / "qwen2-audio", config, audio_tensors())


def edit(folder: Path, config=None, tensors=None) -> None:
    """Change a folder's config.json or its tensors in place."""
    if config is not None:
        raw = json.loads((folder / "config.json").read_text())
        config(raw)
        (folder / "config.json").write_text(json.dumps(raw))
    if tensors is not None:
        found = safetensors.numpy.load_file(folder / "model.safetensors")
        tensors(found)
        safetensors.numpy.save_file(found, folder / "model.safetensors")


def make(qwen, ears, out, **options):
    report = init(qwen, out, encoder=ears, **{"vocab": VOCAB} | options)
    return report, checkpoint.load_params(out)


def released(folder: Path, out: Path) -> dict[str, np.ndarray]:
    """The tensors of a model folder as its export has them."""
    hf.export(folder, out)
    found = SafetensorsFolder(out)
    return {name: np.array(found.get(name)) for name in found.tensors}


# --- what is taken over -------------------------------------------------------------------------


def test_both_sources_are_where_they_belong(qwen, ears, tmp_path):
    report, _ = make(qwen, ears, tmp_path / "out")
    found = released(tmp_path / "out", tmp_path / "back")
    assert report.tensors == len(found)
    text, audio = text_tensors(), audio_tensors()
    whisper = {
        "self_attn_layer_norm": "attn_ln",
        "self_attn.q_proj": "attn.query",
        "self_attn.k_proj": "attn.key",
        "self_attn.v_proj": "attn.value",
        "self_attn.out_proj": "attn.out",
        "final_layer_norm": "mlp_ln",
        "fc1": "mlp.0",
        "fc2": "mlp.2",
        "layers": "blocks",
        "embed_positions": "positional_embedding",
    }
    expected = {}
    for name, value in text.items():
        grown = name in ("model.embed_tokens.weight", "lm_head.weight")
        expected[name] = value[:USED] if grown else value
    for name, value in audio.items():
        if name.startswith("audio_tower."):
            name = name.removeprefix("audio_tower.")
            for theirs, ours in whisper.items():
                name = name.replace(theirs, ours)
            name = "after_norm" + name[10:] if name.startswith("layer_norm") else name
            expected[f"encoder.{name}"] = value
    adapter = {name for name in found if name.startswith("adapter.")}
    assert set(expected) | adapter == set(found)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name][: len(value)], value, err_msg=name)


def test_config_is_that_of_both(qwen, ears, tmp_path):
    make(qwen, ears, tmp_path / "out")
    cfg = StepAudio2Config.from_hf(tmp_path / "out")
    assert cfg.dtype == "float32"
    assert (cfg.decoder.vocab, cfg.decoder.layers, cfg.decoder.kv_heads) == (VOCAB, 2, 2)
    assert (cfg.decoder.max_positions, cfg.decoder.rope_theta) == (16384, 1e6)
    assert (cfg.audio_encoder.layers, cfg.audio_encoder.max_positions) == (3, 40)
    assert cfg.adapter == type(cfg.adapter)()
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["architectures"] == ["StepAudio2ForCausalLM"]
    end = Tokenizer.from_folder(tmp_path / "out").special.end_of_text
    assert raw["text_config"]["eos_token_id"] == raw["text_config"]["pad_token_id"] == end


@pytest.mark.parametrize("prefix", ["audio_tower.", "model.audio_tower.", ""])
def test_every_spelling_of_the_encoder(qwen, ears, tmp_path, prefix):
    make(qwen, ears, tmp_path / "one")
    config = {"model_type": "qwen2_audio", "audio_config": AUDIO} if prefix else AUDIO
    other = save(tmp_path / "other", config, audio_tensors(prefix))
    _, params = make(qwen, other, tmp_path / "two")
    expected = checkpoint.load_params(tmp_path / "one")["audio_encoder"]
    jax.tree.map(np.testing.assert_array_equal, params["audio_encoder"], expected)


def test_new_rows_are_like_the_old(qwen, ears, tmp_path):
    _, params = make(qwen, ears, tmp_path / "out", vocab=4000)
    for leaf in (params["decoder"]["table"], params["decoder"]["head"]["kernel"]):
        old, new = np.asarray(leaf[:USED]), np.asarray(leaf[USED:])
        width = old.std(0)
        assert new.shape == (4000 - USED, 32)
        np.testing.assert_array_less(np.abs(new.mean(0) - old.mean(0)) / width, 5 / len(new) ** 0.5)
        np.testing.assert_allclose(new.std(0) / width, 1, atol=0.06)
    assert not np.array_equal(params["decoder"]["table"], params["decoder"]["head"]["kernel"])


def test_rows_that_had_no_token_do_not_count(qwen, ears, tmp_path):
    """A Qwen2.5 has padded rows; nothing is copied from them and no statistics made of them."""
    _, before = make(qwen, ears, tmp_path / "one")

    def spoil(tensors):
        tensors["model.embed_tokens.weight"][USED:] = 1e6

    edit(qwen, tensors=spoil)
    _, after = make(qwen, ears, tmp_path / "two")
    np.testing.assert_array_equal(before["decoder"]["table"], after["decoder"]["table"])


def test_a_tied_head_is_a_copy_of_the_table(qwen, ears, tmp_path):
    edit(qwen, lambda c: c.update(tie_word_embeddings=True), lambda t: t.pop("lm_head.weight"))
    _, params = make(qwen, ears, tmp_path / "out")
    decoder = params["decoder"]
    np.testing.assert_array_equal(decoder["table"], decoder["head"]["kernel"])
    assert np.ptp(np.asarray(decoder["table"][-1])) > 0


def test_the_adapter_is_drawn_as_torch_does(qwen, ears, tmp_path):
    _, params = make(qwen, ears, tmp_path / "out")
    for part, inputs in (("conv", 48), ("up", 16), ("down", 2048)):
        for name, leaf in params["adapter"][part].items():
            bound = inputs**-0.5
            assert 0.75 * bound < np.abs(leaf).max() <= bound, (part, name)
            if name == "kernel":
                assert float(leaf.std()) == pytest.approx(bound / 3**0.5, rel=0.1)


def test_a_seed_is_a_model(qwen, ears, tmp_path):
    _, one = make(qwen, ears, tmp_path / "one", seed=1)
    _, same = make(qwen, ears, tmp_path / "same", seed=1)
    _, other = make(qwen, ears, tmp_path / "other", seed=2)
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert not np.array_equal(one["adapter"]["up"]["kernel"], other["adapter"]["up"]["kernel"])
    assert not np.array_equal(one["decoder"]["table"], other["decoder"]["table"])
    np.testing.assert_array_equal(one["decoder"]["table"][:USED], other["decoder"]["table"][:USED])


def test_dtype(qwen, ears, tmp_path):
    _, params = make(qwen, ears, tmp_path / "out", dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(ml_dtypes.bfloat16)}
    assert StepAudio2Config.from_hf(tmp_path / "out").dtype == "bfloat16"


# --- tokenizer ----------------------------------------------------------------------------------


def test_the_released_tokens_follow_the_decoders(qwen, ears, tmp_path):
    report, _ = make(qwen, ears, tmp_path / "out")
    made = Tokenizer.from_folder(tmp_path / "out")
    like = Tokenizer(tokenizer_files.byte_tokenizer(testing.AUDIO_START, VOCAB))
    assert made.special == like.special
    text = "<|BOT|>human\nhé<|EOT|><tts_start><audio_7><|im_end|>"
    assert made.encode(text) == like.encode(text)
    assert made.size == VOCAB
    assert any("released tokens behind" in note for note in report.notes)


def test_a_given_tokenizer_is_taken(qwen, ears, tmp_path):
    given = tokenizer_files.save_tokenizer_files(
        tmp_path / "given", audio_start=testing.AUDIO_START, vocab=400
    )
    report, _ = make(qwen, ears, tmp_path / "out", tokenizer=given)
    assert Tokenizer.from_folder(tmp_path / "out").size == 400
    assert not any("released tokens behind" in note for note in report.notes)


@pytest.mark.parametrize(
    ("start", "vocab", "message"),
    [(300, VOCAB, "does not continue the decoder's"), (296, 900, "expected fewer than the 512")],
)
def test_a_tokenizer_that_does_not_fit(qwen, ears, tmp_path, start, vocab, message):
    given = tokenizer_files.save_tokenizer_files(tmp_path / "given", audio_start=start, vocab=vocab)
    with pytest.raises(TokenizerError, match=message):
        make(qwen, ears, tmp_path / "out", tokenizer=given)
    assert not (tmp_path / "out").exists()


def test_a_decoder_with_other_tokens_needs_a_tokenizer(qwen, ears, tmp_path):
    path = qwen / "tokenizer.json"
    path.write_text(path.read_text().replace("<|im_end|>", "<|stop|>"))
    (qwen / "tokenizer_config.json").unlink()
    with pytest.raises(TokenizerError, match=r"not that of Qwen2\.5 \(<\|im_end\|>"):
        make(qwen, ears, tmp_path / "out")


def drop_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()
    (folder / "vocab.json").unlink()


@pytest.mark.parametrize(
    ("side", "damage", "error", "message"),
    [
        (
            "qwen",
            lambda f: edit(f, lambda c: c.update(model_type="llama")),
            ConfigError,
            "'llama': expected 'qwen2', the config.json of Qwen2.5",
        ),
        ("qwen", lambda f: (f / "config.json").unlink(), ConfigError, "expected a folder of Qwen"),
        ("qwen", lambda f: (f / "config.json").write_text("[]"), ConfigError, "is damaged"),
        (
            "qwen",
            lambda f: edit(f, lambda c: c.update(hidden_act="gelu")),
            ConfigError,
            "hidden_act='gelu' is not supported",
        ),
        (
            "qwen",
            lambda f: edit(f, lambda c: c.update(rope_parameters={"rope_type": "yarn"})),
            ConfigError,
            "rope_parameters",
        ),
        ("qwen", lambda f: edit(f, lambda c: c.update(use_mrope=True)), ConfigError, "use_mrope"),
        (
            "qwen",
            lambda f: edit(f, lambda c: c.update(num_hidden_layers=3)),
            CheckpointError,
            "the Qwen2.5 folder does not fit its config.json: 12 missing tensors",
        ),
        (
            "qwen",
            lambda f: edit(f, tensors=lambda t: t.pop("lm_head.weight")),
            CheckpointError,
            "1 missing tensors: lm_head.weight",
        ),
        (
            "qwen",
            lambda f: edit(f, tensors=lambda t: t.update(odd=np.zeros(2, np.float32))),
            CheckpointError,
            "1 unknown tensors: odd",
        ),
        (
            "qwen",
            lambda f: edit(f, lambda c: c.update(intermediate_size=64)),
            CheckpointError,
            "wrong shape",
        ),
        ("qwen", drop_tokenizer, TokenizerError, "which rows of the table are in use"),
        ("qwen", lambda f: (f / "tokenizer.json").write_text("{}"), TokenizerError, "is damaged"),
        (
            "qwen",
            lambda f: edit(
                f,
                tensors=lambda t: t.update(
                    {"model.embed_tokens.weight": np.zeros((200, 32), np.float32)}
                ),
            ),
            CheckpointError,
            "its tokenizer has 273 tokens",
        ),
        (
            "ears",
            lambda f: shutil.copy(f.parent / "qwen2.5" / "config.json", f),
            ConfigError,
            "'qwen2': expected 'qwen2_audio', the config.json of Qwen2-Audio",
        ),
        (
            "ears",
            lambda f: edit(f, lambda c: c["audio_config"].update(encoder_ffn_dim=48)),
            ConfigError,
            "encoder_ffn_dim=48 is not supported (expected 64)",
        ),
        (
            "ears",
            lambda f: edit(f, lambda c: c["audio_config"].update(d_model=None)),
            ConfigError,
            "n_audio_state must be a whole number above 0, at most 16777216, got None",
        ),
        (
            "qwen",
            lambda f: edit(f, lambda c: c.update(max_position_embeddings="x")),
            ConfigError,
            "max_position_embeddings must be a whole number above 0, at most 16777216, got 'x'",
        ),
        (
            "ears",
            lambda f: edit(f, lambda c: c["audio_config"].update(scale_embedding=True)),
            ConfigError,
            "scale_embedding=True",
        ),
        (
            "ears",
            lambda f: edit(f, tensors=lambda t: t.pop("audio_tower.conv1.weight")),
            CheckpointError,
            "has no audio encoder",
        ),
        (
            "ears",
            lambda f: edit(f, tensors=lambda t: t.pop("audio_tower.layers.1.fc1.bias")),
            CheckpointError,
            "the Qwen2-Audio folder does not fit its config.json: 1 missing",
        ),
        (
            "ears",
            lambda f: edit(
                f,
                tensors=lambda t: t.update(
                    {"audio_tower.conv2.weight": np.zeros((16, 16, 5), np.float32)}
                ),
            ),
            CheckpointError,
            "expected [16, 16, 3], got [16, 16, 5]",
        ),
    ],
)
def test_bad_sources(qwen, ears, tmp_path, side, damage, error, message):
    damage({"qwen": qwen, "ears": ears}[side])
    with pytest.raises(error) as found:
        make(qwen, ears, tmp_path / "out")
    assert message in str(found.value)
    assert "\n" not in str(found.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["qwen2-audio", "qwen2.5"]


def test_faults_of_both_are_told_together(qwen, ears, tmp_path):
    edit(qwen, tensors=lambda t: t.pop("model.norm.weight"))
    edit(ears, tensors=lambda t: t.pop("audio_tower.layer_norm.bias"))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*layer_norm\.bias"):
        make(qwen, ears, tmp_path / "out")


def test_our_own_folder_is_no_source(qwen, ears, tmp_path):
    make(qwen, ears, tmp_path / "out")
    with pytest.raises(Sa2jaxError, match="is a folder of sa2jax"):
        make(tmp_path / "out", ears, tmp_path / "again")


def test_command(qwen, ears, tmp_path, capsys):
    out = tmp_path / "out"
    cli.main(["convert", str(qwen), str(out), "--init", "--encoder", str(ears), "--seed", "3"])
    said = capsys.readouterr()
    assert f"{out}: " in said.out
    assert "drawn with seed 3: the adapter, and rows 273 to 158719" in said.err
    assert Tokenizer.from_folder(out).special.num_codes == 6561


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--init"], "--init and --encoder belong together"),
        (["--encoder", "ears"], "--init and --encoder belong together"),
        (["--init", "--encoder", "ears", "--dtype", "int8"], "int8 comes after that"),
    ],
)
def test_command_refuses(qwen, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as end:
        cli.main(["convert", str(qwen), str(tmp_path / "out"), *options])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


# --- against transformers -----------------------------------------------------------------------


def tensors_of(module) -> dict[str, np.ndarray]:
    return {name: value.numpy().copy() for name, value in module.state_dict().items()}


@pytest.mark.both_pairs
@pytest.mark.oracle
def test_the_encoder_hears_as_qwen2_audios(qwen, ears, tmp_path):
    reason = "compares with transformers: install sa2jax[parity]"
    torch = pytest.importorskip("torch", reason=reason)
    pytest.importorskip("transformers", reason=reason)
    from transformers import Qwen2AudioEncoder, Qwen2AudioEncoderConfig

    _, params = make(qwen, ears, tmp_path / "out")
    theirs = Qwen2AudioEncoder(Qwen2AudioEncoderConfig(**AUDIO)).eval()
    state = audio_tensors("")
    theirs.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    mel = np.random.default_rng(2).standard_normal((1, 16, 80)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(mel)).last_hidden_state.numpy()
    model = step_audio2(StepAudio2Config.from_hf(tmp_path / "out"))
    # They look at all frames, we leave out a clip's last two: two more are said to be there.
    frames = np.array([mel.shape[-1] + 2], np.int32)
    found = model.bind(params).audio_encoder(mel, frames, official_batch=True)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.both_pairs
@pytest.mark.oracle
@pytest.mark.parametrize("tied", [False, True])
def test_the_decoder_says_what_qwen2_says(qwen, ears, tmp_path, tied):
    reason = "compares with transformers: install sa2jax[parity]"
    torch = pytest.importorskip("torch", reason=reason)
    transformers = pytest.importorskip("transformers", reason=reason)
    if tied:
        edit(qwen, lambda c: c.update(tie_word_embeddings=True), lambda t: t.pop("lm_head.weight"))
    _, params = make(qwen, ears, tmp_path / "out")
    config = transformers.Qwen2Config(**TEXT | {"tie_word_embeddings": tied})
    config._attn_implementation = "eager"
    theirs = transformers.Qwen2ForCausalLM(config).eval()
    state = {name: torch.from_numpy(value) for name, value in text_tensors().items()}
    if tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    theirs.load_state_dict(state)
    ids = np.random.default_rng(3).integers(0, USED, (2, 17))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()
    net = step_audio2(StepAudio2Config.from_hf(tmp_path / "out")).bind(params)
    found = np.asarray(net.decoder.logits(net(ids)[0]))
    np.testing.assert_allclose(found[..., :USED], expected[..., :USED], rtol=1e-4, atol=1e-3)
