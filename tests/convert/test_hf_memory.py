"""What converting costs in memory."""

import json
import os
import shutil
import textwrap
from pathlib import Path

import pytest
from helpers.devices import run_on_devices

from sa2jax.config import StepAudio2Config
from sa2jax.convert import hf, weights
from sa2jax.convert.rules import expand
from sa2jax.convert.step_audio2 import llm_rules


def synthetic(folder: Path, cfg: StepAudio2Config, shard_bytes: int) -> int:
    """A sharded checkpoint of zeros in sparse files; returns its size in bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(cfg.to_hf()))
    placements = expand(llm_rules(cfg), hf.leaf_shapes(cfg))
    shards: list[dict[str, weights.TensorInfo]] = [{}]
    for p in sorted(placements, key=lambda p: (p.layer is None, p.layer)):
        for name, shape in zip(p.sources, p.shapes, strict=True):
            if sum(info.nbytes for info in shards[-1].values()) > shard_bytes:
                shards.append({})
            shards[-1][name] = weights.TensorInfo(shape, weights.DTYPES["BF16"])
    weight_map, total = {}, 0
    for number, tensors in enumerate(shards):
        file, header = f"part-{number}.safetensors", weights._make_header(tensors)
        size = sum(info.nbytes for info in tensors.values())
        (folder / file).write_bytes(header)
        os.truncate(folder / file, len(header) + size)
        weight_map |= dict.fromkeys(tensors, file)
        total += size
    (folder / weights.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return total


@pytest.mark.slow
def test_converting_three_gigabytes_takes_less_than_half_of_that(tmp_path):
    if shutil.disk_usage(tmp_path).free < 8e9:
        pytest.skip("needs 8 GB of disk")
    tiny = StepAudio2Config.preset("tiny")
    text = tiny.to_hf()
    text["text_config"] |= dict(
        vocab_size=158720,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=14,
        num_attention_heads=16,
        num_key_value_heads=4,
        num_attention_groups=4,
    )
    text["audio_encoder_config"]["llm_dim"] = 2048
    cfg = StepAudio2Config.from_hf(text)
    assert synthetic(tmp_path / "big", cfg, 1 << 30) > 3e9
    script = """
        import sys
        from sa2jax.convert import hf, weights
        baseline = weights.peak_memory()
        report = hf.convert(*sys.argv[1:])
        print(baseline, report.peak_bytes, weights.peak_memory())
    """
    command = ["-c", textwrap.dedent(script), tmp_path / "big", tmp_path / "ours"]
    run = run_on_devices(1, command, tmp_path / "cache")
    baseline, reported, peak = map(int, run.stdout.split())
    assert reported == peak
    assert peak - baseline < 1.5e9
    shutil.rmtree(tmp_path / "ours")
