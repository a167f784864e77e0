"""Before torch is imported: one thread a process. Tests are small, and run side by side."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
