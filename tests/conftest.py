"""Before torch is imported: one thread a process. Tests are small, and run side by side.

And before the hub's client is: no test asks the hub for anything.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
