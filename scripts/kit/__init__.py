"""What the scripts share, and what each of them does once its environment is there.

environment, hosts and server need nothing installed, nor do the names that --help lists (evaluation, workflows).
"""

from . import paths as paths
