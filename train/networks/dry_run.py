"""Dry run of a single network's training; no weights are loaded."""

from sa2jax.train.dry_run import DryRun, memory_per_device, parameter_groups
from sa2jax.train.loop import describe_mesh, mesh_from_spec, micro_batch_rows
from sa2jax.train.networks.recipes import NetworkRecipe
from sa2jax.train.networks.task import TRAINERS
from sa2jax.train.optimizer import make_optimizer
from sa2jax.train.state import abstract_state


def dry_run_network(recipe: NetworkRecipe) -> DryRun:
    """Compile the step of a recipe for the devices at hand, with a batch of the longest rows.

    Raises:
        CheckpointError: if the folder has no such network.
        DataError: if the data cannot be read, where sizes depend on it.
        ShardingError: for a mesh that does not fit the devices.
        TrainError: if nothing would be trained, the detokenizer is not converted, or rows do not
            divide by the mesh.
    """
    mesh, trainer = mesh_from_spec(recipe.mesh), TRAINERS[recipe.kind]
    network = trainer.open(recipe.network.folder, recipe.network.compute_dtype)
    optimizer, model = make_optimizer(recipe.optimizer), trainer.model(network, recipe)
    state = abstract_state(model, optimizer, mesh)
    rows = micro_batch_rows(recipe.data.rows, 0, mesh)
    step = trainer.make_step(model, optimizer, recipe, mesh)
    memory = memory_per_device(step, state, trainer.abstract_batch(network, recipe, mesh, rows))
    units, unit = rows * trainer.longest_row(recipe), f"{trainer.unit} at most"
    groups = parameter_groups(recipe.optimizer, state)
    return DryRun(groups, describe_mesh(mesh), memory, units, recipe.optimizer.steps, unit)
