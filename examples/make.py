"""Makes the example data set: synthetic speech, and the toy codes of its spoken answers.

    pip install hibari-tts==0.2.1
    python examples/make.py

Needs sa2jax beside hibari-tts. README.md says what comes out.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from hibari import Hibari

from sa2jax import audio
from sa2jax.chat.template import TASKS

HERE = Path(__file__).parent
RATE = 16_000
CODES = 64  # classes of the toy tokenizer
BANDS = 40
CHAT, ASR, CAPTION, VOICE = (TASKS[t].system for t in ("chat", "asr", "caption", "paralinguistic"))
READ = TASKS["tts"].system_en
WEATHER = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {"type": "object", "properties": {"location": {"type": "string"}}},
        },
    }
]

# What users say: text, seed, speed, pitch (1 is the voice's own).
HEARD = {
    "01_harbour": ("The boats come back at noon.", 1, 1.0, 1.0),
    "02_bread": ("She baked two loaves of bread.", 2, 1.1, 0.86),
    "03_train": ("Our train leaves from platform nine.", 3, 1.2, 0.94),
    "04_numbers": ("Seven, three, eight, one.", 4, 1.0, 1.1),
    "05_window": ("Please close the window.", 5, 0.95, 0.9),
    "06_capital": ("What is the capital of France?", 6, 1.1, 0.88),
    "07_legs": ("How many legs has a spider?", 7, 1.0, 1.08),
    "08_sky": ("What color is the sky?", 8, 1.0, 0.95),
    "09_cold": ("Is ice cold?", 9, 0.95, 0.85),
    "10_repeat": ("Repeat after me. The sea is calm.", 10, 1.15, 1.0),
    "11_repeat": ("Repeat after me. Green tea.", 11, 1.1, 0.9),
    "12_number": ("Think of a small number.", 12, 1.1, 1.05),
    "12_double": ("Now double it.", 13, 1.0, 1.05),
    "13_oslo": ("What is the weather in Oslo?", 14, 1.1, 0.92),
    "14_night": ("Good night.", 15, 1.0, 1.0),
}

# What the assistant says, always in the same voice: text and seed.
SAID = {
    "06": ("Paris.", 31),
    "07": ("Eight legs.", 32),
    "08": ("Blue.", 33),
    "09": ("Yes, very cold.", 34),
    "10": ("The sea is calm.", 35),
    "11": ("Green tea.", 36),
    "12_first": ("I have four.", 37),
    "12_second": ("That is eight.", 38),
    "13": ("Let me look.", 39),
    "16": ("A lark sings over the field.", 40),
}


def records() -> list[dict[str, Any]]:
    """The data set; an answer that is in `SAID` gets its speech later, by this mark."""

    def asr(name: str) -> dict[str, Any]:
        return record([system(ASR), user(), reply(HEARD[name][0])], name)

    def written(name: str) -> dict[str, Any]:
        return record([system(CHAT), user(), reply(SAID[name[:2]][0])], name)

    def chat(name: str, said: str, prompt: str = CHAT) -> dict[str, Any]:
        return record([system(prompt), user(), spoken(said)], name)

    call = {
        "role": "tool_call",
        "content": '{"name": "get_weather", "arguments": {"location": "Oslo"}}',
    }
    two = [user(), spoken("12_first"), user(), spoken("12_second")]
    caption = record(
        [system(CAPTION), user(), reply("A woman says good night, then a tone sounds.")], "14_night"
    )
    return [
        *map(asr, ("01_harbour", "02_bread", "03_train", "05_window")),
        asr("04_numbers") | {"solution": "7381"},
        chat("06_capital", "06"),
        chat("07_legs", "07"),
        chat("08_sky", "08", VOICE),
        chat("09_cold", "09", VOICE),
        chat("10_repeat", "10"),
        chat("11_repeat", "11"),
        record([system(CHAT), *two], "12_number", "12_double"),
        record([system(CHAT), user(), spoken("13"), call], "13_oslo") | {"tools": WEATHER},
        caption | {"rejected_response": "A dog barks."},
        record([system(CHAT), user("Name a fruit."), reply("An apple.")]),
        record([user(READ + SAID["16"][0]), spoken("16")]),
        *(written(name) for name in ("06_capital", "07_legs", "10_repeat", "11_repeat")),
    ]


def record(messages: list[dict[str, Any]], *names: str) -> dict[str, Any]:
    """One record of messages and the recordings in them."""
    return {"messages": messages, "audios": [f"audio/{name}.flac" for name in names]}


def system(text: str) -> dict[str, Any]:
    """A system prompt."""
    return {"role": "system", "content": text}


def user(text: str = "<audio>") -> dict[str, Any]:
    """What a user says."""
    return {"role": "user", "content": text}


def reply(text: str) -> dict[str, Any]:
    """An answer in text."""
    return {"role": "assistant", "content": text}


def spoken(name: str) -> dict[str, Any]:
    """An answer that is also said."""
    return reply(SAID[name][0]) | {"speech": f"audio/reply_{name}.flac"}


def say(tts: Hibari, text: str, seed: int, speed: float = 1.0, pitch: float = 1.0) -> np.ndarray:
    """Speech at 16 kHz with 80 ms of silence around; a lower pitch is a slower tape."""
    wave = tts(text, seed=seed, speed=speed / pitch)
    wave = audio.resample(wave, round(24_000 * pitch), RATE)
    loud = np.flatnonzero(np.abs(wave) > 0.01)
    wave = wave[loud[0] : loud[-1] + 1] * np.float32(0.5 / np.abs(wave).max())
    return np.pad(wave, RATE * 80 // 1000)


def bands(wave: np.ndarray) -> np.ndarray:
    """25 frames a second of a recording's log-mel spectrum, [A, BANDS]."""
    mel = audio.s3_log_mel(wave, n_mels=BANDS).T  # [4 A, BANDS]
    mel = np.pad(mel, ((0, -len(mel) % 4), (0, 0)), mode="edge")
    return mel.reshape(-1, 4, BANDS).mean(1)


def k_means(frames: np.ndarray, count: int, rounds: int = 60) -> np.ndarray:
    """Centres of clusters, the quietest first, [count, BANDS]."""
    rng = np.random.default_rng(0)
    centres = frames[rng.permutation(len(frames))[:count]]
    for _ in range(rounds):
        near = nearest(frames, centres)
        for n in range(count):
            if (mine := frames[near == n]).size:
                centres[n] = mine.mean(0)
    return centres[np.argsort(centres.mean(1), kind="stable")]


def nearest(frames: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Which centre each frame is closest to."""
    return ((frames[:, None] - centres) ** 2).sum(-1).argmin(1)


def main() -> None:
    """Write audio/ and both .jsonl files."""
    tts = Hibari()
    folder = HERE / "audio"
    folder.mkdir(exist_ok=True)
    waves = {name: say(tts, *how) for name, how in HEARD.items()}
    time = np.arange(RATE * 6 // 10) / RATE
    tone = 0.2 * np.sin(2 * np.pi * 660 * time) * np.exp(-5 * time)
    waves["14_night"] = np.concatenate([waves["14_night"], tone])
    replies = {f"reply_{name}": say(tts, text, seed) for name, (text, seed) in SAID.items()}
    for name, wave in (waves | replies).items():
        soundfile.write(folder / f"{name}.flac", wave, RATE, subtype="PCM_16")
    # What is in the files, not what was written to them.
    heard = {name: bands(audio.load_audio(folder / f"{name}.flac")) for name in replies}
    centres = k_means(np.concatenate([*heard.values()]), CODES)
    codes = {f"audio/{name}.flac": nearest(x, centres).tolist() for name, x in heard.items()}
    found = records()
    write("talks_recordings.jsonl", found)
    for message in (m for row in found for m in row["messages"] if "speech" in m):
        message["speech"] = codes[message["speech"]]
    write("talks.jsonl", found)


def write(name: str, rows: list[dict[str, Any]]) -> None:
    """Write records, one a line."""
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    (HERE / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
