"""Fetches the metrics page of a server."""

from http.client import HTTPException
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, build_opener

from rnnserve.channel import host_of, is_loopback
from rnnserve.cli.outcome import BadInput
from rnnserve.errors import Unreachable
from rnnserve.metrics_page import Page, parse

DEFAULT_PORT = 9464


def default_url(target: str) -> str:
    """Of the page of a server that has left `metrics_port` as it is, on the host of a gRPC target."""
    host = "localhost" if target.startswith(("unix:", "unix-abstract:")) else host_of(target)
    return f"http://{f'[{host}]' if ':' in host else host}:{DEFAULT_PORT}/metrics"


def checked_url(url: str) -> str:
    """The same. Raises BadInput, so that nothing but HTTP is ever opened."""
    try:
        parts = urlsplit(url)
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_good = False
    if not is_good:
        raise BadInput(f"--metrics is a URL such as {default_url('localhost')}, not {url!r}")
    return url


def fetch(url: str, timeout_s: float) -> Page:
    """The page as it is now; `timeout_s` is for each answer of the network. Raises Unreachable."""
    # As for gRPC, a proxy is not asked about this machine.
    opener = build_opener(*([ProxyHandler({})] if is_loopback(urlsplit(url).netloc) else []))
    try:
        with opener.open(url, timeout=timeout_s) as answer:
            page = Page(parse(answer.read().decode()))
        if not any(name.startswith("rnnserve_") for name in page.names()):
            raise ValueError("it has no metrics of rnnserve")
        return page
    except (OSError, HTTPException, ValueError) as error:
        message = f"no metrics page at {url} ({_cause(error)}); name the right one with --metrics"
        raise Unreachable(message, reason="UNREACHABLE") from None


def _cause(error: Exception) -> str:
    if isinstance(error, HTTPError):
        return f"it answers {error.code} {error.reason}"
    if isinstance(error, HTTPException):  # whose text is whatever came instead
        return "what answers there does not speak HTTP"
    inner = error.reason if isinstance(error, URLError) else error
    return inner.strerror or str(inner) if isinstance(inner, OSError) else str(inner)
