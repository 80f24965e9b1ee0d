"""The step of training.py with transformers on torch: a Qwen2 decoder on text, float32, AdamW.

    python benchmarks/training_reference.py --preset qwen2.5-0.5b --layers 6 --length 512

Same sizes, random weights, no sound, no packing: beside it run training.py with `--kind full
--dtype float32 --sound 0 --packed 1`.
"""

import argparse
import json
import time
from dataclasses import replace

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from sa2jax.config import StepAudio2Config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="qwen2.5-0.5b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5)
    given = parser.parse_args()
    sizes = StepAudio2Config.preset(given.preset).decoder
    if given.layers:
        sizes = replace(sizes, layers=given.layers)
    model = Qwen2ForCausalLM(Qwen2Config(**sizes.to_hf(), tie_word_embeddings=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1)
    ids = torch.randint(0, sizes.vocab, (given.rows, given.length))
    times = []
    for _ in range(given.steps + 1):
        begun = time.perf_counter()
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - begun)
    best = sorted(times[1:])[given.steps // 2]
    print(
        json.dumps(
            {
                "torch": torch.__version__,
                **vars(given),
                "step_ms": round(1e3 * best, 1),
                "tokens_per_s": round(given.rows * given.length / best),
                "loss": float(loss),
            }
        )
    )


if __name__ == "__main__":
    main()
