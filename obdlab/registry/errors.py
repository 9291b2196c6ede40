"""The errors of a registry. They need no HTTP library, unlike ``failures``: other processes hear of them, too."""

from __future__ import annotations

from obdlab.errors import SourceError


class RegistryError(SourceError, code="registry"):
    """A registry refused, failed or did not answer. ``status`` is the HTTP status, if there was an answer."""

    # The values of an error from another process.
    what = ""
    timed_out = False
    status: int | None = None
    retry_after_s = 0.0
    tries = 0

    def __init__(
        self,
        what: str,
        *,
        blob: str = "",
        offset: int | None = None,
        temporary: bool = False,
        status: int | None = None,
        retry_after_s: float = 0.0,
        timed_out: bool = False,
    ) -> None:
        self.what = what
        self.timed_out = timed_out
        self.status = status
        self.retry_after_s = retry_after_s
        #: Number of tries; 0: unknown.
        self.tries = 0
        super().__init__(what, blob=blob, offset=offset, temporary=temporary)

    def at(self, blob: str, offset: int | None, tries: int, *, before: RegistryError | None = None) -> RegistryError:
        """Return the same failure with its place.

        A time-out alone says little about the last of several tries, which the deadline may have cut short. Then the
        text also has the last other failure, ``before``.
        """
        what = self.what if tries < 2 else f"{self.what} (after {tries} tries)"
        if before is not None and self.timed_out:
            what = f"{what}; before that: {before.what}"
        error = type(self)(
            what,
            blob=blob,
            offset=offset,
            temporary=self.temporary,
            status=self.status,
            timed_out=self.timed_out,
        )
        error.tries = tries
        return error


class RangesIgnoredError(RegistryError, code="ranges-ignored"):
    """The registry serves blobs only whole: it answers a range with the blob from its beginning."""
