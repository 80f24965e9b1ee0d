"""Gradients of the training loss in plain torch, and how `gradients.npz` was made of them.

    python tests/golden/make_gradients.py        writes tests/golden/gradients.npz, needs torch

The network is written here a second time, clip by clip and row by row, from its description alone:
no mask for padding, no stacked layers, no packing. Nothing but the names is shared with the
library.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
CHECKPOINT = HERE / "micro" / "llm"
RECORDING = HERE / "gradients.npz"
SIGNS = 64  # random vectors of ±1 on which each gradient is projected

# One row hears a clip of an even number of frames, one of an odd number, and one hears nothing.
FRAMES = (78, 121, 0)
LENGTHS = (24, 32, 19)  # of the sequences, their last token too


def signs(size: int) -> np.ndarray:
    """Fixed numbers −1 and 1, [size, SIGNS]: the bits of a stream that numpy never changes."""
    words = np.random.PCG64(size).random_raw(size)
    bits = np.unpackbits(words.astype("<u8").view(np.uint8)).reshape(size, SIGNS)
    return 2.0 * bits - 1


def fingerprint(gradient: np.ndarray) -> np.ndarray:
    """The norm of a gradient and its products with `SIGNS` random vectors, [1 + SIGNS].

    Two gradients whose products differ by d on average (root of the mean square) are d apart: that
    is the expectation over signs.
    """
    flat = np.asarray(gradient, np.float64).reshape(-1)
    return np.concatenate([[np.linalg.norm(flat)], flat @ signs(flat.size)])


def make_case(config: Mapping, audio_start: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows to learn: ids [3, T + 1], weights [3, T] and the mels of each clip.

    `starts` [3] is where a row's clip begins, −1 for none; weights of 0, and unequal ones, count.
    """
    rng = np.random.default_rng(seed)
    vocab, mels = config["text_config"]["vocab_size"], config["audio_encoder_config"]["n_mels"]
    steps = max(LENGTHS)
    ids = rng.integers(0, min(vocab, audio_start), (len(FRAMES), steps), dtype=np.int32)
    weights = rng.choice([0.0, 0.5, 1.0], (len(FRAMES), steps - 1)).astype(np.float32)
    starts = np.full(len(FRAMES), -1, np.int32)
    clips = {}
    for row, (frames, length) in enumerate(zip(FRAMES, LENGTHS, strict=True)):
        weights[row, length - 1 :] = 0
        if frames:
            count = features_of(frames)
            starts[row] = 3 + row
            ids[row, starts[row] - 1] = audio_start
            ids[row, starts[row] : starts[row] + count] = audio_start + 2
            ids[row, starts[row] + count] = audio_start + 1
            weights[row, starts[row] - 2 : starts[row] + count] = 0
            clips[f"mel_{row}"] = rng.standard_normal((mels, frames)).astype(np.float16)
    return {"ids": ids, "weights": weights, "starts": starts, **clips}


def features_of(frames: int) -> int:
    """Positions that a clip of this many mel frames fills."""
    return ((frames - 2 + 1) // 2 // 2 - 1) // 2 + 1


# --- the network --------------------------------------------------------------------------------


def encode(torch, get, sizes: Mapping, mel):
    """One clip alone, [M, L] to [S, D] at 25 Hz."""
    F = torch.nn.functional
    frames = mel.shape[1]
    x = F.conv1d(mel[None], get("encoder.conv1.weight"), get("encoder.conv1.bias"), padding=1)
    x = F.gelu(x)
    x = F.conv1d(x, get("encoder.conv2.weight"), get("encoder.conv2.bias"), stride=2, padding=1)
    x = F.gelu(x)[0].T  # [T, D]
    steps, width = x.shape
    x = x + get("encoder.positional_embedding.weight")[:steps]
    seen = (torch.arange(frames) < frames - 2)[(frames + 1) % 2 :: 2]
    mask = torch.where(seen, 0.0, -1e10)
    heads = sizes["n_audio_head"]
    scale = (width // heads) ** -0.25

    def split(y):
        return y.reshape(steps, heads, -1).transpose(0, 1)

    def linear(y, name):
        return F.linear(y, get(f"{name}.weight"), get(f"{name}.bias"))

    def norm(y, name):
        return F.layer_norm(y, (width,), get(f"{name}.weight"), get(f"{name}.bias"))

    for layer in range(sizes["n_audio_layer"]):
        at = f"encoder.blocks.{layer}"
        y = norm(x, f"{at}.attn_ln")
        q, v = split(linear(y, f"{at}.attn.query")), split(linear(y, f"{at}.attn.value"))
        k = split(F.linear(y, get(f"{at}.attn.key.weight")))
        scores = (q * scale) @ (k * scale).transpose(1, 2) + mask
        y = (scores.softmax(-1) @ v).transpose(0, 1).reshape(steps, width)
        x = x + linear(y, f"{at}.attn.out")
        x = x + linear(F.gelu(linear(norm(x, f"{at}.mlp_ln"), f"{at}.mlp.0")), f"{at}.mlp.2")
    x = F.avg_pool1d(x.T[None], 2, stride=2)[0].T
    return norm(x, "encoder.after_norm")


def adapt(torch, get, x):
    """Encoder frames [S, D] to the decoder's embeddings at 12.5 Hz."""
    F = torch.nn.functional
    weight, bias = get("adapter.conv.weight"), get("adapter.conv.bias")
    x = F.gelu(F.conv1d(x.T[None], weight, bias, stride=2, padding=1))[0].T
    x = F.relu(F.linear(x, get("adapter.linear1.weight"), get("adapter.linear1.bias")))
    return F.linear(x, get("adapter.linear2.weight"), get("adapter.linear2.bias"))


def decode(torch, get, sizes: Mapping, x):
    """One row of embeddings [T, D] to logits [T, V]."""
    F = torch.nn.functional
    steps, width = x.shape
    heads, kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    half = width // heads // 2
    angle = torch.arange(steps)[:, None] * sizes["rope_theta"] ** (-torch.arange(half) / half)
    cos, sin = angle.cos(), angle.sin()

    def norm(y, name):
        y = y * torch.rsqrt((y * y).mean(-1, keepdim=True) + sizes["rms_norm_eps"])
        return get(f"{name}.weight") * y

    def turn(y):  # [N, T, H]
        a, b = y.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    ahead = torch.full((steps, steps), -math.inf).triu(1)
    for layer in range(sizes["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        y = norm(x, f"{at}.input_layernorm")
        q, k, v = (
            F.linear(
                y, get(f"{at}.self_attn.{n}_proj.weight"), get(f"{at}.self_attn.{n}_proj.bias")
            )
            .reshape(steps, -1, 2 * half)
            .transpose(0, 1)
            for n in "qkv"
        )
        k, v = (z.repeat_interleave(heads // kv_heads, 0) for z in (turn(k), v))
        scores = turn(q) @ k.transpose(1, 2) / math.sqrt(2 * half) + ahead
        y = (scores.softmax(-1) @ v).transpose(0, 1).reshape(steps, width)
        x = x + F.linear(y, get(f"{at}.self_attn.o_proj.weight"))
        y = norm(x, f"{at}.post_attention_layernorm")
        gate = F.silu(F.linear(y, get(f"{at}.mlp.gate_proj.weight")))
        y = gate * F.linear(y, get(f"{at}.mlp.up_proj.weight"))
        x = x + F.linear(y, get(f"{at}.mlp.down_proj.weight"))
    return F.linear(norm(x, "model.norm"), get("lm_head.weight"))


def torch_gradients(
    folder: Path, case: Mapping[str, np.ndarray]
) -> tuple[float, dict[str, np.ndarray]]:
    """The weighted sum of the losses of a case's targets, and its gradient by released name."""
    import torch
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    params = {}
    for file in sorted(folder.glob("*.safetensors")):
        params |= load_file(file)
    params = {name: value.float().requires_grad_() for name, value in params.items()}
    loss = torch.zeros(())
    for row, start in enumerate(case["starts"]):
        ids = torch.from_numpy(case["ids"][row].astype(np.int64))
        x = params["model.embed_tokens.weight"][ids[:-1]]
        if start >= 0:
            mel = torch.from_numpy(case[f"mel_{row}"].astype(np.float32))
            heard = encode(torch, params.get, config["audio_encoder_config"], mel)
            heard = adapt(torch, params.get, heard)[: features_of(mel.shape[1])]
            x = torch.cat([x[:start], heard, x[start + len(heard) :]])
        logits = decode(torch, params.get, config["text_config"], x)
        losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        loss = loss + (losses * torch.from_numpy(case["weights"][row])).sum()
    loss.backward()

    def zero(value):
        return np.zeros(value.shape, np.float32)

    return loss.item(), {
        name: zero(value) if value.grad is None else value.grad.numpy()
        for name, value in params.items()
    }


def main() -> None:
    config = json.loads((CHECKPOINT / "config.json").read_text())
    start = json.loads((CHECKPOINT / "special_ids.json").read_text())["audio_start"]
    case = make_case(config, start)
    loss, gradients = torch_gradients(CHECKPOINT, case)
    names = sorted(gradients)
    prints = np.stack([fingerprint(gradients[name]) for name in names]).astype(np.float32)
    with_loss = case | {"names": np.array(names), "prints": prints, "loss": np.float32(loss)}
    np.savez_compressed(RECORDING, **with_loss)
    print(f"{RECORDING}: {len(names)} tensors, loss {loss:.4f}, {RECORDING.stat().st_size} bytes")


if __name__ == "__main__":
    main()
