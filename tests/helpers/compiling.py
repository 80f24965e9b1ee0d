"""Pytest plugin: how tests compile. Nearly all of their time would go there.

* Programs are kept in the user's cache folder, so that workers, processes and later runs compile
  each only once. The folder is named by what makes programs differ beside their own text.
* Python collects garbage seldom: tracing makes many objects, and few of them are cycles.
* Memory comes in large pages and is kept: XLA takes and gives back millions of small pieces (a
  fifth of the time). glibc reads this as a process begins, so it is for workers and children.
* XLA optimises little (a third of the time), except for tests marked `optimized`: parity,
  timings, and programs for TPUs, which are to be as users have them. On the lower bound of the
  versions it optimises little always: there it is the interface that could differ.

To be loaded before jax is imported.
"""

import gc
import hashlib
import os
import platform
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path

import pytest

QUICK = "JAX_DISABLE_MOST_OPTIMIZATIONS"
KEEP_DAYS = 14
OLD = tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11)
MALLOC = {
    "hugetlb": 1,
    "top_pad": 2**27,
    "trim_threshold": 2**30,
    "mmap_threshold": 2**29,
    "tcache_count": 500,
}


def processor() -> str:
    """The instructions that this machine's processor has, as a short name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        features = platform.processor()
    return platform.machine() + "-" + hashlib.sha256(features.encode()).hexdigest()[:8]


def cache_folder() -> Path:
    """Where compiled programs of tests stay."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    python = f"py{sys.version_info.major}.{sys.version_info.minor}"
    name = f"{python}-jaxlib{version('jaxlib')}-{processor()}"
    return Path(home) / "sa2jax" / "tests" / name


def forget_old_programs(folder: Path) -> None:
    """Delete programs that were compiled some days ago: most belong to code that is gone."""
    oldest = time.time() - KEEP_DAYS * 24 * 3600
    for path in folder.glob("*"):
        try:
            if path.stat().st_mtime < oldest:
                path.unlink()
        except OSError:  # another run deletes, too
            continue


def write_whole_programs() -> None:
    """Let no worker read a program of which another has written the half: jax writes in place."""
    lru_cache = sys.modules.get("jax._src.lru_cache")
    if lru_cache is None or hasattr(lru_cache.LRUCache, "put_in_place"):
        return
    put = lru_cache.LRUCache.put

    def put_whole(cache, key: str, value: bytes) -> None:
        final = Path(str(cache.path)) / f"{key}{lru_cache._CACHE_SUFFIX}"
        if not final.exists():
            part = final.with_name(f"{os.getpid()}-{threading.get_ident()}.part")
            part.write_bytes(value)
            part.replace(final)

    lru_cache.LRUCache.put_in_place, lru_cache.LRUCache.put = put, put_whole


def compile_quickly(quickly: bool) -> None:
    """Tell jax here, and in processes begun from now on, how much to optimise."""
    os.environ[QUICK] = str(int(quickly))
    jax = sys.modules.get("jax")
    if jax is not None and jax.config.read(QUICK.lower()) != quickly:
        jax.config.update(QUICK.lower(), quickly)
        jax.clear_caches()  # what was compiled the other way


if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache_folder())
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault(
    "GLIBC_TUNABLES", ":".join(f"glibc.malloc.{name}={value}" for name, value in MALLOC.items())
)
if OLD:
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"
    )
compile_quickly(True)
gc.set_threshold(100_000, 20, 20)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        forget_old_programs(Path(os.environ["JAX_COMPILATION_CACHE_DIR"]))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    write_whole_programs()
    compile_quickly(OLD or item.get_closest_marker("optimized") is None)
