"""What is folded into the keys of masking for draws beside the masks: all in one place, so that no two share a number."""

import numpy as np

# Into an example's key; its mask is drawn from the key itself.
RATE, PATCHES, SAMPLES = 1, 2, 3
# Into the run's mask key, where examples fold in their epoch; no run has as many epochs.
ROW_RATES, CAUSAL_ROWS, DRAWS = (np.uint32(2**32 - n) for n in (1, 2, 3))
