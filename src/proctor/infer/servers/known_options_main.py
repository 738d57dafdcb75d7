"""`python -m proctor.infer.servers.known_options_main PACKAGE OPTION...`: prints the options that the package has.

Runs in the server's environment, which has nothing else of ours: the standard library only.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path


def main() -> None:
    """A field of that name, in any file that declares command line options."""
    package, *options = sys.argv[1:]
    spec = find_spec(package)
    places = [Path(place) for place in spec.submodule_search_locations or ()] if spec else []
    files = [file for place in places for file in place.glob("entrypoints/**/cli_args.py")]
    text = "".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
    sys.stdout.write(" ".join(option for option in options if option.replace("-", "_") + ":" in text))


if __name__ == "__main__":
    main()
