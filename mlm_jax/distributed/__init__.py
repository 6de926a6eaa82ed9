"""Several processes as one run: who they are, that all come and go together, and JAX's view of them."""

from mlm_jax.distributed.cluster import Cluster, find_cluster
from mlm_jax.distributed.peers import Peers, join

__all__ = ["Cluster", "Peers", "find_cluster", "join"]
