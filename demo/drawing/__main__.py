"""Writes a contact sheet of the small world."""

import sys

from . import sheet

sheet().save(sys.argv[1] if len(sys.argv) > 1 else "sheet.png")
