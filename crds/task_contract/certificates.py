"""Certificates that settings hold as text."""

import ssl


def check_certificates(text: str) -> str:
    """Return the text as it is. Raises ValueError unless it is one or more certificates in PEM form."""
    try:
        ssl.create_default_context().load_verify_locations(cadata=text)
    except (ssl.SSLError, ValueError) as error:
        raise ValueError("must be one or more certificates in PEM form") from error
    return text
