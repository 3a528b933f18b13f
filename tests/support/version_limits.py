"""Prints constraints for pip that test the ranges of pyproject.toml: `make oldest` and `make newest`.

    python tests/support/version_limits.py oldest

"oldest" pins each requirement to the lower end of its range. "newest" lets pip take the newest releases, so it prints
nothing but the arguments that follow, such as a torch==2.13.0 for a machine that has one without CUDA libraries.
"""

import re
import sys
import tomllib
from pathlib import Path


def oldest_versions(pyproject: str) -> list[str]:
    """Returns a constraint for each requirement of a user. Raises ValueError for one without a lower end."""
    project = tomllib.loads(pyproject)["project"]
    extras = project["optional-dependencies"]
    wanted = {line for name, group in extras.items() if name != "test" for line in group}
    lines = []
    for requirement in sorted(wanted.union(project["dependencies"])):
        found = re.fullmatch(r"([\w.-]+)(?:\[[\w,-]+\])?>=([\d.]+)(,.*)?", requirement)
        if found is None:
            raise ValueError(f"{requirement!r}: expected the form name>=version")
        lines.append(f"{found[1]}=={found[2]}")
    return lines


if __name__ == "__main__":
    lane, *more = sys.argv[1:]
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    print("\n".join([*(oldest_versions(pyproject.read_text()) if lane == "oldest" else []), *more]))
