"""Makes environments in which tests run packages that the development environment does not have."""

import re
import subprocess
import sys
import sysconfig
from collections.abc import Collection
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


def make_environment(
    folder: Path, packages: Collection[str], *, alone: Collection[str] = (), others: Collection[str] = ()
) -> Path:
    """Returns the Python of a new environment, which finds what it lacks, torch above all, in this one.

    packages: as pip takes them, in the versions of constraints.txt. alone: installed without what they require.
    others: packages that are installed in another version than that of constraints.txt.
    """
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    purelib = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    outer = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"  # editable installs too
    Path(purelib, "outer.pth").write_text(outer, encoding="utf-8")
    pins = folder / "constraints.txt"
    named = [line for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines() if re.match(r"\w", line)]
    pins.write_text("\n".join(line for line in named if line.partition("==")[0] not in others), encoding="utf-8")
    pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--constraint", pins]
    if alone:
        subprocess.run([*pip, "--no-deps", *alone], check=True)
    subprocess.run([*pip, *packages], check=True)
    return python
