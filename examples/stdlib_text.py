"""The demo's text: the documentation of the Python standard library, read from the installed interpreter.

Nothing is downloaded. A module's document is its documentation strings in the order of the source, each under
the signature of what it documents. Modules held out for evaluation never appear in training, and neither does
a documentation string of theirs that a training module repeats word for word.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from lizardzoo.errors import LizardzooError

# Both lists: modules that every Python from 3.10 on has and that no distribution packs apart. HELD_OUT: long
# ones, each on a subject of its own, so that one fills a sequence of 2,048 tokens and little of it is said
# elsewhere.
HELD_OUT = (
    "statistics", "difflib", "tarfile", "threading", "smtplib", "http.cookiejar", "configparser", "shutil",
)  # fmt: skip
TRAIN = (
    "typing", "doctest", "_pydecimal", "ipaddress", "logging", "inspect", "_pyio", "unittest.mock",
    "logging.handlers", "xml.etree.ElementTree", "email.message", "pickletools", "imaplib",
    "unittest.case", "pdb", "codecs", "os", "subprocess", "urllib.request", "ssl", "collections",
    "http.server", "ftplib", "urllib.parse", "optparse", "socketserver", "xmlrpc.server", "json",
    "uuid", "datetime", "pydoc", "mailbox", "traceback", "socket", "enum", "bdb", "asyncio.events",
    "http.client", "ast", "argparse", "xml.sax.handler", "asyncio.base_events", "fractions",
    "asyncio.tasks", "platform", "textwrap", "functools", "random", "tempfile", "pkgutil",
    "asyncio.locks", "concurrent.futures._base", "concurrent.futures.process", "_collections_abc",
    "lzma", "pickle", "wave", "mimetypes", "timeit", "contextlib", "heapq", "string", "calendar", "csv",
    "gzip", "html.parser", "locale", "numbers", "plistlib", "sched", "selectors", "shelve", "trace",
    "weakref", "email._header_value_parser", "email._policybase", "email.charset", "email.header",
    "email.generator", "email.feedparser", "email.headerregistry", "zipfile", "pathlib",
    "importlib._bootstrap", "importlib._bootstrap_external", "importlib.abc", "importlib.metadata",
    "xml.sax.xmlreader", "unittest.loader", "unittest.suite", "asyncio.streams", "asyncio.queues",
    "asyncio.subprocess", "asyncio.runners", "asyncio.futures", "asyncio.transports",
    "multiprocessing.context", "multiprocessing.managers", "multiprocessing.pool",
    "multiprocessing.shared_memory", "json.encoder", "json.decoder", "wsgiref.handlers",
    "wsgiref.headers", "wsgiref.simple_server", "urllib.robotparser", "xmlrpc.client", "rlcompleter",
    "code", "codeop", "cmd", "filecmp", "fileinput", "fnmatch", "genericpath", "getopt", "getpass",
    "gettext", "glob", "graphlib", "hashlib", "hmac", "keyword", "linecache", "modulefinder", "netrc",
    "operator", "poplib", "posixpath", "pprint", "pstats", "py_compile", "pyclbr", "queue", "quopri",
    "reprlib", "runpy", "shlex", "signal", "site", "stat", "stringprep", "symtable", "tabnanny",
    "token", "tokenize", "types", "venv", "warnings", "webbrowser", "zipapp", "zipimport",
)  # fmt: skip

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def documentation() -> tuple[list[str], list[str]]:
    """Training and held-out documents, one per module, in the order of the lists above.

    Raises LizardzooError where this Python comes without the sources of its standard library.
    """
    train = [list(_entries(module)) for module in TRAIN]
    seen = {text for entries in train for _, text in entries}
    held_out = [[entry for entry in _entries(module) if entry[1] not in seen] for module in HELD_OUT]
    return [_document(entries) for entries in train], [_document(entries) for entries in held_out]


def _document(entries: list[tuple[str, str]]) -> str:
    return "\n\n\n".join(f"{title}\n\n{text}" for title, text in entries)


def _entries(module: str) -> Iterator[tuple[str, str]]:
    """(signature, documentation string) of the module and of all it defines, nested definitions included."""
    source = Path(sysconfig.get_path("stdlib"), *module.split("."))
    source = source / "__init__.py" if source.is_dir() else source.with_name(f"{source.name}.py")
    if not source.is_file():
        raise LizardzooError(
            f"the demo reads its text from {source}, which this Python comes without; "
            f"use a Python with the sources of its standard library"
        )
    tree = ast.parse(source.read_text(encoding="utf-8"))
    if text := ast.get_docstring(tree):
        yield module, text
    yield from _definitions(tree, module)


def _definitions(node: ast.Module | Definition, prefix: str) -> Iterator[tuple[str, str]]:
    for child in node.body:
        if isinstance(child, Definition):
            name = f"{prefix}.{child.name}"
            if text := ast.get_docstring(child):
                yield name if isinstance(child, ast.ClassDef) else f"{name}({ast.unparse(child.args)})", text
            yield from _definitions(child, name)
