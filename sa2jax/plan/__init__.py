"""Whether a model fits on hardware that is not here, and how fast it can be; see `planner`.

made = plan(Spec(topology="v5e:2x4", workload="decode", batch=8))
made.fits, made.peak, made.seconds, made.bound
"""

from sa2jax.plan.planner import Plan, plan, search
from sa2jax.plan.workloads import Spec

__all__ = ["Plan", "Spec", "plan", "search"]
