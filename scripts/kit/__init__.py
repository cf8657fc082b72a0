"""What the scripts share. Environment, hosts and server need nothing installed; the other modules come after them."""

from . import paths as paths
