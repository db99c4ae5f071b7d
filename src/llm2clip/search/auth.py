"""Authentication with a token or, for browsers, with sessions."""

from __future__ import annotations

import re
import secrets
import time

from fastapi import Request
from fastapi.responses import Response

SESSION_SECONDS = 24 * 3600
MAX_SESSIONS = 1000  # if there are more sessions, the oldest one ends


class Authenticator:
    """Checks that requests contain a token or the cookie of a session that was started with the token.

    The cookie does not contain the token, because browsers send a host's cookies to all of its ports, so other servers
    on the same machine can read them.
    """

    def __init__(self, token: str) -> None:
        """
        Args:
            token: Token, which may contain only printable ASCII characters except spaces, because it is sent in HTTP
                headers.

        Raises:
            ValueError: The token is empty or contains other characters.
        """
        if not re.fullmatch("[!-~]+", token):
            raise ValueError(
                "the token must consist of at least one printable ASCII character, without spaces. "
                "To serve without a token, pass token=None (on the command line: --no_token)."
            )
        self._token = token
        self._sessions: dict[str, float] = {}  # end time of each session, keyed by id, oldest session first

    def is_authorized(self, request: Request) -> bool:
        """Return True if a request contains the token in its Authorization header, or the cookie of a session."""
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self.is_token(bearer):
            return True
        end = self._sessions.get(request.cookies.get(_cookie_name(request), ""))
        return end is not None and time.monotonic() < end

    def is_token(self, text: str) -> bool:
        """Return True if a text is the token. The comparison takes constant time."""
        return secrets.compare_digest(text.encode(), self._token.encode())

    def start_session(self, request: Request, response: Response) -> None:
        """Start a session and add its cookie to a response."""
        session = secrets.token_urlsafe(24)
        self._sessions[session] = time.monotonic() + SESSION_SECONDS
        if len(self._sessions) > MAX_SESSIONS:
            del self._sessions[next(iter(self._sessions))]
        response.set_cookie(
            _cookie_name(request),
            session,
            max_age=SESSION_SECONDS,
            httponly=True,
            samesite="strict",
            secure=request.scope["scheme"] == "https",
        )


def _cookie_name(request: Request) -> str:
    """Return a cookie name that contains the server's port, so that two servers on a host do not share a cookie."""
    server = request.scope.get("server")
    return f"llm2clip_session_{server[1] if server else 0}"
