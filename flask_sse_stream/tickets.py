"""Tickets as text: signed with the application's secret, for a URL or a header, and read again.

A ticket's text is as good as a password for as long as it lives: it is never put into an error, a log or a ``repr``.
This module knows no request's framework; the Flask extension and bare WSGI applications hand it what a request has.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from itsdangerous import BadData, URLSafeSerializer

from .access import Ticket, is_seconds, now
from .errors import AccessDenied, SettingsError
from .keys import check_keys
from .settings import Settings
from .wsgi import Environ, query

__all__ = ["Secrets", "Tickets"]

Secrets = Callable[[], Sequence[str | bytes]]
"""Gives the secrets of this moment, the current one first; none: there is none."""

_LONGEST_TEXT: Final = 64 * 1024
_TEXT: Final = re.compile(r"[A-Za-z0-9_.-]+\Z")
_FORM: Final = 1


class Tickets:
    """Makes and reads the tickets of one application.

    ``settings``
        say how long they live, and of which namespace they are: a ticket of another is of no use.
    ``secrets``
        text or bytes to sign with; or several, the current one first, of which the others are still accepted; or a
        function that gives them.
    """

    def __init__(self, settings: Settings, secrets: str | bytes | Sequence[str | bytes] | Secrets) -> None:
        self._settings = settings
        given = [secrets] if isinstance(secrets, (str, bytes)) else secrets
        self._secrets: Secrets = given if callable(given) else lambda: given
        self._salt = f"flask_sse_stream ticket {settings.namespace}"
        self._made: tuple[tuple[str | bytes, ...], URLSafeSerializer] | None = None

    def make(self, keys: str | Iterable[str], *, user: str | int | None = None, ttl: float | None = None) -> str:
        """Give a ticket's text: 1 to 100 ``keys``, for ``ttl`` seconds (``SSE_TICKET_TTL``).

        It consists of characters that need no escaping in a URL. Raises :class:`EventError` for bad keys,
        :class:`ValueError` for a ``user`` or ``ttl`` that cannot be, and :class:`SettingsError` where there is nothing
        to sign with, or where ``SSE_TICKETS`` is off: tickets would protect nothing.
        """
        settings = self._settings
        if not settings.tickets:
            raise SettingsError("tickets protect nothing while the endpoint asks for none: set SSE_TICKETS = True")
        ttl = settings.ticket_ttl if ttl is None else ttl
        if not is_seconds(ttl) or not 0 < ttl <= settings.ticket_max_ttl:
            raise ValueError(
                f"ttl must be seconds above 0, at most SSE_TICKET_MAX_TTL={settings.ticket_max_ttl}, not {ttl!r}"
            )
        issued = round(now(), 6)
        checked = check_keys([keys] if isinstance(keys, str) else keys)
        ticket = Ticket(checked, user=user, expires=round(issued + ttl, 6), issued=issued)
        # Keys as a list in JSON: no two lists have one form, whatever is in them.
        payload = [_FORM, ticket.keys, ticket.user, ticket.issued, ticket.expires]
        return str(self._serializer().dumps(payload))

    def read(self, text: str | None) -> Ticket:
        """Read a ticket's text. Raises :class:`AccessDenied` (401) for one that is missing, broken or expired."""
        if not text:
            raise AccessDenied("this stream needs a ticket", status=401)
        ticket = self._read(text)
        if ticket is None:
            raise AccessDenied("this ticket is broken, or was not made for this application", status=401)
        left = ticket.left()
        lasts = (ticket.expires or 0.0) - ticket.issued
        if left is None or left <= 0 or lasts > self._settings.ticket_max_ttl + 1:
            raise AccessDenied("this ticket has expired", status=401)
        return ticket

    def admit(self, keys: Sequence[str], text: str | None) -> tuple[tuple[str, ...], Ticket]:
        """Give what a request with this ticket listens to, which is what it asks for, or else the ticket's keys.

        Raises as :meth:`read`, :class:`AccessDenied` (403) if it asks for more than the ticket has, and
        :class:`EventError` for bad keys.
        """
        ticket = self.read(text)
        asked = check_keys(keys or ticket.keys)
        if not set(asked) <= set(ticket.keys):
            raise AccessDenied("this ticket is for other keys")
        return asked, ticket

    def of(self, environ: Environ) -> tuple[tuple[str, ...], Ticket]:
        """Give what the request of this environ listens to, and its ticket.

        The ticket is in the header ``Authorization: Bearer`` or, where there is none, in the parameter
        ``SSE_TICKET_PARAM`` of the query. Raises as :meth:`admit`, and :class:`ValueError` for a query that cannot be
        read.
        """
        settings = self._settings
        found = query(environ)
        text = bearer(environ) or next(iter(found.get(settings.ticket_param, ())), None)
        return self.admit(found.get(settings.key_param, ()), text)

    def _read(self, text: str) -> Ticket | None:
        if len(text) > _LONGEST_TEXT or _TEXT.match(text) is None:
            return None  # what reads Base64 would leave out characters that are none of its own
        try:
            # What is signed was made above; all the same, nothing else than that is taken for a ticket.
            form, keys, user, issued, expires = self._serializer().loads(text)
            return Ticket(keys, user=user, expires=expires, issued=issued) if form == _FORM else None
        except (BadData, ValueError, TypeError):
            return None  # and not why: itsdangerous quotes the signature

    def _serializer(self) -> URLSafeSerializer:
        secrets = tuple(self._secrets())
        if not secrets or not all(secrets):
            raise SettingsError(
                "tickets are signed with the application's SECRET_KEY, which is not set: "
                'set app.config["SECRET_KEY"] to what secrets.token_hex() gave once, the same in every process'
            )
        if self._made is None or self._made[0] != secrets:
            options: dict[str, Any] = {"digest_method": hashlib.sha256, "key_derivation": "hmac"}
            # itsdangerous has the current one last.
            made = URLSafeSerializer(list(reversed(secrets)), salt=self._salt, signer_kwargs=options)  # type: ignore[arg-type]
            self._made = secrets, made
        return self._made[1]


def bearer(environ: Environ) -> str | None:
    """Give the token of ``Authorization: Bearer`` (RFC 6750, section 2.1), ``None`` where there is none."""
    scheme, _, token = str(environ.get("HTTP_AUTHORIZATION", "")).strip().partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None
