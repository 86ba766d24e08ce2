"""Build wheels: on Linux for x86-64, if there is a C++ compiler, with compiled CPU kernels; everything else is in
pyproject.toml."""

import platform
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

kernels = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("sasa_train") / "attention/kernel_builds.py")))


class WheelWithKernels(bdist_wheel):
    """A wheel for all versions of Python and torch, because the kernels are called through ctypes."""

    kernels_platform = None  # of a wheel with kernels

    def run(self):
        self.run_command("build")
        build = self.get_finalized_command("build")
        folder = Path(build.build_lib, "sasa_train/attention/prebuilt")
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier build
        if reason := build_kernels(folder):
            shutil.rmtree(folder, ignore_errors=True)
            print(f"no CPU kernels in the wheel, which is for every platform: {reason}")
        else:
            self.kernels_platform, self.root_is_pure = kernels.wheel_platform(folder), False
            self.distribution.has_ext_modules = lambda: True
        super().run()

    def get_tag(self):
        return ("py3", "none", self.kernels_platform) if self.kernels_platform else super().get_tag()


def build_kernels(folder):
    """Compile the CPU kernels into a folder; return the reason if this is not possible."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"they are compiled in advance for Linux on x86-64 alone; this is {sys.platform} on {platform.machine()}"
    if (compiler := kernels.find_compiler()) is None:
        return "no C++ compiler found (install g++, or name one in $CXX)"
    start = time.monotonic()
    try:
        kernels.build_prebuilt(folder, compiler)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{compiler} could not build them: {error} {getattr(error, 'stderr', None) or ''}".strip()
    print(f"compiled {len(kernels.COMMON)} CPU kernels with {compiler} in {time.monotonic() - start:.0f} s")
    return None


setup(cmdclass={"bdist_wheel": WheelWithKernels})
