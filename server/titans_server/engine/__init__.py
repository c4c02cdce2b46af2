"""Decide, compute, record: many sessions, one model, a compute thread on each device."""

from titans_server.engine.engine import Engine
from titans_server.engine.request import Finish, Generation, Ingestion, Read, StepFailed

__all__ = ["Engine", "Finish", "Generation", "Ingestion", "Read", "StepFailed"]
