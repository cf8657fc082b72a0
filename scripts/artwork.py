"""Draws what the registry shows of this pack: docs/images/icon.png and banner.png.

python scripts/artwork.py
"""

from kit.environment import run_main, say
from kit.hosts import prepared_host


def main() -> int:
    prepared_host()
    from kit.artwork import make_artwork  # needs packages that are there only now

    for path in make_artwork():
        say(f"{path}")
    return 0


if __name__ == "__main__":
    run_main(main)
