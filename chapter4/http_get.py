"""The tool `http_get`: fetch a page from one of the hosts that the operator allows.

A host is allowed by its name, or by name and port. Only in the latter case may the name stand for
an address of this machine or of a private network: else a name that points there would open what
is behind the firewall. The connection goes to the address that was looked at, not to what the name
means a moment later. A redirect is followed to an allowed host alone.
"""

import asyncio
import codecs
import ipaddress
import re
import socket
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated

from chapter4.tools import Tool, ToolError, function_tool

import httpx
from pydantic import Field

MAX_BYTES = 2**20
MAX_REDIRECTS = 5
MAX_ADDRESSES = 4  # of a host; the first one that can be reached is asked
TIMEOUT_S = 15.0
TEXT_TYPES = ("text/", "application/json", "application/xml", "application/xhtml")
_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"(?P<name>[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\])(?::(?P<port>\d{1,5}))?")
_CHARSET = re.compile(r";\s*charset\s*=\s*[\"']?([a-z0-9_.:-]{1,40})")
# What pages are written in. Others that Python has may take hours to decode, as punycode does.
_CODECS = ("utf-8", "ascii", "iso8859-1", *(f"cp{n}" for n in range(1250, 1259)))
_CODECS += ("utf-16", "utf-16-le", "utf-16-be")
# Here Python says "global", or may: an IPv4 address in disguise, or an old private network.
_DISGUISED = [
    ipaddress.IPv6Network(network)
    for network in (
        "::/96",  # IPv4-compatible: RFC 4291
        "::ffff:0:0:0/96",  # IPv4-translated: RFC 7915
        "64:ff9b::/96",  # NAT64: RFC 6052
        "64:ff9b:1::/48",  # NAT64 of one's own: RFC 8215
        "fec0::/10",  # site-local: RFC 3879
    )
]


@dataclass(frozen=True)
class AllowedHost:
    """A host that may be asked; without a port, on those of http and https."""

    name: str
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> "AllowedHost":
        """From `HOST`, `HOST:PORT` or `[IPV6]:PORT`.

        Raises:
            ValueError: it is none of these.
        """
        match = _HOST.fullmatch(text)
        port = None if match is None or match["port"] is None else int(match["port"])
        if match is None or (port is not None and not 0 < port < 65536):
            raise ValueError(f"{text!r} is no HOST or HOST:PORT")
        return cls(_plain(match["name"].strip("[]")), port)

    def __str__(self) -> str:
        name = f"[{self.name}]" if ":" in self.name else self.name
        return name if self.port is None else f"{name}:{self.port}"


def http_get_tool(allowed: Collection[AllowedHost]) -> Tool:
    hosts = ", ".join(map(str, allowed))

    async def http_get(
        url: Annotated[str, Field(max_length=2000, description=f"of one of these hosts: {hosts}")],
    ) -> str:
        """Fetch a web page or another text over HTTP."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await _get(url, allowed)
        except TimeoutError as error:
            raise ToolError(f"no answer within {TIMEOUT_S:g} s", transient=True) from error
        except httpx.TransportError as error:
            raise ToolError(f"the connection failed: {error}", transient=True) from error
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise ToolError(f"it failed: {error}") from error

    return function_tool(http_get, timeout_s=TIMEOUT_S + 5)


async def _get(text: str, allowed: Collection[AllowedHost]) -> str:
    # Neither proxies nor passwords from the environment, no cookies.
    async with httpx.AsyncClient(trust_env=False, follow_redirects=False) as client:
        url = httpx.URL(text)
        for _ in range(MAX_REDIRECTS + 1):
            response = await _ask(client, url, await _addresses(url, allowed))
            try:
                if not response.has_redirect_location:
                    return await _text(response)
                url = url.join(response.headers["location"])
            finally:
                await response.aclose()
        raise ToolError(f"more than {MAX_REDIRECTS} redirects")


async def _addresses(url: httpx.URL, allowed: Collection[AllowedHost]) -> list[str]:
    """The addresses that the URL's host has; all of them may be asked.

    Raises:
        ToolError: the URL, its host or one of its addresses is not allowed.
    """
    if url.scheme not in _PORTS or url.userinfo or not url.host:
        raise ToolError("the URL must be http://HOST/… or https://HOST/…, without a password")
    host, port = _name(url), url.port or _PORTS[url.scheme]
    with_port = AllowedHost(host, port) in allowed
    if not with_port and (AllowedHost(host) not in allowed or port != _PORTS[url.scheme]):
        there_are = ", ".join(map(str, allowed))
        raise ToolError(f"{host}:{port} is not allowed; allowed are {there_are}")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ToolError(f"{host} is not known: {error.strerror}", transient=True) from error
    addresses = list(dict.fromkeys(str(address[0]) for *_, address in found))
    if not with_port and not all(map(_is_public, addresses)):
        raise ToolError(f"{host} is in a private network; it is allowed with its port alone")
    return addresses[:MAX_ADDRESSES]


async def _ask(client: httpx.AsyncClient, url: httpx.URL, addresses: list[str]) -> httpx.Response:
    """The answer of the first address that can be reached."""
    headers = {"host": url.netloc.decode(), "accept-encoding": "identity"}
    extensions = {"sni_hostname": _name(url)}  # whose certificate it must be
    for left, address in enumerate(addresses, start=1 - len(addresses)):
        there = url.copy_with(host=address)
        request = client.build_request("GET", there, headers=headers, extensions=extensions)
        try:
            return await client.send(request, stream=True)
        except (httpx.ConnectError, httpx.ConnectTimeout):
            if not left:
                raise
    raise ToolError(f"{url.host} has no address")


async def _text(response: httpx.Response) -> str:
    """The body, as far as it is text and not too long."""
    kind = response.headers.get("content-type", "text/plain").lower()
    if not kind.startswith(TEXT_TYPES):
        raise ToolError(f"it is no text but {kind[:100]}")
    if response.headers.get("content-encoding", "identity") != "identity":
        raise ToolError("it is compressed, which was not asked for")
    body = bytearray()
    async for piece in response.aiter_raw():
        body += piece
        if len(body) > MAX_BYTES:
            break
    cut = f"\n[only the first {MAX_BYTES} bytes]" if len(body) > MAX_BYTES else ""
    text = bytes(body[:MAX_BYTES]).decode(_codec(kind), "replace")
    if response.is_success:
        return text + cut
    busy = response.status_code in (429, 502, 503, 504)
    raise ToolError(f"HTTP status {response.status_code}: {text[:300]}", transient=busy)


def _codec(content_type: str) -> str:
    charset = _CHARSET.search(content_type)
    try:
        name = codecs.lookup(charset[1]).name if charset else ""
    except LookupError:
        name = ""
    return name if name in _CODECS else "utf-8"


def _name(url: httpx.URL) -> str:
    """The host as it is asked for: an international name is in ASCII (`xn--…`)."""
    return _plain(url.raw_host.decode("ascii"))


def _plain(host: str) -> str:
    return host.lower().rstrip(".")


def _is_public(text: str) -> bool:
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        elif address.sixtofour or address.teredo or any(address in net for net in _DISGUISED):
            return False
    return address.is_global and not address.is_multicast
