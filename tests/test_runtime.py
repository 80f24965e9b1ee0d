"""What every program that runs a model decides alike."""

import jax

from sa2jax.runtime import enable_compilation_cache


def test_compilation_cache_folder(monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "sa2jax" / "xla")
        monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
        enable_compilation_cache()  # what the user has chosen stays
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "sa2jax" / "xla")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
