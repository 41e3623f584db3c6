"""The rules beside sparse momentum's own: those of the other methods, plain alternatives, and other
readings of the paper. Importing this package registers all of them.
"""

import lib.methods.deepr
import lib.methods.dsr
import lib.methods.plain
import lib.methods.readings
import lib.methods.rigl
import lib.methods.set
import lib.methods.snip  # noqa: F401
