"""`python -m mlm_jax VERB`, the same as `mlm-jax VERB`."""

import sys

from mlm_jax.cli import main

sys.exit(main())
