"""Two processes that make one machine, as two hosts of a TPU pod do."""

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest

from sa2jax import testing
from sa2jax.cli import main
from sa2jax.errors import ShardingError
from sa2jax.inference.generate import Options, Request
from sa2jax.pipeline import StepAudio2
from sa2jax.runtime import start_distributed

RUN = """
    import json, sys
    import jax, numpy as np
    from sa2jax.runtime import start_distributed

    number = start_distributed()
    from sa2jax.inference.generate import Options, Request
    from sa2jax.pipeline import StepAudio2

    def answers(model):
        rng = np.random.default_rng(0)
        mel = rng.standard_normal((model.cfg.audio_encoder.mels, 100), np.float32)
        ids = rng.integers(0, 256, 40).astype(np.int32)
        requests = [Request(ids, (mel,), (3,), (12,)), Request(ids[:5])]
        made = model.generator.generate(requests, Options(max_new_tokens=12))
        return [list(reply.ids) for (reply,) in made]

    reads = []
    from sa2jax import checkpoint
    read = checkpoint._read
    def counted(leaf, index, out):
        reads.append(out.nbytes)
        read(leaf, index, out)
    checkpoint._read = counted
    model = StepAudio2.from_pretrained(sys.argv[1], mesh="fsdp=2,tensor=2")
    half = sum(reads)
    logits = model.generator.logits(Request(np.arange(9, dtype=np.int32)))
    reply = {"number": number, "devices": jax.device_count(), "here": jax.local_device_count(),
             "ids": answers(model), "read": half, "logits": float(np.abs(logits).sum())}
    dealt = StepAudio2.from_pretrained(sys.argv[1], mesh="data=2,tensor=2")
    reply["replicas"] = len(dealt.replicas)
    chat = dealt.chat(system=None, options=Options(max_new_tokens=8))
    reply["said"] = chat.say("hello").text
    print(json.dumps(reply))
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(number, count, port, home):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    return os.environ | {
        "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "XDG_CACHE_HOME": str(home / str(number)),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(number),
    }  # fmt: skip


def run_together(command, home):
    """The same command in two processes with two devices each."""
    port = free_port()
    both = [
        subprocess.Popen(
            command, env=environment(number, 2, port, home), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for number in range(2)
    ]  # fmt: skip
    try:
        results = [run.communicate(timeout=400) for run in both]
    finally:
        for run in both:
            run.kill()
    for run, (_, err) in zip(both, results, strict=True):
        assert run.returncode == 0, err
    # What carries messages between processes on CPUs says so on standard output.
    said = [[line for line in out.splitlines() if "[Gloo]" not in line] for out, _ in results]
    return ["\n".join(lines) for lines in said]


def test_two_hosts_answer_as_one(tmp_path):
    """Batches run over both; each reads its part of the checkpoint, and has its own replica."""
    source = testing.save_tiny_checkpoint(tmp_path / "hf")
    main(["convert", str(source), str(tmp_path / "model")])
    command = [sys.executable, "-c", textwrap.dedent(RUN), str(tmp_path / "model")]
    replies = [json.loads(out.splitlines()[-1]) for out in run_together(command, tmp_path)]
    assert [reply.pop("number") for reply in replies] == [0, 1]
    whole = sum(
        leaf.size * 4 for leaf in jax.tree.leaves(testing.tiny_params(testing.tiny_config()))
    )
    for reply in replies:
        # Of what fsdp splits over the hosts half is read; biases and norms are on all.
        assert reply.pop("read") < 0.8 * whole
        assert (reply["devices"], reply["here"], reply["replicas"]) == (4, 2, 1)
    assert replies[0] == replies[1]
    model = StepAudio2.from_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    mel = rng.standard_normal((model.cfg.audio_encoder.mels, 100), np.float32)
    ids = rng.integers(0, 256, 40).astype(np.int32)
    requests = [Request(ids, (mel,), (3,), (12,)), Request(ids[:5])]
    made = model.generator.generate(requests, Options(max_new_tokens=12))
    assert replies[0]["ids"] == [list(reply.ids) for (reply,) in made]
    chat = model.chat(system=None, options=Options(max_new_tokens=8))
    assert replies[0]["said"] == chat.say("hello").text


def test_a_command_on_two_hosts_prints_once(tmp_path):
    source = testing.save_tiny_checkpoint(tmp_path / "hf")
    wav = Path(__file__).parents[1] / "golden" / "frontend" / "stereo48k.wav"
    command = [
        sys.executable, "-m", "sa2jax.cli", "asr", str(wav), "--model", str(source),
        "--mesh", "data=2,tensor=2", "--distributed", "--max-new-tokens", "4", "--json",
    ]  # fmt: skip
    first, second = run_together(command, tmp_path)
    assert json.loads(first)
    assert second == ""


def test_hosts_that_cannot_be_found(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    message = "set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
    with pytest.raises(ShardingError, match=message):
        start_distributed()
