"""The Triton kernels: installed in a folder of this name, in a source tree beside the package.

No ``__init__.py`` may lie there: ``kernels`` is also the name of a package on PyPI.
"""

from pathlib import Path

_INSTALLED = Path(__file__).with_suffix("")
__path__ = [str(_INSTALLED if _INSTALLED.is_dir() else _INSTALLED.parents[1] / "kernels")]
