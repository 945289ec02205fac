"""Hostile requests for every operation of the OpenAPI document, and for the server itself.

Each request has statuses that are allowed. Beyond that, `Attacker` checks of each response:

* it comes within `LIMIT_SECONDS`, with no 5xx
* a refusal is problem details, and a 422 names what is wrong
* no header is injected, and no secret or stack trace is shown
"""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from api.errors import MEDIA_TYPE
from service.ids import IdKind, new_id
from tests.contract.wire import CLOSED, Reply, exchange, request_bytes

LIMIT_SECONDS = 30.0
JSON = ("Content-Type", "application/json")
REFUSED = frozenset({400, 401, 403, 404, 405, 409, 411, 412, 413, 415, 416, 422})
ANSWERED = REFUSED | {200, 201, 202, 204, 206, 304, 307}
"""The statuses of a service that understands what it was sent or refuses it."""
NOT_HTTP = frozenset({400, CLOSED})
_MAX_BODY = 1 << 20
_INJECTED = "X-Injected: yes"


@dataclass(frozen=True)
class Operation:
    """An operation of the OpenAPI document."""

    id: str
    method: str
    path: str
    path_parameters: tuple[str, ...]
    query_parameters: tuple[str, ...]
    header_parameters: tuple[str, ...]
    has_body: bool
    scopes: frozenset[str]

    def target(self, ids: Mapping[str, str], **replaced: str) -> str:
        """The path with these values of its parameters."""
        return self.path.format_map({**ids, **replaced})


def operations(document: Mapping[str, Any]) -> list[Operation]:
    """Return all operations of an OpenAPI document."""
    described = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            names: dict[str, list[str]] = {"path": [], "query": [], "header": []}
            for parameter in operation.get("parameters", ()):
                names[parameter["in"]].append(parameter["name"])
            security = operation.get("security", [])
            scopes = frozenset(scope for scheme in security for scope in scheme["apiKey"])
            described.append(
                Operation(
                    operation["operationId"],
                    method.upper(),
                    path,
                    tuple(names["path"]),
                    tuple(names["query"]),
                    tuple(names["header"]),
                    "requestBody" in operation,
                    scopes,
                )
            )
    return described


@dataclass(frozen=True)
class Target:
    """What hostile requests need to know about an installation.

    Attributes:
        port: The port of the service.
        operations: All its operations.
        ids: An existing id, or name, for each path parameter.
        bodies: A valid body for each operation that has one.
        key: A key with all scopes.
        refused_keys: Authorization headers by description: wrong, revoked … None is no header.
        scoped_keys: A key for each scope.
    """

    port: int
    operations: Sequence[Operation]
    ids: Mapping[str, str]
    bodies: Mapping[str, Any]
    key: str
    refused_keys: Mapping[str, str | None]
    scoped_keys: Mapping[str, str]

    def request(
        self,
        operation: Operation,
        *,
        target: str | None = None,
        body: bytes | None = None,
        headers: Sequence[tuple[str, str]] = (),
        key: str | None = "",
    ) -> bytes:
        """Return a request of the operation, with its valid body unless another one is given."""
        sent = list(headers)
        if key is not None:
            sent.append(("Authorization", f"Bearer {key or self.key}"))
        if body is None and operation.has_body:
            body = json.dumps(self.bodies[operation.id]).encode()
            sent.append(JSON)
        return request_bytes(operation.method, target or self.harmless(operation), sent, body)

    def harmless(self, operation: Operation) -> str:
        """The path of the operation with ids that exist, or if it deletes, with ids that do not."""
        if operation.method != "DELETE":
            return operation.target(self.ids)
        return operation.target({name: unused(text) for name, text in self.ids.items()})


def unused(text: str) -> str:
    """An id of the same kind, or a name, that nothing has."""
    kind, separator, _ = text.partition("_")
    return new_id(IdKind(kind)) if separator and kind in set(IdKind) else "nobody-has-this-name"


@dataclass(frozen=True)
class Attack:
    """A hostile request and the statuses that may answer it."""

    name: str
    request: bytes
    allowed: frozenset[int] = ANSWERED


@dataclass
class Attacker:
    """Sends attacks, checks the responses and counts them."""

    port: int
    secrets: Sequence[str]
    failures: list[str] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    groups: Counter[str] = field(default_factory=Counter)
    accepted: list[str] = field(default_factory=list)
    """The bodies of responses with 2xx."""
    slowest: tuple[float, str] = (0.0, "")

    def send(self, group: str, attacks: Iterable[Attack]) -> None:
        """Send all attacks of a group."""
        for attack in attacks:
            try:
                reply = exchange(self.port, attack.request, LIMIT_SECONDS)
            except TimeoutError:
                self.failures.append(f"{group}: {attack.name}: no response within {LIMIT_SECONDS:g} s")
                continue
            self.slowest = max(self.slowest, (reply.seconds, f"{group}: {attack.name}"))
            self.record(group, attack, reply)

    def record(self, group: str, attack: Attack, reply: Reply) -> None:
        """Count and check a response."""
        self.groups[group] += 1
        self.statuses[reply.status] += 1
        if 200 <= reply.status < 300:
            self.accepted.append(reply.text)
        wrong = list(self._problems(attack, reply))
        if wrong:
            self.failures.append(f"{group}: {attack.name}: {'; '.join(wrong)}: {reply.text[:300]}")

    def _problems(self, attack: Attack, reply: Reply) -> Iterator[str]:
        if reply.status not in attack.allowed:
            yield f"expected one of {sorted(attack.allowed)}, got {reply.status}"
        if reply.status >= 400:
            yield from _problems_of_refusal(attack, reply)
        if reply.seconds > LIMIT_SECONDS:
            yield f"took {reply.seconds:.1f} s"
        if "x-injected" in reply.headers:
            yield "a header was injected"
        shown = f"{reply.headers} {reply.text}"
        if "Traceback" in shown or any(secret in shown for secret in self.secrets):
            yield "a secret or a stack trace is shown"


def _problems_of_refusal(attack: Attack, reply: Reply) -> Iterator[str]:
    if reply.headers.get("content-type") != MEDIA_TYPE:
        yield f"expected {MEDIA_TYPE}, got {reply.headers.get('content-type')}"
        return
    if attack.request.startswith(b"HEAD "):
        return
    problem = reply.json()
    if problem["status"] != reply.status or not problem["code"] or not problem["detail"]:
        yield "incomplete problem details"
    if reply.status == 422 and not all("pointer" in error and error["message"] for error in problem["errors"] or [{}]):
        yield "no pointer to what is wrong"


# Access: no key, a key that is not valid, and a key of another scope


def access(target: Target) -> Iterator[Attack]:
    """Every operation without a sufficient key, with ids that exist: nothing may be shown or changed."""
    for operation in target.operations:
        if not operation.scopes:
            continue
        path = operation.target(target.ids)
        for description, key in target.refused_keys.items():
            request = target.request(operation, target=path, key=key)
            yield Attack(f"{operation.id} with {description}", request, frozenset({401}))
        for scope, key in target.scoped_keys.items():
            if not operation.scopes <= _granted(scope):
                request = target.request(operation, target=path, key=key)
                yield Attack(f"{operation.id} with the scope {scope}", request, frozenset({403}))


def _granted(scope: str) -> set[str]:
    return {"read", scope} if scope != "admin" else {"read", "submit", "review", "admin"}


# Bodies: too large, too deep, not JSON, another media type


def bodies(target: Target) -> Iterator[Attack]:
    """Bodies that are not what they should be, for every operation; those without a body refuse them, too."""
    for operation in target.operations:
        for name, content, content_type, allowed in _BODIES:
            sent = [("Content-Type", content_type)] if content_type else []
            request = target.request(operation, body=content, headers=sent)
            is_text = operation.id == "create_prompt_set" and content_type == "text/plain"
            if is_text:
                allowed = frozenset({422})
            elif allowed is _INVALID and not operation.has_body:
                allowed = ANSWERED
            yield Attack(f"{operation.id} with {name}", request, allowed)
        for name, headers, content, allowed in _FRAMINGS:
            request = target.request(operation, body=b"", headers=headers).replace(b"Content-Length: 0\r\n", b"")
            yield Attack(f"{operation.id} with {name}", request + content, allowed)


def _chunked(content: bytes, size: int = 1 << 16) -> bytes:
    chunks = [content[start : start + size] for start in range(0, len(content), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"


_MALFORMED = frozenset({400})
_INVALID = frozenset({404, 409, 422})
"""JSON that no operation takes. Those without a body ignore it."""
_TYPE = frozenset({415})
_JSON = "application/json"
_GZIP = gzip.compress(b"{}")
_BODIES: tuple[tuple[str, bytes, str, frozenset[int]], ...] = (
    ("a body above the limit", b" " * (_MAX_BODY + 1), _JSON, frozenset({413})),
    ("10,000 nested lists", b"[" * 10_000 + b"]" * 10_000, _JSON, _MALFORMED),
    ("100,000 open lists", b"[" * 100_000, _JSON, _MALFORMED),
    ("20,000 nested objects", b'{"a":' * 20_000 + b"1" + b"}" * 20_000, _JSON, _MALFORMED),
    ("500 nested lists in a field", b'{"prompts":' + b"[" * 500 + b"]" * 500 + b"}", _JSON, _MALFORMED),
    ("a number of 5,000 digits", b'{"seed": ' + b"9" * 5000 + b"}", _JSON, _MALFORMED),
    ("half a document", b'{"name": "a', _JSON, _MALFORMED),
    ("two documents", b"{}{}", _JSON, _MALFORMED),
    ("a name twice", b'{"name": "a", "name": "b"}', _JSON, _MALFORMED),
    ("text that is not UTF-8", b'{"name": "\xff\xfe"}', _JSON, _MALFORMED),
    ("UTF-16", '{"name": "a"}'.encode("utf-16"), _JSON, _MALFORMED),
    ("a lone surrogate", b'{"name": "\\ud800"}', _JSON, _MALFORMED),
    ("a lone surrogate in a name", b'{"\\udfff": 1}', _JSON, _MALFORMED),
    ("an encoded surrogate", b'{"name": "\xed\xa0\x80"}', _JSON, _MALFORMED),
    ("a NUL", b'{"name": "a\\u0000"}', _JSON, _MALFORMED),
    ("a NUL in a name", b'{"a\\u0000": 1}', _JSON, _MALFORMED),
    ("NULs for a body", b"\0" * 100, _JSON, _MALFORMED),
    ("Infinity", b"Infinity", _JSON, _INVALID),
    ("NaN", b"NaN", _JSON, _INVALID),
    ("null", b"null", _JSON, _INVALID),
    ("a number", b"1e400", _JSON, _INVALID),
    ("a text", b'"x"', _JSON, _INVALID),
    ("300,000 empty objects", b"[" + b"{}," * 299_999 + b"{}]", _JSON, frozenset({413})),
    ("100,000 unknown fields", b"{" + b",".join(b'"%x":0' % n for n in range(100_000)) + b"}", _JSON, _INVALID),
    ("100,000 wrong prompts", b'{"prompts":[' + b"{}," * 99_999 + b"{}]}", _JSON, _INVALID),
    ("500,000 numbers", b'{"prompts":[' + b"1," * 500_000 + b"1]}", _JSON, frozenset({413})),
    ("130,000 wrong items", b'{"prompts":[{"items":[' + b"1," * 130_000 + b"1]}]}", _JSON, _INVALID),
    ("a body without a type", b"{}", "", _TYPE),
    ("text/plain", b"{}", "text/plain", _TYPE),
    ("text/html", b"<p>", "text/html", _TYPE),
    ("a form", b"name=a", "application/x-www-form-urlencoded", _TYPE),
    ("a multipart form", b"--x\r\n\r\na\r\n--x--", "multipart/form-data; boundary=x", _TYPE),
    ("XML", b"<a/>", "application/xml", _TYPE),
    ("pickle", b"\x80\x04K\x01.", "application/octet-stream", _TYPE),
    ("a media type of 50,000 characters", b"{}", "a" * 50_000, _TYPE),
    ("a media type without a subtype", b"{}", "application", _TYPE),
)
_FRAMINGS: tuple[tuple[str, list[tuple[str, str]], bytes, frozenset[int]], ...] = (
    ("an announced body above the limit", [JSON, ("Content-Length", str(1 << 40))], b"", frozenset({413})),
    ("an announced body of 10^100", [JSON, ("Content-Length", "1" + "0" * 100)], b"", NOT_HTTP | {413}),
    (
        "chunks above the limit",
        [JSON, ("Transfer-Encoding", "chunked")],
        _chunked(b" " * (_MAX_BODY + 1)),
        frozenset({413}),
    ),
    ("a compressed body", [JSON, ("Content-Encoding", "gzip"), ("Content-Length", str(len(_GZIP)))], _GZIP, _TYPE),
    ("br of plain JSON", [JSON, ("Content-Encoding", "br"), ("Content-Length", "2")], b"{}", _TYPE),
)


# Values: each field of each valid body in turn


def values(target: Target) -> Iterator[Attack]:
    """Every value in every valid body is replaced in turn by hostile ones."""
    for operation in target.operations:
        if not operation.has_body:
            continue
        valid = target.bodies[operation.id]
        for path in _paths(valid):
            for name, value, allowed in _VALUES:
                content = _json(_replaced(valid, path, value))
                request = target.request(operation, body=content, headers=[JSON])
                yield Attack(f"{operation.id} with {name} at /{'/'.join(map(str, path))}", request, allowed)
        for name in ("", "__proto__", "__class__", "$ref", "a" * 100_000, "\u202e", "model_config"):
            request = target.request(operation, body=_json({**valid, name: 1}), headers=[JSON])
            yield Attack(f"{operation.id} with the field {name[:20]!r}", request, frozenset({422, 404}))


class _Raw(float):
    """A number that is written as this text."""

    def __new__(cls, text: str) -> _Raw:
        created = super().__new__(cls, 0.0)
        created.text = text
        return created

    text: str

    def __repr__(self) -> str:
        return self.text


_TEXT = frozenset({400})
_VALUES: tuple[tuple[str, Any, frozenset[int]], ...] = (
    ("a NUL", "a\0b", _TEXT),
    ("a lone surrogate", "\ud800", _TEXT),
    ("a text of 100,000 characters", "x" * 100_000, ANSWERED),
    ("a line break", f"a\r\n{_INJECTED}", ANSWERED),
    ("a path", "../../../../etc/passwd", ANSWERED),
    ("SQL", "'; DROP TABLE jobs; --", ANSWERED),
    ("a text of combining characters", "e" + "\u0301" * 5000, ANSWERED),
    ("text of both directions", "\u202eabc\U0010ffff\ufeff", ANSWERED),
    ("an empty text", "", ANSWERED),
    ("1e400", _Raw("1e400"), ANSWERED),
    ("-1e400", _Raw("-1e400"), ANSWERED),
    ("1e-400", _Raw("1e-400"), ANSWERED),
    ("NaN", math.nan, ANSWERED),
    ("Infinity", math.inf, ANSWERED),
    ("2^200", 1 << 200, ANSWERED),
    ("-2^63-1", -(1 << 63) - 1, ANSWERED),
    ("2^63", 1 << 63, ANSWERED),
    ("-1", -1, ANSWERED),
    ("4,000 digits", int("9" * 4000), ANSWERED),
    ("true", True, ANSWERED),
    ("null", None, ANSWERED),
    ("an object", {"a": {"b": [{}]}}, ANSWERED),
    ("an empty list", [], ANSWERED),
    ("100,000 numbers", [0] * 100_000, ANSWERED),
    ("50,000 texts", ["a"] * 50_000, ANSWERED),
    ("100 nested lists", json.loads("[" * 100 + "]" * 100), ANSWERED),
)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to all values within `value`. Of a list, only those to its first item."""
    if path:
        yield path
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _paths(inner, (*path, name))
    elif isinstance(value, list) and value:
        yield from _paths(value[0], (*path, 0))


def _replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    copy = deepcopy(value)
    inner = copy
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = new
    return copy


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


# Text bodies of prompt sets


def texts(target: Target) -> Iterator[Attack]:
    """Prompt sets as text and CSV."""
    [operation] = [operation for operation in target.operations if operation.id == "create_prompt_set"]
    for media_type in ("text/plain", "text/csv"):
        for name, content in _TEXTS:
            for charset in ("", "; charset=utf-8", "; charset=utf-16", "; charset=" + "x" * 1000, "; charset"):
                headers = [("Content-Type", f"{media_type}{charset}")]
                request = target.request(operation, target="/prompt-sets?name=hostile", body=content, headers=headers)
                yield Attack(f"{media_type}{charset[:20]} with {name}", request)


_TEXTS: tuple[tuple[str, bytes], ...] = (
    ("a NUL", b"a [cat]\0\n"),
    ("a NUL in a field", b"text,items,thresholds\na\0cat,cat,0.1\n"),
    ("no UTF-8", b"text\n\xff\xfe\n"),
    ("500,000 lines", b"a\n" * 500_000),
    ("a million line breaks", b"\n" * 1_000_000),
    ("one line of a megabyte", b"a [cat] " * 130_000),
    ("500,000 brackets", b"[" * 500_000 + b"]" * 500_000),
    ("500,000 items", b"[a]" * 300_000),
    ("a field of 200,000 characters", b"text,items,thresholds\n" + b"a" * 200_000 + b",a,0.1\n"),
    ("an open quote", b'text,items,thresholds\n"a cat,cat,0.1\n'),
    ("no header", b"a cat,cat,0.1\n"),
    ("100,000 columns", b"," * 100_000 + b"\n1\n"),
    ("columns twice", b"text,text,text\na,b,c\n"),
    ("thresholds of 1e400", b"text,items,thresholds\na cat,cat,1e400\n"),
    ("a threshold of 5,000 digits", b"text,items,thresholds\na cat,cat," + b"9" * 5000 + b"\n"),
    ("carriage returns", b"text,items,thresholds\ra cat,cat,0.1\r"),
    ("other line breaks", "text\u2028a cat\x0b\x0c\x1c\x85".encode()),
)


# Parameters of paths and queries


def parameters(target: Target) -> Iterator[Attack]:
    """Hostile ids in paths and hostile values of each query parameter."""
    for operation in target.operations:
        for name in operation.path_parameters:
            valid = target.ids[name]
            for value in (*_PATH_VALUES, f"{valid}%0a", f"{valid}%00", f"{valid}%2f", f"{valid};x", f"%20{valid}"):
                request = target.request(operation, target=operation.target(target.ids, **{name: value}))
                yield Attack(f"{operation.id} of {value[:40]}", request, REFUSED)
        for name in operation.query_parameters:
            for value in (*_QUERY_VALUES, f"1&{name}=2"):
                scorer = "scorer=brightness&" if name.startswith("score_") else ""
                path = f"{target.harmless(operation)}?{scorer}{name}={value}"
                yield Attack(f"{operation.id}?{name}={value[:40]}", target.request(operation, target=path))
            if name == "cursor":
                for cursor in _CURSORS:
                    path = f"{target.harmless(operation)}?cursor={cursor}"
                    request = target.request(operation, target=path)
                    yield Attack(f"{operation.id}?cursor={cursor[:40]}", request, frozenset({422}))
        long = "&".join(f"a{n}=1" for n in range(5000))
        yield Attack(
            f"{operation.id} with 5,000 parameters",
            target.request(operation, target=f"{target.harmless(operation)}?{long}"),
        )


_PATH_VALUES = (
    "..%2f..%2f..%2f..%2fetc%2fpasswd",
    "%2e%2e%2f%2e%2e%2fdfusion.db",
    "..%5c..%5cwindows",
    "%00",
    "%ff",
    "%ED%A0%80",
    "%F0%9F%98%80",
    f"%0d%0a{_INJECTED.replace(' ', '%20')}",
    "x" * 5000,
    "%25%30%30",
    "__proto__",
    "%7B%7B7*7%7D%7D",
    "'%20OR%201=1%20--",
    "job_" + "0" * 26,
    "JOB_" + "Z" * 26,
    "-1",
    "9" * 400,
    "%",
    "%zz",
)
_QUERY_VALUES = (
    "",
    "%00",
    "a%00b",
    "%ff",
    "%ED%A0%80",
    "%F0%9F%98%80",
    "-1",
    "0",
    "201",
    "1.5",
    "9" * 30,
    "9" * 5000,
    "1e400",
    "-1e308",
    "5e-324",
    "nan",
    "true",
    "0001-01-01T00:00:00%2B23:59",
    "9999-12-31T23:59:59.999999-23:59",
    "2026-01-31T12:00:00Z",
    "2026-02-30T12:00:00Z",
    "x" * 20_000,
    f"%0d%0a{_INJECTED.replace(' ', '%20')}",
    "..%2f..%2fetc%2fpasswd",
    "'%20OR%201=1%20--",
    "%25s%25n",
    "%",
    "job_" + "0" * 26,
    "set_" + "0" * 26,
)


def _encoded(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


_CURSORS = (
    "!",
    "=",
    "A",
    "AAAA",
    "%FF",
    "a" * 201,
    _encoded("x"),
    _encoded("-"),
    _encoded("\0"),
    _encoded("9" * 30),
    _encoded("1e5"),
    _encoded("job_" + "0" * 25),
    _encoded("' OR 1=1 --"),
    _encoded("\ud7ff"),
)


# Headers


def headers(target: Target) -> Iterator[Attack]:
    """Hostile headers for every operation."""
    for operation in target.operations:
        for name, sent, allowed in _HEADERS:
            line = sent if isinstance(sent, bytes) else f"{sent[0]}: {sent[1]}".encode("latin-1")
            request = target.request(operation)
            start, separator, rest = request.partition(b"\r\n")
            yield Attack(f"{operation.id} with {name}", start + separator + line + b"\r\n" + rest, allowed)
        for parameter in operation.header_parameters:
            for value in _HEADER_VALUES:
                request = target.request(operation, headers=[(parameter, value)])
                yield Attack(f"{operation.id} with {parameter}: {value[:40]!r}", request)


_HEADERS: tuple[tuple[str, bytes | tuple[str, str], frozenset[int]], ...] = (
    ("a bare line feed in a value", f"Idempotency-Key: a\n{_INJECTED}".encode(), ANSWERED),
    ("a bare carriage return in a value", f"Idempotency-Key: a\r{_INJECTED}".encode(), NOT_HTTP),
    ("a NUL in a value", b"Idempotency-Key: a\0b", NOT_HTTP),
    ("a NUL in a name", b"X-\0: a", NOT_HTTP),
    ("a folded line", b"X-Folded: a\r\n b", ANSWERED),
    ("a line without a colon", b"Idempotency-Key", NOT_HTTP),
    ("a space before the colon", b"Idempotency-Key : a", NOT_HTTP),
    ("an empty name", b": a", NOT_HTTP),
    ("a name that is no token", b"X(y): a", NOT_HTTP),
    ("a header of 60 KB", ("X-Large", "a" * 60_000), ANSWERED),
    ("a header of 200 KB", ("X-Huge", "a" * 200_000), NOT_HTTP),
    ("4,000 headers", b"\r\n".join(b"X-%d: a" % n for n in range(4000)), ANSWERED),
    ("50,000 headers", b"\r\n".join(b"X-%d: a" % n for n in range(50_000)), NOT_HTTP),
    ("two hosts", ("Host", "other"), NOT_HTTP),
    ("two keys", ("Authorization", "Bearer dfk_" + "0" * 40), ANSWERED),
    ("two lengths", b"Content-Length: 7\r\nContent-Length: 9", NOT_HTTP),
    ("a negative length", ("Content-Length", "-1"), NOT_HTTP),
    ("a length with a sign", ("Content-Length", "+2"), NOT_HTTP),
    ("an unknown transfer coding", ("Transfer-Encoding", "gzip, chunked"), NOT_HTTP | {501}),
    ("a request id of another line", f"X-Request-Id: a%0d%0a{_INJECTED}".encode(), ANSWERED),
    ("a request id of 5,000 characters", ("X-Request-Id", "a" * 5000), ANSWERED),
    ("a forwarded address", b"X-Forwarded-For: ' OR 1=1, ::1, \xff\r\nX-Forwarded-Proto: javascript", ANSWERED),
    ("another prefix", b"X-Forwarded-Prefix: //evil\r\nX-Forwarded-Host: evil\r\nX-Original-URL: /api-keys", ANSWERED),
    ("another method", b"X-HTTP-Method-Override: DELETE", ANSWERED),
    ("an upgrade", b"Upgrade: websocket\r\nSec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13", ANSWERED),
    ("a cookie of 10,000 parts", ("Cookie", "a=b; " * 10_000), ANSWERED),
    ("an unknown expectation", ("Expect", "the-unexpected"), ANSWERED),
    ("Accept of 3,000 types", ("Accept", "a/b;q=0.1," * 3000), ANSWERED),
    ("Accept that is none", ("Accept", "\xff/\xff;;;,,,"), ANSWERED),
)
_HEADER_VALUES = (
    "",
    " ",
    "x" * 300,
    "x" * 30_000,
    "é",
    "\t",
    "%0d%0aX-Injected: yes",
    '"',
    '"1',
    "*",
    "W/",
    "-1",
    "9" * 19,
    "9" * 5000,
    "1e400",
    "\u0663",
    "bytes=0-0",
    "bytes=-1",
    "bytes=-0",
    "bytes=5-1",
    "bytes=0-999999999999999999",
    "bytes=999999999999999999-",
    "bytes=-999999999999999999",
    "bytes=0-0,2-2",
    "bytes=" + "0-0," * 10_000,
    "bytes=" + "9" * 5000 + "-",
    "bytes=a-b",
    "bytes=",
    "lines=1-2",
    '"' + "a" * 64 + '", *, W/"x"' + ', "y"' * 5000,
)


# HTTP itself


def protocol(target: Target) -> Iterator[Attack]:
    """Messages that are not HTTP, or another HTTP than the server's."""
    for name, sent, allowed in _MESSAGES:
        yield Attack(name, sent.replace(b"KEY", target.key.encode()), allowed)


_GET = b"GET /jobs HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer KEY\r\n"
_POST = b"POST /rounds HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nAuthorization: Bearer KEY\r\n"
_CHUNKED = _POST + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
_CLOSE = b"Connection: close\r\n\r\n"
_MESSAGES: tuple[tuple[str, bytes, frozenset[int]], ...] = (
    ("noise", bytes(range(256)) * 10 + b"\r\n\r\n", NOT_HTTP),
    ("a megabyte without a line break", b"A" * _MAX_BODY, NOT_HTTP),
    ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100 + b"\r\n\r\n", NOT_HTTP),
    ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", NOT_HTTP | {401}),
    ("HTTP/0.9", b"GET /jobs\r\n\r\n", NOT_HTTP),
    ("HTTP/1.0 without a host", b"GET /healthz HTTP/1.0\r\n\r\n", ANSWERED),
    ("HTTP/9.9", b"GET /healthz HTTP/9.9\r\nHost: a\r\n\r\n", NOT_HTTP | {200}),
    ("no host", b"GET /healthz HTTP/1.1\r\nConnection: close\r\n\r\n", NOT_HTTP),
    ("a method of 10,000 letters", b"A" * 10_000 + b" /jobs HTTP/1.1\r\nHost: a\r\n" + _CLOSE, REFUSED),
    ("a method in small letters", _GET.replace(b"GET", b"get") + _CLOSE, REFUSED),
    ("TRACE", _GET.replace(b"GET", b"TRACE") + _CLOSE, REFUSED),
    ("CONNECT", _GET.replace(b"GET /jobs", b"CONNECT localhost:22") + _CLOSE, REFUSED),
    ("OPTIONS of everything", _GET.replace(b"GET /jobs", b"OPTIONS *") + _CLOSE, REFUSED),
    ("an absolute address", _GET.replace(b"/jobs", b"http://evil/jobs") + _CLOSE, ANSWERED),
    ("a target of 50,000 characters", _GET.replace(b"/jobs", b"/" + b"a" * 50_000) + _CLOSE, REFUSED),
    ("a target of 200,000 characters", _GET.replace(b"/jobs", b"/" + b"a" * 200_000) + _CLOSE, NOT_HTTP),
    ("a target with a space", _GET.replace(b"/jobs", b"/jobs /x") + _CLOSE, NOT_HTTP),
    ("a target that is not ASCII", _GET.replace(b"/jobs", b"/jobs/\xff") + _CLOSE, NOT_HTTP | REFUSED),
    ("//", _GET.replace(b"/jobs", b"//jobs//..//") + _CLOSE, REFUSED),
    ("/../", _GET.replace(b"/jobs", b"/docs/../../etc/passwd") + _CLOSE, REFUSED),
    ("a path with a fragment", _GET.replace(b"/jobs", b"/jobs#/x") + _CLOSE, REFUSED),
    (
        "length and chunks",
        _POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n" + _CLOSE + b"0\r\n\r\n",
        REFUSED,
    ),
    ("a chunk size that is none", _CHUNKED + b"zz\r\n{}\r\n0\r\n\r\n", NOT_HTTP),
    ("a negative chunk size", _CHUNKED + b"-1\r\n{}\r\n0\r\n\r\n", NOT_HTTP),
    ("a chunk size of 10,000 digits", _CHUNKED + b"1" * 10_000 + b"\r\n", NOT_HTTP),
    ("a chunk longer than its size", _CHUNKED + b"1\r\n{}{}\r\n0\r\n\r\n", NOT_HTTP),
    ("a chunk extension of 100 KB", _CHUNKED + b"2;" + b"a" * 100_000 + b"\r\n{}\r\n0\r\n\r\n", NOT_HTTP | REFUSED),
    ("a trailer with a key", _CHUNKED + b"2\r\n{}\r\n0\r\nAuthorization: Bearer x\r\n\r\n", REFUSED),
    ("200,000 trailers", _CHUNKED + b"2\r\n{}\r\n0\r\n" + b"a: b\r\n" * 200_000 + b"\r\n", NOT_HTTP),
    (
        "malformed chunks without a key",
        _CHUNKED.replace(b"Authorization: Bearer KEY\r\n", b"") + b"zz\r\nzz\r\n",
        frozenset({400, 401, CLOSED}),
    ),
    (
        "an expected 100 above the limit",
        _POST + b"Content-Length: 9999999\r\nExpect: 100-continue\r\n" + _CLOSE,
        frozenset({413}),
    ),
    ("two requests in one", _GET + b"\r\n" + _GET.replace(b"/jobs", b"/api-keys") + _CLOSE, frozenset({200})),
)
