"""Takes the pictures of docs/images/frontend and of the help pages (web/docs/images) in the host's frontend.

    python scripts/screenshots.py

The graphs are those of workflows/, run on the small world's models. Look at what it made.
"""

from kit.environment import run_main
from kit.hosts import prepared_host


def main() -> int:
    host = prepared_host()
    from kit.screenshots import take  # needs packages that are there only now

    take(host)
    return 0


if __name__ == "__main__":
    run_main(main)
