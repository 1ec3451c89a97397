"""The program of a runner process: ``python -I run_vm.py VM_ID …`` (see ``host.runner``).

By path and in isolated mode, so that neither the working directory nor the environment of whoever
starts a VM decides which code owns it.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Isolated mode leaves out PYTHONPATH; the package is where this file is
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from vmkernel.imports import import_without

    import_without("typing_extensions", "msgspec")  # 17 ms, where it happens to be installed
    from vmkernel.host.runner import main

    main(sys.argv[1:])
