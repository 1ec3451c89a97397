"""The program of a VM's proxy: ``python -I run_proxy.py …`` (see ``network.serve``).

By path and in isolated mode: neither the working directory nor the environment decides which code
it is.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Isolated mode leaves out PYTHONPATH; the package is where this file is
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from vmkernel.network.serve import main

    main(sys.argv[1:])
