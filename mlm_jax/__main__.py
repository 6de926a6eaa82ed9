"""`python -m mlm_jax VERB`, the same as `mlm-jax VERB`."""

from mlm_jax.cli import run

run()
