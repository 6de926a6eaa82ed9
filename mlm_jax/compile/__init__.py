"""The `compile` verb: what XLA's own compiler says of a stage's train step on a topology that is not here.

It compiles the very functions that training runs, for compile-only devices: whether the step fits, what it communicates,
and, by the compiler's cost model and arithmetic, about how long it takes. All times are estimates, and on GPUs lower bounds.
This package and `topology` import no JAX, which has to find the environment of `topology` already set.
"""
