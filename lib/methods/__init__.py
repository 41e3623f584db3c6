"""The rules beside sparse momentum's own: those of the other methods, and other readings of the
paper. Importing this package registers all of them.
"""

from lib.methods import baselines, readings  # noqa: F401
