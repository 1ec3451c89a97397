"""Entry point in the guest: the initramfs executes this file as PID 1's program."""

import sys

sys.path.insert(0, "/run/vmkernel")

from vmkernel.guest.agent import main  # noqa: E402  (the path must be set first)

if __name__ == "__main__":
    main()
