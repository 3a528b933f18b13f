"""The compiled part of the package, which csrc/CMakeLists.txt describes; everything else is in pyproject.toml."""

import shutil
import sys
from pathlib import Path
from subprocess import CalledProcessError

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))
from cmake_build import MissingToolError, build


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        folder = Path("build", f"cmake-{sys.implementation.cache_tag}").resolve()
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            build(folder, ["_C"])
        except MissingToolError as error:
            raise CompileError(str(error)) from None
        except CalledProcessError as error:
            raise CompileError(f"csrc/ cannot be built: exit code {error.returncode}, see above") from None
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / target.name, target)


setup(ext_modules=[Extension("internvl_rt._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
