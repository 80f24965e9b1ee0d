"""Memory and roofline of a model on hardware that is not here; see `planner`.

result = plan(Spec(topology="v5e:2x4", workload="decode", batch=8))
result.fits, result.peak, result.seconds, result.bound
"""

from sa2jax.plan.planner import Plan, plan, search
from sa2jax.plan.workloads import Spec

__all__ = ["Plan", "Spec", "plan", "search"]
