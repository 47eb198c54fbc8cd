"""The engine behind OpenAI's HTTP API: completions, documents, and what says how the server does."""

from lazyllm.extras import needed

for _package in ("fastapi", "uvicorn", "prometheus_client"):
    needed(_package, what="the server", extra="serve")

# isort: split
from lazyllm.serving.http.app import create_app
from lazyllm.serving.http.settings import ServerSettings

__all__ = ["ServerSettings", "create_app"]
