"""Ask an endpoint of ldbfr for restorations, from Python: needs the extra "client", and no torch.

from ldbfr.client import Client

with Client("http://127.0.0.1:8000") as client:
    client.restore("photo.jpg", steps=8).save("better.jpg")
"""

from ldbfr.client.answers import Found, Job, Limits, Model, Preview, Restoration
from ldbfr.client.async_client import AsyncClient
from ldbfr.client.calls import Options
from ldbfr.client.errors import ImageRefusedError, OptionsRefusedError, ServerError, UnreachableError
from ldbfr.client.retries import Retries
from ldbfr.client.sync_client import Client

__all__ = [
    "Client",
    "AsyncClient",
    "Options",
    "Restoration",
    "Preview",
    "Found",
    "Model",
    "Limits",
    "Job",
    "Retries",
    "ServerError",
    "ImageRefusedError",
    "OptionsRefusedError",
    "UnreachableError",
]
