"""A worker that is ready once its libraries are loaded and have done a piece of work."""

from __future__ import annotations

import signal

import numpy as np
import pandas as pd

frame = pd.DataFrame({"group": np.arange(100) % 4, "value": np.arange(100.0)})
assert frame.groupby("group")["value"].sum().tolist() == [1200.0, 1225.0, 1250.0, 1275.0]
print("READY", flush=True)
signal.sigwait({signal.SIGTERM, signal.SIGINT})
