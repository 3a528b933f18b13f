"""Fetches pictures from hosts that the operator has listed, and from nowhere else.

A host is resolved once, every address that it has must be public, and the connection goes to the address that was
checked, so that no second answer of a name server leads elsewhere. Redirects are followed by the same rules.
"""

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Collection
from urllib.parse import SplitResult, urljoin, urlsplit

import httptools

from internvl_rt.server.fault import ApiError, refusal

MAX_REDIRECTS = 3
MAX_URL = 8192  # characters
_PORTS = {"http": 80, "https": 443}
_MAX_HEAD_BYTES = 64 << 10
_READ_BYTES = 256 << 10

Resolve = Callable[[str, int], Awaitable[list[str]]]


async def resolve(host: str, port: int) -> list[str]:
    """Returns the addresses of a host."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


def is_public(address: str) -> bool:
    """Says whether an address belongs to the internet: not to this machine, its networks or a cloud's own services."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):  # may lead to an IPv4 address
        parsed = parsed.ipv4_mapped or parsed.sixtofour or parsed
    return parsed.is_global and not parsed.is_multicast and parsed not in _NAT64


_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class Fetcher:
    """Fetches by http and https. One object serves a server; it keeps no connection and no cookie."""

    def __init__(
        self,
        hosts: Collection[str],
        max_bytes: int,
        max_s: float,
        *,
        resolve: Resolve = resolve,
        is_allowed: Callable[[str], bool] = is_public,
    ) -> None:
        """hosts: names, or host:port where the port is not the scheme's. is_allowed: says it of an address."""
        self._hosts = frozenset(host.lower() for host in hosts)
        self._max_bytes, self._max_s = max_bytes, max_s
        self._resolve, self._is_allowed = resolve, is_allowed
        self._tls = ssl.create_default_context() if hosts else None

    async def fetch(self, url: str, where: str) -> bytes:
        """Returns what lies at a URL. Raises ApiError, which names no address and nothing that a host has said."""
        try:
            async with asyncio.timeout(self._max_s):
                for _ in range(MAX_REDIRECTS + 1):
                    answer = await self._get(self._check(url, where), where)
                    if answer.location is None:
                        return bytes(answer.body)
                    url = urljoin(url, answer.location)
        except TimeoutError:
            raise self._refuse(f"fetching it took more than {self._max_s:g} s", where) from None
        except (OSError, ssl.SSLError, httptools.HttpParserError, UnicodeError, ValueError, EOFError) as error:
            raise self._refuse("it could not be fetched", where) from error
        raise self._refuse(f"it redirects more than {MAX_REDIRECTS} times", where)

    def _refuse(self, reason: str, where: str) -> ApiError:
        return refusal(f"{where}: {reason}; send the file as a data: URL", where, "media_not_fetched")

    def _check(self, url: str, where: str) -> SplitResult:
        """Splits a URL in one reading, and refuses everything that two programs may read in two ways."""
        if not self._hosts:
            raise refusal(
                f"{where}: this server fetches no URLs; send the file as a data: URL", where, "media_not_allowed"
            )
        plain = len(url) <= MAX_URL and url.isascii() and url.isprintable() and not set(url) & set(' \\"<>^`{|}')
        parts = urlsplit(url) if plain else SplitResult("", "", "", "", "")
        host = (parts.hostname or "").lower()
        names = {f"{host}:{parts.port}"} if parts.port else {host, f"{host}:{_PORTS.get(parts.scheme)}"}
        if parts.scheme not in _PORTS or "@" in parts.netloc or not names & self._hosts:
            raise refusal(
                f"{where}: only http and https URLs of the hosts that this server was started with are fetched; send "
                "the file as a data: URL",
                where,
                "media_not_allowed",
            )
        return parts

    async def _get(self, url: SplitResult, where: str) -> "_Answer":
        host, port = str(url.hostname), url.port or _PORTS[url.scheme]
        addresses = await self._resolve(host, port)
        if not addresses or not all(map(self._is_allowed, addresses)):
            raise self._refuse("its host is not on the public internet", where)
        tls = {"ssl": self._tls, "server_hostname": host} if url.scheme == "https" else {}
        reader, writer = await asyncio.open_connection(addresses[0], port, **tls)  # type: ignore[arg-type]
        try:
            target = (url.path or "/") + (f"?{url.query}" if url.query else "")
            head = f"GET {target} HTTP/1.1\r\nhost: {url.netloc}\r\nuser-agent: internvl-rt\r\naccept: */*\r\n"
            writer.write(f"{head}accept-encoding: identity\r\nconnection: close\r\n\r\n".encode("ascii"))
            answer = _Answer()
            parser = httptools.HttpResponseParser(answer)
            while not answer.is_complete:
                data = await reader.read(_READ_BYTES)
                if not data:  # ends an answer without a length
                    if answer.ends_with_connection:
                        break
                    raise EOFError
                answer.num_bytes += len(data)
                parser.feed_data(data)
                answer.status = parser.get_status_code()
                if len(answer.body) > self._max_bytes or answer.num_bytes > 2 * self._max_bytes + _MAX_HEAD_BYTES:
                    raise self._refuse(f"it has more than {self._max_bytes:,} bytes", where)
            if answer.location is None and answer.status != 200:
                raise self._refuse(f"its host answered with status {answer.status}", where)
            return answer
        finally:
            writer.transport.abort()


class _Answer:
    """Gets the parts of an answer from the parser."""

    def __init__(self) -> None:
        self.status = 0
        self.body = bytearray()
        self.num_bytes = 0  # as they came, with head and framing
        self.is_complete, self.ends_with_connection = False, True
        self._location: str | None = None

    @property
    def location(self) -> str | None:
        """Where a redirect leads."""
        return self._location if self.status in (301, 302, 303, 307, 308) else None

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"location":
            self._location = value.decode("ascii")
        elif name.lower() in (b"content-length", b"transfer-encoding"):
            self.ends_with_connection = False

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.is_complete = True
