"""Engines on many machines behind one server: Ray Serve keeps them alive, and a job goes where its prompt is known."""

from lazyllm.extras import needed

needed("ray.serve", what="servers on several machines", extra="ray")

# isort: split
from lazyllm.serving.replicas.cluster import HERE, Cluster, replicated
from lazyllm.serving.replicas.remote import RemoteEngine
from lazyllm.serving.replicas.replica import ModelSource

__all__ = ["HERE", "Cluster", "ModelSource", "RemoteEngine", "replicated"]
