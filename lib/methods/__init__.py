"""The rules beside sparse momentum's own: those of the other methods, plain alternatives, and
variants of the paper's algorithm. Importing this package registers all of them.
"""

import lib.methods.deepr
import lib.methods.rules
import lib.methods.variants  # noqa: F401
