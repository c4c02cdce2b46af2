"""Results on disk: one JSON file, written whole after every document, from which a run goes on."""

import json
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from pydantic import BaseModel, Field

from titans.evaluation.perplexity import Perplexity
from titans.evaluation.scoring import Cell, cells
from titans.evaluation.task import EvaluationError
from titans.files import alone_in, write_whole

Key = tuple[str, int, int]  # task, tokens, index of a document

_COMMON = "fingerprint", "text"  # what files must share to be shown together


class _Answer(BaseModel):
    answer: str
    right: bool
    share: float  # of what was to be given


class _Question(BaseModel):
    depths: list[float]  # of what it asks for, 0 to 1
    memory: _Answer
    off: _Answer | None = None
    full: _Answer | None = None


class _Absent(BaseModel):
    answer: str
    value: bool  # it gives one
    planted: bool  # of something else


class _Document(BaseModel):
    task: str
    tokens: int
    index: int
    read: int  # tokens
    questions: list[_Question] = Field(min_length=1)
    absent: list[_Absent]


class _Nats(BaseModel):
    tokens: int
    nats: dict[str, float]
    names: dict[str, float]
    num_names: int


class _File(BaseModel):
    """What a file has, beside what can be counted from it."""

    settings: dict[str, Any]
    documents: list[_Document]
    perplexity: list[_Nats]


class Results:
    """What has been measured so far; kept in memory alone where there is no file."""

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        """Goes on with what the file has.

        Raises EvaluationError for one of other settings, or none of ours, OSError where there cannot be one.
        """
        self.path, self.settings = path, settings
        self.documents: dict[Key, dict[str, Any]] = {}
        self.perplexity: dict[int, Perplexity] = {}
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=path.parent):  # hours of work are not to end where nothing can be written
                pass
            if path.exists():
                self._load(path)

    def add(self, documents: Iterable[dict[str, Any]]) -> None:
        """Documents that have been examined; durable when this returns, beside what others have put there meanwhile.

        Raises what the beginning does: another run may have begun in the same file.
        """
        self._save({_key(document): document for document in documents}, {})

    def add_perplexity(self, tokens: int, found: Perplexity) -> None:
        """The same of a stream that has been read."""
        self._save({}, {tokens: found})

    def cells(self, keys: Iterable[Key]) -> list[Cell]:
        """What these documents, as far as they are there, make up."""
        return cells(self.documents[key] for key in keys if key in self.documents)

    def _load(self, path: Path) -> None:
        settings, documents, nats = _read(path)
        other = [name for name in self.settings if settings.get(name) != self.settings[name]]
        if other:
            name = other[0]
            was, now = settings.get(name), self.settings[name]
            raise EvaluationError(f"{path} has results of another {name} ({was}, not {now}): name another file")
        self.documents |= documents
        self.perplexity |= nats

    def _save(self, documents: dict[Key, dict[str, Any]], nats: dict[int, Perplexity]) -> None:
        with nullcontext() if self.path is None else alone_in(self.path.parent):
            if self.path is not None and self.path.exists():
                self._load(self.path)
            self.documents |= documents
            self.perplexity |= nats
            if self.path is not None:
                self._write(self.path)

    def _write(self, path: Path) -> None:
        content = {
            "settings": self.settings,
            "cells": [cell.to_dict() for cell in cells(self.documents.values())],
            "perplexity": [{"tokens": tokens} | found._asdict() for tokens, found in self.perplexity.items()],
            "documents": list(self.documents.values()),
        }
        write_whole(path, json.dumps(content, indent=1))


def read_results(paths: Sequence[Path]) -> tuple[list[dict[str, Any]], dict[int, Perplexity]]:
    """The documents of several files, in order, and their nats per token.

    Raises EvaluationError where one is no file of results, is of another model or text than the first, or has a cell
    or a length's nats that another has.
    """
    common: dict[str, Any] = {}
    having: dict[tuple[str, int], Path] = {}
    documents: list[dict[str, Any]] = []
    perplexity: dict[int, Perplexity] = {}
    for path in paths:
        try:
            settings, found, nats = _read(path)
        except OSError as error:
            raise EvaluationError(f"{path} cannot be read: {error.strerror}") from error
        for name in _COMMON:
            if common.setdefault(name, settings.get(name)) != settings.get(name):
                raise EvaluationError(f"{path} has results of another {name} than {paths[0]}")
        for task, tokens in {key[:2] for key in found} | {("perplexity", tokens) for tokens in nats}:
            if (task, tokens) in having:
                raise EvaluationError(f"{having[task, tokens]} and {path} both have {task} at {tokens:,} tokens")
            having[task, tokens] = path
        documents += found.values()
        perplexity |= nats
    return documents, perplexity


def _read(path: Path) -> tuple[dict[str, Any], dict[Key, dict[str, Any]], dict[int, Perplexity]]:
    """A file's settings, documents and nats per token."""
    try:
        text = path.read_bytes()
        _File.model_validate_json(text)
        found = json.loads(text)
        documents = {_key(document): document for document in found["documents"]}
        nats = {row.pop("tokens"): Perplexity(**row) for row in found["perplexity"]}
        return dict(found["settings"]), documents, nats
    except (ValueError, TypeError) as error:
        raise EvaluationError(f"{path} is not a file of results") from error


def _key(document: dict[str, Any]) -> Key:
    return document["task"], document["tokens"], document["index"]
