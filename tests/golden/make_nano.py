"""Takes a few held-out recordings out of a corpus, for tests of the model that comes along.

    sa2jax data synthesize corpus --config nano/corpus
    python tests/golden/make_nano.py corpus

The folder `nano` beside this file can be given to `sa2jax eval nano --data`.
"""

import json
import shutil
import sys
from pathlib import Path

import soundfile

from sa2jax.evaluate.heldout import HeldOut, evenly_spaced

OUT = Path(__file__).parent / "nano"
COUNTS = {"asr_seen": 30, "asr_unseen": 15, "sums": 19, "tools": 20, "tts": 6, "chat": 6}


def main(corpus: str) -> None:
    """Make `nano` anew."""
    shutil.rmtree(OUT, ignore_errors=True)
    held_out = HeldOut.find(corpus)
    for name, count in COUNTS.items():
        lines = (held_out.folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        chosen = [json.loads(line) for line in evenly_spaced(lines, count)]
        for record in chosen:
            for file in record["audios"]:
                _copy(held_out.folder / file, OUT / file)
            for message in record["messages"]:
                message.pop("speech", None)  # what is right is read, not heard
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in chosen)
        (OUT / f"{name}.jsonl").write_text(text, encoding="utf-8")
    for name, path in held_out.voices.items():
        samples, rate = soundfile.read(path)
        (OUT / "voices").mkdir(exist_ok=True)
        soundfile.write(OUT / "voices" / f"{name}.flac", samples, rate)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


if __name__ == "__main__":
    main(sys.argv[1])
