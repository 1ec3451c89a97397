"""Entry point in the guest: the initramfs executes this file as PID 1's program."""

import sys

sys.path.insert(0, "/run/vmkernel")

from vmkernel.guest.agent import main

if __name__ == "__main__":
    main()
