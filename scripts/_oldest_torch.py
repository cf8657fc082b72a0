"""Host tests with the oldest PyTorch: `test.py` starts this with the Python of an environment that is kept for them.

What is needed is installed here, so that the other stages need not wait for it. Arguments go to pytest.
"""

from __future__ import annotations

import sys

import _setup

# What these tests need of tests/requirements.txt; newer diffusers, say, want a newer PyTorch.
NEEDED = ("pytest", "scikit-image")


def main() -> int:
    """Returns pytest's exit code."""
    needed = _setup.host_requirements([_setup.fetch_host(_setup.OLDEST)])
    # No frontend: no browser looks at these tests.
    needed = [line for line in needed if not line.startswith("comfyui-")]
    needed += [line for line in _setup.test_requirements() if line.startswith(NEEDED)]
    _setup.install(needed, "the oldest PyTorch", _setup.OLDEST_TORCH)
    import pytest

    return pytest.main(sys.argv[1:])


if __name__ == "__main__":
    _setup.run_main(main)
