"""What the kernelspec starts, by path: ``python -S -P /…/vmkernel/pool/launcher.py -f FILE …``

A script is compiled each time it is run, so it is a short one; all else is in ``handover``.
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])
from handover import main  # type: ignore[import-not-found]

del sys.path[0]
main(__file__)
