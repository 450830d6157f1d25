"""Run by every interpreter that `run` starts, and by its children: switches on what the environment
asks for.
"""

import os

wanted = os.environ.get("NULLGPU_VALUES") or os.environ.get("NULLGPU_REPORT")
if os.environ.get("NULLGPU_STUB") and wanted:
    import nullgpu

    nullgpu.activate()
