"""mlm-jax: masked-language-model pre-training in JAX, one XLA program per step."""

__version__ = "0.1.0"
