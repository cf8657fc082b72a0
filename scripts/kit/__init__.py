"""What the scripts share, and what each does once its environment is there.

Of these modules environment, hosts, server and evaluation's names need nothing installed.
"""

from . import paths as paths
