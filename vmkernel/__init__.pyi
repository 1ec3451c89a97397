# The public names, for type checkers; ``__init__.py`` imports each when it is first used.
# From the most to the least important.
from vmkernel.errors import ImageError as ImageError
from vmkernel.errors import ProtocolError as ProtocolError
from vmkernel.errors import RegistryError as RegistryError
from vmkernel.errors import SettingsError as SettingsError
from vmkernel.errors import TemplateError as TemplateError
from vmkernel.errors import VmAlreadyStartingError as VmAlreadyStartingError
from vmkernel.errors import VmBootError as VmBootError
from vmkernel.errors import VmCapacityError as VmCapacityError
from vmkernel.errors import VmError as VmError
from vmkernel.errors import VmExpiredError as VmExpiredError
from vmkernel.errors import VmFileError as VmFileError
from vmkernel.errors import VmGuestError as VmGuestError
from vmkernel.errors import VmHostLostError as VmHostLostError
from vmkernel.errors import VmNotFoundError as VmNotFoundError
from vmkernel.errors import VmOverlayError as VmOverlayError
from vmkernel.errors import VmStateError as VmStateError
from vmkernel.errors import VmTimeoutError as VmTimeoutError
from vmkernel.host.capacity import Statistics as Statistics
from vmkernel.host.handle import VmHandle as VmHandle
from vmkernel.host.manager import VmManager as VmManager
from vmkernel.host.registry import VmRecord as VmRecord
from vmkernel.host.registry import VmStatus as VmStatus
from vmkernel.host.scheduler import Scheduler as Scheduler
from vmkernel.host.scheduling import SchedulerConfig as SchedulerConfig
from vmkernel.host.scheduling import SchedulerStatistics as SchedulerStatistics
from vmkernel.models import Language as Language
from vmkernel.models import Output as Output
from vmkernel.models import RunError as RunError
from vmkernel.models import RunResult as RunResult
from vmkernel.models import VmState as VmState
from vmkernel.settings import Settings as Settings
from vmkernel.settings import load_settings as load_settings

__version__: str
