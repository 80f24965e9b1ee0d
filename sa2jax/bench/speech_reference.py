"""Reference benchmark of the speech side: the official PyTorch code, with random weights.

Imported only by the benchmark and only where the `[parity]` extra is installed.
"""

import os
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np
import torch

from sa2jax.bench.common import SpeechWork
from sa2jax.speech_config import FlowConfig, SpeechTokenizerConfig, VocoderConfig

try:
    import_module("torchaudio")
except (ImportError, OSError):  # the official files import it to read recordings: not done here
    empty = ModuleType("torchaudio")
    empty.__spec__ = ModuleSpec("torchaudio", None)
    sys.modules["torchaudio"] = empty

s3tokenizer = import_module("s3tokenizer")
s3_model = import_module("s3tokenizer.model_v2")
flow_net = import_module("cosyvoice2.flow.flow")
flow_matching = import_module("cosyvoice2.flow.flow_matching")
dit = import_module("cosyvoice2.flow.decoder_dit")
conformer = import_module("cosyvoice2.transformer.upsample_encoder_v2")
hifigan = import_module("flashcosyvoice.modules.hifigan")

STEPS = 10
KEPT = 100  # mel frames of a reply that stay in the attention cache
SLOTS = 1000  # frames that the official scratch memory has room for
SAMPLES = 640  # of a code, at 16 kHz


class Reference:
    """The official networks, as `Token2wav` calls them, one reply or stream at a time.

    Args:
        work: sizes and lengths.
    """

    def __init__(self, work: SpeechWork):
        torch.set_num_threads(os.cpu_count() or 1)
        torch.manual_seed(0)
        cfg = work.cfg
        self.cfg, self.chunk = cfg, work.chunk
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = _tokenizer(cfg.speech_tokenizer).to(self.device).eval()
        self.flow = _flow(cfg.flow).to(self.device).eval()
        self.vocoder = _vocoder(cfg.vocoder).to(self.device).eval()
        self.clip = torch.randn(work.codes * SAMPLES) / 10
        self.reply, self.whole = self._codes(work.codes), self._voice(work.codes)
        self.prompt = self._voice(work.prompt)
        span = cfg.vocoder.carry * cfg.vocoder.samples
        self.window = torch.from_numpy(np.hamming(2 * span)).to(self.device)
        self.mel: Any = None
        self.fresh: Any = None
        self.running: Any = None

    def whole_parts(self) -> dict[str, Callable[[], Any]]:
        """What is timed of a whole recording, in this order; for streams see `stream_parts`."""
        return {
            "tokenizer": self.tokenize,
            "flow": self.speak,
            "vocoder": self.vocode,
        }

    def tokenize(self) -> None:
        """Codes of the recording."""
        bands = self.cfg.speech_tokenizer.mels
        mels, lengths = s3tokenizer.padding([s3tokenizer.log_mel_spectrogram(self.clip, bands)])
        self.tokenizer.quantize(mels.to(self.device), lengths.to(self.device))
        self._wait()

    def speak(self) -> None:
        """The reply's mel frames."""
        codes, mel, speaker = self.whole

        def length(x):
            return torch.tensor([x.shape[1]], dtype=torch.int32, device=self.device)

        self.mel = self.flow.inference(
            self.reply, length(self.reply), codes, length(codes), mel, length(mel), speaker, STEPS
        )
        self._wait()

    def vocode(self) -> None:
        """The reply's sound."""
        self.vocoder(self.mel)
        self._wait()

    def start(self) -> None:
        """A stream that has said nothing yet."""
        codes, mel, speaker = self.prompt
        ahead = codes[:, : self.cfg.flow.encoder.lookahead]
        cache = self.flow.setup_cache(torch.cat([codes, ahead], 1), mel, speaker, STEPS)
        empty = partial(torch.zeros, device=self.device)
        self.fresh = cache, empty(1, mel.shape[2], 0), empty(1, 1, 0), None
        self._wait()

    def first(self) -> None:
        """That stream's first chunk; it goes on in `step`."""
        self.running = self._advance(self.fresh)

    def step(self, streams: int) -> None:
        """One more chunk of each of some streams, one after the other; all go on from one place."""
        state = self.running
        for _ in range(streams):
            self.running = self._advance(state)

    @torch.inference_mode()
    def _advance(self, state: Any) -> Any:
        """One chunk: flow, trimmed cache, vocoder, cross-fade."""
        cache, held, source, speech = state
        _, prompt_mel, speaker = self.prompt
        codes = self._codes(self.chunk + self.cfg.flow.encoder.lookahead)
        mel, cache = self.flow.inference_chunk(codes, speaker, cache, False, STEPS)
        attention, first = cache["estimator_att_cache"], prompt_mel.shape[1]
        if attention.shape[4] > first + KEPT:
            kept = attention[:, :, :, :, :first], attention[:, :, :, :, -KEPT:]
            cache["estimator_att_cache"] = torch.cat(kept, dim=4)
        held = torch.cat([held, mel], dim=2)
        new, source = self.vocoder(held, source)
        carry, span = self.cfg.vocoder.carry, len(self.window) // 2
        if speech is not None:
            rise, fall = self.window[:span], self.window[span:]
            new = new.clone()
            new[:, :span] = new[:, :span] * rise + speech[:, -span:] * fall
        new[:, :-span].cpu().numpy()
        return cache, held[..., -carry:], source[..., -span:].clone(), new[:, -span:].clone()

    def _codes(self, count: int) -> torch.Tensor:
        return torch.randint(0, self.cfg.flow.codes, (1, count), device=self.device)

    def _voice(self, codes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        flow = self.cfg.flow
        mel = torch.randn(1, flow.encoder.upsample * codes, flow.mels, device=self.device)
        return self._codes(codes), mel, torch.randn(1, flow.speaker, device=self.device)

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def _tokenizer(cfg: SpeechTokenizerConfig) -> torch.nn.Module:
    sizes = s3_model.ModelConfig(
        n_mels=cfg.mels, n_audio_state=cfg.embed, n_audio_head=cfg.heads, n_audio_layer=cfg.layers
    )
    return s3_model.S3TokenizerV2("speech_tokenizer_v2_25hz", sizes)


def _flow(cfg: FlowConfig) -> torch.nn.Module:
    settings, d = cfg.to_official(), cfg.estimator
    encoder = conformer.UpsampleConformerEncoderV2(**settings.pop("encoder"))
    estimator = dit.DiT(**settings.pop("decoder").pop("estimator"))
    decoder = flow_matching.CausalConditionalCFM(estimator, cfg.guidance)
    for module, lead in ((estimator, ()), (decoder, (16,))):  # released sizes are written in them
        slots = (*lead, d.layers, 2, d.heads, SLOTS, 2 * d.head_dim)
        module.att_cache_buffer = torch.zeros(slots)
        module.cnn_cache_buffer = torch.zeros(*lead, d.layers, 2, 2 * d.embed, d.kernel - 1)
    for weight in estimator.parameters():
        if not weight.any():  # gates that start closed
            torch.nn.init.normal_(weight, std=0.02)
    return flow_net.CausalMaskedDiffWithXvec(**settings, encoder=encoder, decoder=decoder)


def _vocoder(cfg: VocoderConfig) -> torch.nn.Module:
    f0 = hifigan.ConvRNNF0Predictor(in_channels=cfg.mels, cond_channels=cfg.f0_channels)
    return hifigan.HiFTGenerator(
        in_channels=cfg.mels,
        base_channels=cfg.channels,
        nb_harmonics=cfg.harmonics,
        sampling_rate=cfg.sample_rate,
        upsample_rates=list(cfg.rates),
        upsample_kernel_sizes=list(cfg.kernels),
        istft_params={"n_fft": cfg.n_fft, "hop_len": cfg.hop},
        resblock_kernel_sizes=list(cfg.block_kernels),
        resblock_dilation_sizes=[list(x) for x in cfg.block_dilations],
        source_resblock_kernel_sizes=list(cfg.source_kernels),
        source_resblock_dilation_sizes=[list(x) for x in cfg.source_dilations],
        f0_predictor=f0,
    )
