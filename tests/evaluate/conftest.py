import importlib.util
import json
import shutil
import subprocess
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sa2jax.evaluate.normalizer import DIGITS, SUMS

RATE = 24_000
VOICES = ("anna", "bert")
TOOLS = [{"type": "function", "function": {"name": "get_date_time", "description": "The time."}}]


def write_wav(path: Path, wave: np.ndarray) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, RATE)
    return path.name


def sound_of(number: int, samples: int = 12_000) -> np.ndarray:
    """What the fake judges hear as a number; 0 is heard as the first word."""
    return np.full(samples, (number + 1) / 100, np.float32)


def talk(audio: str, answer: str, **more) -> dict:
    asked = {"role": "user", "content": "<audio>"}
    head = {"role": "system", "content": "You are a helpful assistant."}
    said = {"role": "assistant", "content": answer} | more.pop("said", {})
    after = more.pop("after", [])
    return {"messages": [head, asked, said, *after], "audios": [audio]} | more


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Eight transcriptions in each voice, eight sums, four tool calls and four without, texts."""
    home = tmp_path / "corpus" / "heldout"
    files = {name: [] for name in ("asr_seen", "asr_unseen", "sums", "tools", "tts", "chat")}
    for n in range(8):
        name = write_wav(home / f"{n}.wav", sound_of(n))
        write_wav(home / "said" / f"{n}.wav", sound_of(n))
        files["asr_seen"].append(talk(name, f"the dog has {DIGITS[n]} keys"))
        files["asr_unseen"].append(talk(name, f"the cat has {DIGITS[n]} keys"))
        files["sums"].append(talk(name, SUMS[n], said={"speech": f"said/{n}.wav"}))
        files["chat"].append(talk(name, "good morning"))
        files["tts"].append(
            {
                "messages": [
                    {"role": "user", "content": f"read {n}"},
                    {"role": "assistant", "content": f"read {n}"},
                ]
            }
        )
        call = {"role": "tool_call", "content": '{"name": "get_date_time", "arguments": {}}'}
        files["tools"].append(talk(name, "let me look", tools=TOOLS, after=[call] * (n % 2)))
    for name, rows in files.items():
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for n, voice in enumerate(VOICES):
        write_wav(tmp_path / "corpus" / "voices" / f"{voice}.wav", sound_of(n))
    return tmp_path / "corpus"


@cache
def _hibari():
    from hibari import Hibari

    return Hibari(voice="heart")


def synthetic(voice: str, text: str) -> tuple[np.ndarray, int]:
    """Synthetic speech; skips the test where its voice is not installed."""
    if voice == "hibari":
        if importlib.util.find_spec("hibari") is None:
            pytest.skip("hibari-tts is not installed")
        return np.asarray(_hibari()(text, seed=0), np.float32), 24_000
    if shutil.which("flite") is None:
        pytest.skip("flite is not installed")
    command = ["flite", "-voice", voice, "-t", text, "-o", "/dev/stdout"]
    data = bytearray(subprocess.run(command, capture_output=True, check=True).stdout)
    data[4:8] = (len(data) - 8).to_bytes(4, "little")
    start = data.find(b"data")
    data[start + 4 : start + 8] = (len(data) - start - 8).to_bytes(4, "little")
    wave, rate = soundfile.read(BytesIO(bytes(data)), dtype="float32")
    return wave, rate


@pytest.fixture
def say():
    return synthetic
