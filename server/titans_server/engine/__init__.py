"""Decide, compute, record: many sessions, one model, one compute thread."""

from titans_server.engine.engine import Engine
from titans_server.engine.request import Finish, Generation, Ingestion, Read

__all__ = ["Engine", "Finish", "Generation", "Ingestion", "Read"]
