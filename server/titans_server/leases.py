"""Leases on drafts: others leave a document alone while its server renews its lease.

Leases save work; what keeps histories apart is the compare-and-set of every commit.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from titans_server.errors import IngestionCancelled, SessionNotFound
from titans_server.learning import Work
from titans_server.sessions import history
from titans_server.sessions.ledger import Ledger
from titans_server.sessions.record import Draft, SessionRecord

log = logging.getLogger(__name__)

_BEAT_SECONDS = history.LEASE_SECONDS / 3


class Leases:
    """The leases of one server, under a name of its own. Lives on the event loop."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.server = secrets.token_hex(6)

    def is_elsewhere(self, draft: Draft) -> bool:
        """Whether another server works on a draft."""
        return draft.server != self.server and draft.lease_until > time.time()

    @asynccontextmanager
    async def held(self, work: Work) -> AsyncIterator[None]:
        """Hold the draft's lease meanwhile; where it was another server's, it is taken.

        Where another server takes it meanwhile, it stays there: whoever appends here finds that (VersionConflict).
        """
        if work.draft.entries:
            edit = partial(history.take, ingestion=work.draft.ingestion, server=self.server)
            await self._ledger.change(work.session_id, edit)
        beating = asyncio.create_task(self._beat(work))
        try:
            yield
        finally:
            beating.cancel()

    async def release(self, work: Work) -> None:
        """Let others go on with a draft, or forget it where nobody could."""
        draft = work.draft
        stays = draft.key or draft.accepted

        def edit(record: SessionRecord) -> history.Edit:
            if stays:
                return history.renew(record, draft.ingestion, self.server, seconds=0)
            return history.discard(record, draft.ingestion)

        try:
            await self._ledger.change(work.session_id, edit)
        except Exception as error:  # the lease runs out by itself
            log.info("ingestion %s is left as it is: %r", draft.ingestion, error)

    async def _beat(self, work: Work) -> None:
        while True:
            await asyncio.sleep(_BEAT_SECONDS)
            try:
                edit = partial(history.renew, ingestion=work.draft.ingestion, server=self.server)
                await self._ledger.change(work.session_id, edit)
            except (IngestionCancelled, SessionNotFound):
                work.cancelled = True
            except Exception as error:  # whoever learns the document meets it too, and does more about it
                log.warning("cannot renew the lease on ingestion %s: %r", work.draft.ingestion, error)
