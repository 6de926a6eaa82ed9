"""The verbs of the command line: what each takes, and the module that does the work, imported only when the verb runs."""

from mlm_jax.verbs import exchange, measuring, pretraining, tasks
from mlm_jax.verbs.options import Verbs

VERBS: Verbs = pretraining.VERBS | tasks.VERBS | exchange.VERBS | measuring.VERBS
