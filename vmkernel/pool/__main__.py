"""``python -m vmkernel.pool SOCKET``: the pool's server."""

from vmkernel.imports import import_without

# As a kernel that starts by itself has it (`kernel.launch`): members share what is here
import_without("typing_extensions", "msgspec")
import_without("ssl", "asyncio")

from vmkernel.pool.server import main  # noqa: E402

main()
