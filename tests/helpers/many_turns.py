"""Run by test_real.py in a process of its own: the memory of many spoken turns."""

import json
import resource
import threading
from pathlib import Path

from helpers.scripted import until_sound
from helpers.small_pipeline import small_model, small_speech
from sa2jax.inference.requests import GenerationConfig
from sa2jax.inference.sampling import SamplingParams
from sa2jax.runtime import enable_compilation_cache

TURNS = 120


def resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def main() -> None:
    """A third of the answers is cancelled; prints MB after each, and which threads ran programs."""
    model = small_model(small_speech())
    options = GenerationConfig(
        sampling=SamplingParams(temperature=0.7, top_p=0.9),
        max_new_tokens=60,
        stop_ids=model.stop_ids,
        seed=1,
    )
    enable_compilation_cache()
    chat, used, threads = model.chat("S", options=options, voice="default"), [], set()
    first = set(threading.enumerate())
    for number in range(TURNS):
        stream = chat.stream("why? ", first=5, seed=number % 4)
        if number % 3 == 0:
            until_sound(stream)
            stream.cancel()
        else:
            list(stream)
        threads |= {(thread.ident, thread.name) for thread in {*threading.enumerate()} - first}
        used.append(resident_megabytes())
    print(json.dumps({"used": used, "threads": sorted(name for _, name in threads)}))


if __name__ == "__main__":
    main()
