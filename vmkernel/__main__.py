"""``python -m vmkernel -f CONNECTION_FILE``: what the kernelspec starts."""

from vmkernel.kernel.launch import main

if __name__ == "__main__":
    main()
