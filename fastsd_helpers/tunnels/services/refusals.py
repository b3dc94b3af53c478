"""What a service says when it gives no link, as errors: ngrok's codes, and the last words of any."""

import re
from typing import Any

from fastsd_helpers.errors import TunnelError, TunnelLimited, TunnelServiceDown, TunnelTokenRefused, TunnelToolMissing

__all__ = ["explain_ngrok", "short", "unknown"]

# Source: ngrok.com/docs/errors.
_DOMAIN_REFUSED = {
    313: "subdomains of one's own need a paid plan",
    314: "domains of one's own need a paid plan",
    317: "it is reserved by another account",
    318: "it has not been reserved",
    319: "it has not been reserved",
    320: "it is reserved by another account",
    326: "it has not been reserved",
    7117: "it has not been reserved",
    7118: "it has not been reserved by this account",
    15002: "it belongs to another account",
}


def explain_ngrok(said: dict[str, Any]) -> TunnelError:
    """What ngrok's own error means. Source: ngrok.com/docs/errors."""
    text, code = said.get("text", ""), said.get("code", "")
    found = re.search(r"ERR_NGROK_(\d+)", f"{code} {text}")
    number = int(found[1]) if found else 0
    # It says "authentication failed" of nearly everything, whatever the cause.
    if number == 9040 or re.search(r"from your IP|\bIP (polic|restriction)", text):
        return TunnelServiceDown(
            f"ngrok refuses connections from this machine's address{_code(number)}; the token is not the cause.",
            "Choose another service: ngrok, or a rule of the account, blocks some countries and data centres.",
        )
    if number in _DOMAIN_REFUSED:
        return TunnelTokenRefused(
            f"ngrok does not give this domain to this account: {_DOMAIN_REFUSED[number]} (ERR_NGROK_{number}).",
            "Take the domain that dashboard.ngrok.com/domains shows for the account of this token, or leave "
            "ngrok_domain (--ngrok-domain) empty.",
        )
    if number in (121, 6024) or ("version" in text and "too old" in text):
        return TunnelToolMissing(
            f"ngrok's agent here is too old for its service{_code(number)}.",
            "Install a newer one from ngrok.com/download, so that it is on the PATH, or choose another service.",
        )
    # Source: ngrok.com/docs/errors. 105-107: token malformed, revoked; 4018: account not verified or no token; 6022:
    # pages are for accounts only.
    if number in (105, 106, 107, 120, 4018, 6022) or ("authentication failed" in text.lower() and not number):
        return TunnelTokenRefused(
            f"ngrok rejects this token{_code(number)}.",
            "Copy it again from dashboard.ngrok.com/get-started/your-authtoken, and confirm your e-mail address there.",
        )
    if number in (108, 334, 324):
        return TunnelLimited(
            f"ngrok's plan for this account allows no further tunnel at the same time{_code(number)}.",
            "Stop the other notebook or program that uses this token (dashboard.ngrok.com/agents), or choose another "
            "service.",
        )
    if number in (725, 727, 728, 734):
        return TunnelLimited(
            f"ngrok's traffic limit for this account is used up{_code(number)}.", "Choose another service."
        )
    refused = re.search(r"authentication failed: ([^\"\\\r\n]{1,200})", text, re.IGNORECASE)
    if refused:
        words = short(re.sub(r"\s*ERR_NGROK_\d+\s*", "", refused[1]))
        return TunnelTokenRefused(
            f"ngrok refused this account{_code(number)}: {words}.",
            f"See ngrok.com/docs/errors/err_ngrok_{number}, or choose another service.",
        )
    return unknown("ngrok", text)


def _code(number: int) -> str:
    return f" (ERR_NGROK_{number})" if number else ""


def unknown(kind: str, text: str) -> TunnelError:
    """The error of a service whose last words mean nothing that is known here."""
    said = short(text)
    return TunnelServiceDown(
        f"{kind} ended without opening a tunnel{f': {said}' if said else ' and printed nothing'}.",
        "Try again, or choose another service.",
    )


def short(text: str) -> str:
    """The last words of a log in one line, without what could be a link with a key in it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return re.sub(r"\?\S+", "?…", " / ".join(line[:200] for line in lines[-2:])).rstrip(".")
