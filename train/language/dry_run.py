"""Dry run of the language model's training; no weights are loaded."""

import jax
import jax.numpy as jnp

from sa2jax.train.data.examples import TOKEN_KINDS
from sa2jax.train.dry_run import DryRun, device_size, memory_per_device, parameter_groups
from sa2jax.train.language.model_io import open_base_model
from sa2jax.train.language.recipe import LanguageRecipe
from sa2jax.train.language.step import abstract_language_batch
from sa2jax.train.language.task import make_step, optimizer_config
from sa2jax.train.loop import describe_mesh, mesh_from_spec, micro_batch_rows
from sa2jax.train.optimizer import make_optimizer
from sa2jax.train.state import abstract_state


def dry_run_language(recipe: LanguageRecipe) -> DryRun:
    """Compile the step of a recipe for the devices at hand, and count.

    Raises:
        ConfigError: if the model's config is not understood.
        ShardingError: for a mesh that does not fit the devices.
        TrainError: if nothing would be trained, or rows do not divide by the mesh.
    """
    mesh, base = mesh_from_spec(recipe.mesh), open_base_model(recipe.model, recipe.lora)
    config = optimizer_config(recipe)
    optimizer = make_optimizer(config)
    state = abstract_state(base.model, optimizer, mesh)
    accumulation = recipe.data.accumulation_steps
    rows = micro_batch_rows(recipe.data.rows, recipe.data.accumulation_steps, mesh)
    batch = abstract_language_batch(
        base.cfg,
        mesh,
        rows,
        recipe.data.length,
        clips=rows * recipe.data.mel_rows,
        frames=recipe.data.mel_frames,
        packed=recipe.data.clips,
        accumulation_steps=accumulation,
        metric_masks=TOKEN_KINDS,
    )
    step = make_step(recipe, base, optimizer, mesh)
    trained, _ = optimizer.partition(state.params)
    numbers = sum(map(device_size, jax.tree.leaves(trained)))
    added_up = numbers * jnp.dtype(recipe.grad_dtype).itemsize
    memory = memory_per_device(step, state, batch, added_up * bool(accumulation))
    tokens = rows * max(accumulation, 1) * recipe.data.length
    return DryRun(
        parameter_groups(config, state), describe_mesh(mesh), memory, tokens, config.steps
    )
