"""Streams in any partition against the official code itself, where it is installed."""

import json
import sys
import types
from importlib import import_module
from importlib.machinery import ModuleSpec

import numpy as np
import pytest
import yaml
from helpers.recorded_speech import official_pcm, recorded_token2wav, recorded_voice, start_noise

from sa2jax.speech.token2wav import Token2Wav

pytestmark = pytest.mark.oracle
COUNTS = 40


def from_yaml(path):
    """Build what flow.yaml describes: each tag names a class, its mapping the arguments."""

    class Loader(yaml.SafeLoader):
        pass

    def build(loader, name, node):
        module, _, kind = name.rpartition(".")
        return getattr(import_module(module), kind)(**loader.construct_mapping(node, deep=True))

    Loader.add_multi_constructor("!new:", build)
    return yaml.load(path.read_text(), Loader)["flow"]


@pytest.fixture(scope="module")
def official(golden):
    """The official streaming with the recorded weights, start noise and no draws in the source."""
    reason = "compares with the official code: install sa2jax[parity]"
    torch = pytest.importorskip("torch", reason=reason)
    for name in ("torchaudio", "torchaudio.compliance", "torchaudio.compliance.kaldi"):
        if name not in sys.modules:  # imported there, not needed here
            empty = types.ModuleType(name)
            empty.__spec__, empty.__path__ = ModuleSpec(name, None), []
            sys.modules[name] = empty
    hifigan = pytest.importorskip("flashcosyvoice.modules.hifigan", reason=reason)
    folder = golden / "token2wav"
    sizes = json.loads((folder / "tiny_dims.json").read_text())
    flow = from_yaml(folder / "flow.yaml")
    flow.load_state_dict(torch.load(folder / "flow.pt", weights_only=True))
    noise = start_noise(golden)
    flow.decoder.rand_noise[..., : len(noise)] = torch.from_numpy(noise.T)
    estimator, slots = flow.decoder.estimator, 1000
    heads, width = estimator.blocks[0].attn.num_heads, estimator.blocks[0].attn.head_dim
    depth, channels = len(estimator.blocks), estimator.in_proj.out_features
    # Scratch memory whose released sizes are written into the code.
    for module, lead in ((estimator, ()), (flow.decoder, (16,))):
        module.att_cache_buffer = torch.zeros(*lead, depth, 2, heads, slots, 2 * width)
        module.cnn_cache_buffer = torch.zeros(*lead, depth, 2, 2 * channels, 2)
    f0 = hifigan.ConvRNNF0Predictor(**sizes["ConvRNNF0Predictor"])
    hift = hifigan.HiFTGenerator(**sizes["HiFTGenerator"], f0_predictor=f0)
    state = torch.load(folder / "hift.pt", weights_only=True)
    hift.load_state_dict({name.removeprefix("generator."): t for name, t in state.items()})
    return types.SimpleNamespace(torch=torch, flow=flow.eval(), hift=hift.eval())


def stream(official, voice, chunks):
    """Int16 of each chunk; all but the last include their look-ahead."""
    torch, span = official.torch, 3840
    codes, mel = torch.tensor(voice.codes)[None], torch.from_numpy(voice.mel)[None]
    speaker = torch.from_numpy(voice.speaker)[None]
    window = torch.from_numpy(np.hamming(2 * span))
    pieces, held, source, speech = [], torch.zeros(1, mel.shape[2], 0), torch.zeros(1, 1, 0), None
    with torch.inference_mode():
        cache = official.flow.setup_cache(torch.cat([codes, codes[:, :3]], 1), mel, speaker, 10)
        for i, chunk in enumerate(chunks):
            last = i == len(chunks) - 1
            made, cache = official.flow.inference_chunk(
                token=torch.tensor(chunk)[None],
                spk=speaker,
                cache=cache,
                last_chunk=last,
                n_timesteps=10,
            )
            attention, first = cache["estimator_att_cache"], mel.shape[1]
            if attention.shape[4] > first + 100:
                kept = attention[:, :, :, :, :first], attention[:, :, :, :, -100:]
                cache["estimator_att_cache"] = torch.cat(kept, dim=4)
            held = torch.cat([held, made], dim=2)
            new, source = official.hift(held, source)
            if speech is not None:
                new = new.clone()
                new[:, :span] = new[:, :span] * window[:span] + speech[:, -span:] * window[span:]
            held, source, speech = held[..., -8:], source[..., -span:], new[:, -span:]
            piece = new if last else new[:, :-span]
            pieces.append((piece[0].clamp(-1, 1).numpy() * 32767).astype(np.int16))
    return pieces


@pytest.mark.parametrize("hops", [(25, 25, 25, 10), (9, 40, 14, 30, 6), (12, 5, 8, 50)])
def test_any_partition(golden, official, monkeypatch, hops):
    torch = official.torch
    for name in ("rand", "randn", "randn_like"):
        make = torch.zeros_like if name.endswith("like") else torch.zeros
        monkeypatch.setattr(torch, name, lambda *size, _make=make, **_: _make(*size))
    cfg, params = recorded_token2wav(golden)
    voice, lookahead = recorded_voice(golden), cfg.flow.encoder.lookahead
    codes = np.random.default_rng(1).integers(0, cfg.flow.codes, sum(hops)).astype(np.int32)
    places = np.cumsum((0, *hops))
    ends = [*(places[1:-1] + lookahead), len(codes)]
    chunks = [codes[start:end] for start, end in zip(places[:-1], ends, strict=True)]
    expected = stream(official, voice, chunks)
    speak = Token2Wav(cfg, params, flow_noise=start_noise(golden))
    state = speak.start([voice], parity=True)
    given, quiet = 0, np.zeros((1, 1, cfg.vocoder.harmonics + 1), np.float32)
    for i, (end, pcm) in enumerate(zip(ends, expected, strict=True)):
        last = i == len(hops) - 1
        state, (piece,) = speak.step(state, [codes[given:end]], last, source_noise=quiet)
        given = end
        ours = official_pcm(np.asarray(piece)).astype(np.int32)
        assert ours.shape == pcm.shape
        # Measured: at most 5 counts.
        assert np.abs(ours - pcm).max() <= COUNTS, f"chunk {i}"
