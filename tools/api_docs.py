"""The API reference as HTML: `python tools/api_docs.py [OUT]` (default `site`); a docstring or name
that does not resolve is an error.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import warnings
from pathlib import Path

import pdoc

sys.path.insert(0, str(Path(__file__).parents[1]))


def main(out: str = "site") -> None:
    import cllm

    warnings.simplefilter("error", UserWarning)
    # pdoc looks for the annotations of a NamedTuple's generated __init__ in the wrong module.
    warnings.filterwarnings("ignore", message=r"Error parsing type annotation .*__init__")
    for found in pkgutil.walk_packages(cllm.__path__, "cllm."):
        if not found.name.endswith("__main__"):
            module = importlib.import_module(found.name)
            for name in getattr(module, "__all__", ()):  # lazy names become members
                setattr(module, name, getattr(module, name))
    pdoc.pdoc("cllm", "!cllm.__main__", output_directory=Path(out))
    pages = len(list(Path(out).rglob("*.html")))
    print(f"{pages} pages in {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
