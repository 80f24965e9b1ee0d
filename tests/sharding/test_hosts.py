"""Two processes that make one machine, as two hosts of a TPU pod do."""

import json
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from helpers.devices import environment
from helpers.small_training import save_model, save_pairs, values

from sa2jax import testing
from sa2jax.cli import main
from sa2jax.errors import ShardingError
from sa2jax.inference.requests import GenerationConfig, Request
from sa2jax.pipeline import StepAudio2
from sa2jax.runtime import start_distributed
from sa2jax.train.log import read_metrics

RUN = """
    import json, sys
    import jax, numpy as np
    from sa2jax.runtime import start_distributed

    number = start_distributed()
    from sa2jax.inference.requests import GenerationConfig, Request
    from sa2jax.pipeline import StepAudio2

    def answers(model):
        rng = np.random.default_rng(0)
        mel = rng.standard_normal((model.cfg.audio_encoder.mels, 100), np.float32)
        ids = rng.integers(0, 256, 40).astype(np.int32)
        requests = [Request(ids, (mel,), (3,), (12,)), Request(ids[:5])]
        made = model.engine.generate(requests, GenerationConfig(max_new_tokens=12))
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
    logits = model.engine.logits(Request(np.arange(9, dtype=np.int32)))
    reply = {"number": number, "devices": jax.device_count(), "here": jax.local_device_count(),
             "ids": answers(model), "read": half, "logits": float(np.abs(logits).sum())}
    dealt = StepAudio2.from_pretrained(sys.argv[1], mesh="data=2,tensor=2")
    reply["replicas"] = len(dealt.replicas)
    chat = dealt.chat(system=None, options=GenerationConfig(max_new_tokens=8))
    reply["said"] = chat.say("hello").text

    # The detokenizer of a mesh of both hosts: each speaks on its own devices.
    from pathlib import Path
    from helpers.recorded_speech import other_voice
    from helpers.small_speech import SPEAKER, small_networks
    from sa2jax.speech.token2wav import Token2Wav
    from sa2jax.sharding import make_mesh
    mesh = make_mesh("data=2,tensor=2")
    speech = Token2Wav(SPEAKER, small_networks(), steps=2, mesh=mesh)
    wave = speech([1, 2, 3, 4, 5], other_voice(2, 31, SPEAKER))
    reply["wave"] = [len(wave), float(np.abs(wave).sum()), len(speech.replicas())]
    # What carries messages between processes on CPUs prints, too.
    Path(sys.argv[2]).with_suffix(f".{number}").write_text(json.dumps(reply))
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def place(number, port):
    return {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(number),
    }


def run_together(command, home):
    """The same command in two processes with two devices each."""
    port = free_port()
    both = [
        subprocess.Popen(
            command,
            env=environment(2, home / str(number)) | place(number, port),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for number in range(2)
    ]
    try:
        results = [run.communicate(timeout=400) for run in both]
    finally:
        for run in both:
            run.kill()
    for run, (_, err) in zip(both, results, strict=True):
        assert run.returncode == 0, err
    return [out for out, _ in results]


@pytest.mark.slow
def test_two_hosts_answer_as_one(tmp_path):
    """Batches run over both; each reads its part of the checkpoint, and has its own replica."""
    source = testing.save_tiny_checkpoint(tmp_path / "hf")
    main(["convert", str(source), str(tmp_path / "model")])
    command = [sys.executable, "-c", textwrap.dedent(RUN), str(tmp_path / "model")]
    run_together([*command, str(tmp_path / "reply")], tmp_path)
    replies = [json.loads((tmp_path / f"reply.{number}").read_text()) for number in range(2)]
    assert [reply.pop("number") for reply in replies] == [0, 1]
    whole = sum(
        leaf.size * 4 for leaf in jax.tree.leaves(testing.tiny_params(testing.tiny_config()))
    )
    for reply in replies:
        # Of what fsdp splits over the hosts half is read; biases and norms are on all.
        assert reply.pop("read") < 0.8 * whole
        assert (reply["devices"], reply["here"], reply["replicas"]) == (4, 2, 1)
        assert (reply["wave"][0], reply["wave"][2]) == (5 * 960, 1)
    assert replies[0] == replies[1]
    model = StepAudio2.from_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    mel = rng.standard_normal((model.cfg.audio_encoder.mels, 100), np.float32)
    ids = rng.integers(0, 256, 40).astype(np.int32)
    requests = [Request(ids, (mel,), (3,), (12,)), Request(ids[:5])]
    made = model.engine.generate(requests, GenerationConfig(max_new_tokens=12))
    assert replies[0]["ids"] == [list(reply.ids) for (reply,) in made]
    chat = model.chat(system=None, options=GenerationConfig(max_new_tokens=8))
    assert replies[0]["said"] == chat.say("hello").text


@pytest.mark.slow
def test_a_command_on_two_hosts_prints_once(tmp_path):
    source = testing.save_tiny_checkpoint(tmp_path / "hf")
    wav = min((Path(__file__).parents[1] / "golden" / "nano" / "heard" / "asr_seen").iterdir())
    command = [
        sys.executable,
        "-m",
        "sa2jax.cli",
        "asr",
        str(wav),
        "--model",
        str(source),
        "--mesh",
        "data=2,tensor=2",
        "--distributed",
        "--max-new-tokens",
        "4",
        "--json",
    ]
    first, second = run_together(command, tmp_path)
    assert json.loads(first)
    assert second == ""


@pytest.mark.slow
def test_two_hosts_train_as_one(tmp_path):
    """Each reads its own share of the data; checkpoints and the model are those of both."""
    plan = values(save_model(tmp_path / "hf"), save_pairs(tmp_path / "pairs"))
    plan["mesh"] = "data=2,fsdp=2"
    plan["data"]["rows"] = 4
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(plan))
    command = [
        sys.executable,
        "-m",
        "sa2jax.cli",
        "train",
        "--config",
        str(tmp_path / "own.yaml"),
        "--out",
        str(tmp_path / "run"),
        "--distributed",
        "--steps",
        "4",
    ]
    first, second = run_together(command, tmp_path)
    assert f"model: {tmp_path / 'run' / 'model'}" in first
    assert second == ""
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["loss"] < lines[0]["loss"]
    place = tmp_path / "run" / "checkpoints" / "4" / "data" / "metadata"
    hosts = json.loads(place.read_text())["hosts"]
    assert [host["host"] for host in hosts] == [0, 1]
    again, _ = run_together(command, tmp_path)  # goes on from the last checkpoint
    assert again == first
    alone = StepAudio2.from_pretrained(tmp_path / "run" / "model")
    assert (
        alone.chat(system=None, options=GenerationConfig(max_new_tokens=4)).say("hello").text
        is not None
    )


def test_hosts_that_cannot_be_found(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    message = "set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
    with pytest.raises(ShardingError, match=message):
        start_distributed()
