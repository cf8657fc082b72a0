"""Host tests with the oldest PyTorch: `test.py` starts this with the Python of an environment that is kept for them.

What is needed is installed here, so that the other stages need not wait for it. Arguments go to pytest.
"""

from __future__ import annotations

import sys

from kit.environment import OLDEST_TORCH, install, run_main
from kit.hosts import OLDEST, fetch_host, host_requirements, test_requirements

# What these tests need of tests/requirements.txt; newer diffusers, say, want a newer PyTorch.
NEEDED = ("pytest", "scikit-image")


def main() -> int:
    """Returns pytest's exit code."""
    needed = host_requirements([fetch_host(OLDEST)])
    # No frontend: no browser looks at these tests.
    needed = [line for line in needed if not line.startswith("comfyui-")]
    needed += [line for line in test_requirements() if line.startswith(NEEDED)]
    install(needed, "the oldest PyTorch", OLDEST_TORCH)
    import pytest

    return pytest.main(sys.argv[1:])


if __name__ == "__main__":
    run_main(main)
