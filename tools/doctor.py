"""What of this machine helps or hinders a training: `python tools/doctor.py`, also before anything
is installed.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
if sys.version_info < (3, 11) and not importlib.util.find_spec("tomli"):
    from pip._vendor import tomli  # before anything is installed, pip has one

    sys.modules["tomli"] = tomli

from cllm.doctor import examine
from cllm.messages import print_result

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # as cllm.__main__ does
sys.stdout.reconfigure(errors="replace")
print_result({"findings": [finding._asdict() for finding in examine()]}, "--json" in sys.argv)
