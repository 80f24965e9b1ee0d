"""Reference benchmark of the language side: transformers on torch, with random weights.

Imported only by the benchmark and only where the `[parity]` extra is installed.
"""

import os
from typing import Any

import torch
from transformers import Qwen2AudioEncoderConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.cache_utils import DynamicCache
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder

from sa2jax import audio
from sa2jax.bench.common import TURN, timed
from sa2jax.config import StepAudio2Config


class Reference:
    """Qwen2 with and without a key-value cache, and Qwen2-Audio's encoder: the model's parts."""

    def __init__(self, cfg: StepAudio2Config, dtype: str, prompt: int, seconds: float):
        torch.set_num_threads(os.cpu_count() or 1)
        torch.manual_seed(0)
        kind = getattr(torch, dtype)
        d, e = cfg.decoder, cfg.audio_encoder
        qwen2 = Qwen2Config(**d.to_hf(), tie_word_embeddings=False, attn_implementation="sdpa")
        frames = int(audio.num_frames(int(seconds * audio.SAMPLE_RATE))) // 2 * 2
        whisper = Qwen2AudioEncoderConfig(
            num_mel_bins=e.mels,
            encoder_layers=e.layers,
            encoder_attention_heads=e.heads,
            encoder_ffn_dim=e.mlp_ratio * e.embed,
            d_model=e.embed,
            max_source_positions=frames // 2,
            attn_implementation="sdpa",
        )
        with torch.device("cpu"):
            self.decoder = Qwen2ForCausalLM(qwen2).to(kind).eval()
            self.encoder = Qwen2AudioEncoder(whisper).to(kind).eval()
            self.adapter = (
                torch.nn.ModuleList(
                    [
                        torch.nn.Conv1d(
                            e.embed, e.embed, cfg.adapter.kernel, cfg.adapter.stride, 1
                        ),
                        torch.nn.Linear(e.embed, cfg.adapter.hidden),
                        torch.nn.Linear(cfg.adapter.hidden, d.embed),
                    ]
                )
                .to(kind)
                .eval()
            )
        self.mel = torch.randn(1, e.mels, frames, dtype=kind)
        self.ids = torch.randint(0, d.vocab, (1, prompt))
        self.cache: Any = None
        self.token: Any = None

    @torch.inference_mode()
    def encode(self) -> None:
        """One clip through encoder and adapter."""
        x = self.encoder(self.mel).last_hidden_state
        conv, up, down = self.adapter
        x = torch.nn.functional.gelu(conv(x.transpose(1, 2))).transpose(1, 2)
        down(torch.relu(up(x)))

    @torch.inference_mode()
    def prefill(self) -> None:
        """One prompt, logits of its last position."""
        self.cache = DynamicCache()
        out = self.decoder(self.ids, past_key_values=self.cache, logits_to_keep=1)
        self.token = out.logits[:, -1:].argmax(-1)

    @torch.inference_mode()
    def decode(self, steps: int) -> None:
        """`steps` greedy tokens with the cache."""
        for _ in range(steps):
            out = self.decoder(self.token, past_key_values=self.cache, logits_to_keep=1)
            self.token = out.logits[:, -1:].argmax(-1)

    @torch.inference_mode()
    def turn(self) -> None:
        """The first token after another question: the whole conversation is read again."""
        question = torch.randint(0, self.decoder.config.vocab_size, (1, TURN))
        ids = torch.cat([self.ids, question], 1)
        self.decoder(ids, use_cache=False, logits_to_keep=1).logits.argmax(-1)

    @torch.inference_mode()
    def loop_without_cache(self, tokens: int) -> float:
        """Seconds of the official loop for a reply: the whole sequence again for each token.

        Integrated from five lengths by the trapezoidal rule. The official code also encodes the
        audio again for every token and computes logits of every position; neither is counted.
        """
        points = [round(tokens * part / 4) for part in range(5)]
        ids = torch.randint(0, self.decoder.config.vocab_size, (1, self.ids.shape[1] + tokens))
        seconds = []
        for extra in points:
            part = ids[:, : self.ids.shape[1] + extra]

            def run(part=part):
                return self.decoder(part, use_cache=False, logits_to_keep=1)

            seconds.append(timed(run))
        pairs = zip(points, points[1:], seconds, seconds[1:], strict=False)
        return sum((b - a) * (s + t) / 2 for a, b, s, t in pairs)
