"""The encoder: one configurable architecture, declared with Flax NNX and transformed with plain `jax.*`.

Array names end in their dimensions: B batch, L length (M: length of the keys), D model, H heads, K head dimension, F mlp,
V vocabulary, P predicted positions, N layers, T token types, E embedding tables where these have a width of their own.
"""
