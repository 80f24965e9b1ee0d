"""A Qwen2.5 whose config.json leaves out what its class has by default."""

import pytest

from sa2jax.convert.init import _config
from sa2jax.errors import ConfigError

TEXT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 32}


def test_what_is_not_there_has_the_value_of_qwen2s_class():
    cfg = _config(TEXT, {}, 512)
    assert (cfg.decoder.mlp, cfg.decoder.kv_heads, cfg.decoder.rope_theta) == (22016, 32, 1e4)
    rope = {"rope_theta": 1e6, "rope_type": "default"}
    assert _config(TEXT | {"rope_parameters": rope}, {}, 512).decoder.rope_theta == 1e6
    with pytest.raises(ConfigError, match="rope_scaling="):
        _config(TEXT | {"rope_scaling": {"type": "linear", "factor": 2}}, {}, 512)
