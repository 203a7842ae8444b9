"""For services that import ``shared.service_client``: put this file into your package ``shared``, or this folder's parent on
PYTHONPATH. It is no part of the installed product: a top-level package of such a name would hide yours.
"""

from service_client import *  # noqa: F403 - all of it, under another name
