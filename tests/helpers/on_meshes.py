"""Run by test_meshes.py on eight fake devices: every program on every mesh, against one device."""

import json
import sys

import jax
import numpy as np

from helpers.recorded_speech import other_voice
from helpers.small_speech import SPEAKER, small_networks
from sa2jax.config import DecoderConfig
from sa2jax.inference import programs
from sa2jax.inference.requests import GenerationConfig, Request
from sa2jax.pipeline import StepAudio2
from sa2jax.sharding import batch_axis_size, make_mesh
from sa2jax.speech import programs as speech_programs
from sa2jax.speech.token2wav import Token2Wav

# 14 heads on 2 key heads: like mini's 28 on 4, they divide over no tensor axis above 2.
DECODER = DecoderConfig(
    vocab=512, layers=2, embed=32, mlp=48, heads=14, kv_heads=2, head_dim=8, max_positions=1024
)
TOKENS = 16
# The detokenizer deals rows over all devices, whatever the axes: where they divide, and where not.
SPEAKING = ("data=2,fsdp=2,tensor=2", "data=2,tensor=3")


def prompts(cfg):
    rng = np.random.default_rng(0)
    mel = rng.standard_normal((cfg.audio_encoder.mels, 100), np.float32)
    ids = rng.integers(0, 256, 40).astype(np.int32)
    return [Request(ids, (mel,), (3,), (12,)), Request(ids[:5]), Request(ids[7:])]


def answers(model):
    """Logits and greedy ids; how long a reply is does not depend on its stop ids."""
    requests = prompts(model.cfg)
    made = model.engine.generate(requests, GenerationConfig(max_new_tokens=TOKENS, max_repeat=0))
    return model.engine.logits(requests[0]), [list(reply.ids) for (reply,) in made]


def spoken(speak, voices):
    """Two whole replies, and eight streams of two steps each."""
    rng = np.random.default_rng(1)
    # Both steps speak at most 15 codes: one program.
    codes = [rng.integers(0, speak.cfg.flow.codes, n).tolist() for n in (20, 30)]
    waves = speak(codes, voices)
    state = speak.start(voices * 4)
    state, first = speak.step(state, [line[:18] for line in codes] * 4)
    state, rest = speak.step(state, [line[18:] for line in codes] * 4, last=True)
    streamed = [np.concatenate(pieces) for pieces in zip(first, rest, strict=True)]
    return [*waves, *streamed], state


def places(model, state):
    """Which mesh axes the arrays of a batch under way are split over, by name."""
    layers = model.engine.params["decoder"]["layers"]
    layers = layers.get(0, layers)  # a mesh of one device has its layers apart
    arrays = {
        "q": layers["attn"]["q"]["kernel"],
        "k": layers["attn"]["k"]["kernel"],
        "head": model.engine.params["decoder"]["head"]["kernel"],
        "cache": state.cache.k,
        "seen": state.seen,
        "token": state.last_token,
    }
    return {name: [*map(str, x.sharding.spec)] for name, x in arrays.items()} | {
        "cache_shape": state.cache.k.shape,
        "cache_shard": state.cache.k.sharding.shard_shape(state.cache.k.shape),
    }


def far(a, b):
    return max(float(np.abs(x - y).max()) for x, y in zip(a, b, strict=True))


def speech_report(speak, voices, waves):
    """How far the sound is from that of one device, and where a stream's caches are."""
    sound, stream = spoken(speak, voices)
    traces = dict(speech_programs.TRACES)
    spoken(speak, voices)
    return {
        "wave": far(sound, waves),
        "traces": traces,
        "new": dict(speech_programs.TRACES) == traces,
        "stream": [*map(str, stream.flow.estimator.kv.sharding.spec)],
        "kv": stream.flow.estimator.kv.shape,
    }


def main(folder, meshes):
    """One line of JSON for each mesh."""
    cfg, params = SPEAKER, small_networks()
    voices = [other_voice(2, 31, cfg), other_voice(3, 40, cfg)]
    alone = StepAudio2.from_pretrained(folder)
    logits, ids = answers(alone)
    waves = []
    if set(meshes) & set(SPEAKING):
        waves, _ = spoken(Token2Wav(cfg, params), voices)
    for spec in meshes:
        programs.TRACES.clear()
        speech_programs.TRACES.clear()
        model = StepAudio2.from_pretrained(folder, mesh=spec)
        got, same = answers(model)
        traces = dict(programs.TRACES)
        again = answers(model)[1]
        requests = prompts(model.cfg)
        options = GenerationConfig(max_new_tokens=8)
        new = dict(programs.TRACES) == traces
        model.engine.submit(requests[0], options).result()  # its row stays
        report = {
            "mesh": spec,
            "devices": jax.device_count(),
            "ways": batch_axis_size(model.engine.mesh),
            "logits": far([got], [logits]),
            "ids": same == ids == again,
            "length": [len(line) for line in same],
            "traces": traces,
            "new": new,
        } | places(model, model.engine.runner.state)
        if spec in SPEAKING:
            speak = Token2Wav(cfg, params, mesh=make_mesh(spec))
            report["speech"] = speech_report(speak, voices, waves)
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
