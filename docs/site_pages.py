# SPDX-License-Identifier: Apache-2.0
"""What the site has beside the pages of docs/: an API reference, the command line, measurements.

A Sphinx extension. It writes these pages to docs/generated before a build, and makes links of
names of the package, files of docs/ and numbers of decisions, in pages and in docstrings.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import io
import os
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import measured
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.pycode import ModuleAnalyzer
from sphinx.transforms import SphinxTransform

from uhd_ops.cli import main

GENERATED = Path(__file__).resolve().parent / "generated"
COMMANDS = ("encode", "encode-dataset", "flops", "profile", "info", "bench")


class Group(NamedTuple):
    """A page of the API reference.

    Attributes:
        page: Name of its file.
        title: Its heading.
        module: Where the names are public.
        defined: Modules in which they are defined, by the beginnings of their names.
    """

    page: str
    title: str
    module: str
    defined: tuple[str, ...] = ("",)


# A name that two modules have is documented in the first of them.
GROUPS = (
    Group("operators", "Operators", "uhd_ops", ("uhd_ops.ops.",)),
    Group("grids", "Grids of packed tokens", "uhd_ops", ("uhd_ops.grids", "uhd_ops.padded_grids")),
    Group("slicing", "Images and views", "uhd_ops", ("uhd_ops.slicing.",)),
    Group("models", "Compressors in models", "uhd_ops", ("uhd_ops.retrofit.", "uhd_ops.nn.")),
    Group("corpora", "Corpora", "uhd_ops", ("uhd_ops.corpus.",)),
    Group("runtime", "Installation and caches", "uhd_ops", ("uhd_ops._",)),
    Group("nn", "uhd_ops.nn", "uhd_ops.nn"),
    Group("mlp_forms", "uhd_ops.nn.mlp_forms", "uhd_ops.nn.mlp_forms"),
    Group("retrofit", "uhd_ops.retrofit", "uhd_ops.retrofit"),
    Group("flops", "uhd_ops.flops", "uhd_ops.flops"),
    Group("plot", "uhd_ops.plot", "uhd_ops.plot"),
    Group("corpus", "uhd_ops.corpus", "uhd_ops.corpus"),
    Group("transformers", "uhd_ops.integrations.transformers", "uhd_ops.integrations.transformers"),
    Group("vllm", "uhd_ops.integrations.vllm", "uhd_ops.integrations.vllm"),
    Group("reference", "uhd_ops.reference", "uhd_ops.reference"),
)
# Names that other libraries have too are links with their module alone.
AMBIGUOUS = ("uhd_ops.integrations", "uhd_ops.reference", "uhd_ops.nn.mlp_forms", "uhd_ops.plot")


def last(full: str) -> str:
    """The last part of a dotted name."""
    return full.rpartition(".")[2]


def public_names(module: Any) -> list[str]:
    """The names of a module's ``__all__``, or what is defined in it and has no underscore."""
    own = (name for name, thing in vars(module).items() if is_own(module, thing))
    return getattr(module, "__all__", None) or [name for name in own if name[0] != "_"]


def is_own(module: Any, thing: Any) -> bool:
    """Whether a function or class is defined in a module."""
    kinds = inspect.isfunction(thing) or inspect.isclass(thing)
    return kinds and thing.__module__ == module.__name__


def reference() -> tuple[dict[Group, list[str]], dict[str, str]]:
    """The API reference.

    Returns:
        The full names on each page, and for every other full name of the same thing, the one that
        is documented.

    Raises:
        ExtensionError: A public name has no page.
    """
    pages: dict[Group, list[str]] = {group: [] for group in GROUPS}
    documented, aliases = dict[int, str](), dict[str, str]()
    for module in dict.fromkeys(group.module for group in GROUPS):
        loaded = importlib.import_module(module)
        groups = [group for group in GROUPS if group.module == module]
        for name in public_names(loaded):
            thing, full = getattr(loaded, name), f"{module}.{name}"
            if inspect.ismodule(thing):
                continue
            if id(thing) in documented:
                aliases[full] = documented[id(thing)]
                continue
            where = getattr(thing, "__module__", module)
            group = next((g for g in groups if where.startswith(g.defined)), None)
            if group is None:
                raise ExtensionError(f"{full} has no page in GROUPS of {__file__}")
            documented[id(thing)] = full
            pages[group].append(full)
    return pages, aliases


PAGES, ALIASES = reference()


def spellings() -> Iterator[tuple[str, str]]:
    """Every way in which text names something, and its full name."""
    full_names = {full: full for names in PAGES.values() for full in names} | ALIASES
    for full, target in full_names.items():
        yield full, target
        yield full.removeprefix("uhd_ops."), target
        if not full.startswith(AMBIGUOUS):
            yield last(full), target


# Names of types in signatures, with what may be given for them.
TYPES = {
    "uhd_ops.grids.Grids": "Grids of views: a :class:`uhd_ops.PackedGrids`, a sequence of "
    "``(h, w)`` pairs, one such pair, or a CPU integer tensor or array ``(S, 2)``.",
    "uhd_ops.windows.TokenOrder": 'Order of the tokens in a view: ``"raster"``, row by row; '
    '``"window"``, window by window; ``"block"``, 2 x 2 blocks; or sides of nested blocks, such as '
    "``(8, 2)``.",
    "uhd_ops.slicing.load.ImageSource": "A path, an open file, a Pillow image, or an array; see "
    ":func:`uhd_ops.load_image`.",
    "uhd_ops.plot.images.Show": 'What to draw of tokens: ``"norm"``, their length, or ``"pca"``, '
    "their first three principal components as a colour.",
    "uhd_ops.ops.pixel_unshuffle_mlp.Activation": '``"gelu_tanh"``, ``"gelu"``, '
    '``"quick_gelu"``, ``"silu"`` or ``"relu"``; see :func:`uhd_ops.pixel_unshuffle_mlp`.',
}
NAMES = dict(spellings()) | {last(full): full for full in TYPES}


def write(name: str, text: str) -> None:
    """Write a page, unless it is the same already: Sphinx reads again what is newer."""
    path = GENERATED / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def api_page(group: Group, names: list[str]) -> str:
    """A page of the reference: a table of all names, then their docstrings."""
    module = importlib.import_module(group.module)
    lines = [group.title, "=" * len(group.title), ""]
    if group.title == group.module:
        lines += [f".. automodule:: {group.module}", "   :no-members:", ""]
    lines += [f".. currentmodule:: {group.module}", "", ".. autosummary::", "   :nosignatures:", ""]
    lines += [f"   {name}" for name in map(last, names) if callable(getattr(module, name))]
    for full in names:
        short = last(full)
        thing = getattr(module, short)
        if inspect.isclass(thing):
            lines += ["", f".. autoclass:: {short}", "   :members:"]
        elif inspect.isfunction(thing):
            lines += ["", f".. autofunction:: {short}"]
        else:
            text = textwrap.indent(comment_of(short, thing), "   ")
            lines += ["", f".. py:data:: {short}", "", text]
    return "\n".join(lines) + "\n"


def comment_of(name: str, thing: object) -> str:
    """The docstring below the assignment of a constant, wherever in the package that is."""
    for module in [m for key, m in sys.modules.items() if key.startswith("uhd_ops.")]:
        if vars(module).get(name) is thing:
            found = ModuleAnalyzer.for_module(module.__name__).find_attr_docs().get(("", name))
            if found:
                return "\n".join(found)
    raise ExtensionError(f"{name} has no docstring below its assignment")


def types_page() -> str:
    """What the names of types in signatures stand for."""
    lines = ["Types of arguments", "==================", ""]
    for full, meaning in TYPES.items():
        lines += [f".. py:type:: {full}", "", f"   {meaning}", ""]
    return "\n".join(lines)


def help_of(*command: str) -> str:
    """What the command line prints with ``--help``."""
    out = io.StringIO()
    plain = mock.patch.dict(os.environ, COLUMNS="96", NO_COLOR="1")
    with plain, contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    return out.getvalue()


def cli_page() -> str:
    """The help texts of the command line."""
    lines = ["# Command line", "", "What each command prints with `--help`.", ""]
    for command in ((), *((name,) for name in COMMANDS)):
        title = " ".join(("uhd-ops", *command))
        lines += [f"## {title}", "", "```text", help_of(*command).rstrip(), "```", ""]
    return "\n".join(lines)


def write_pages(app: Sphinx) -> None:
    """Write everything that is not in docs/ itself."""
    for group, names in PAGES.items():
        write(f"api/{group.page}.rst", api_page(group, names))
    write("api/types.rst", types_page())
    write("cli.md", cli_page())
    measured.write(GENERATED)


DOCS = r"docs/((?:adr/)?[\w-]+)\.md"
IN_TEXT = re.compile(rf"\b{DOCS}|\bADR (\d{{4}})\b")
CALL = re.compile(r"([\w.]+)(?:\(.*\))?$", re.DOTALL)
UNTOUCHED = (
    nodes.reference,
    addnodes.pending_xref,
    nodes.title,
    nodes.literal_block,
    nodes.comment,
)


class Links(SphinxTransform):
    """Make links of names of the package, pages of docs/ and numbers of decisions."""

    default_priority = 400

    def apply(self, **kwargs: Any) -> None:
        """Look at every piece of text and code."""
        for node in list(self.document.findall(nodes.literal)):
            if self.may_change(node):
                self.link_code(node)
        for node in list(self.document.findall(nodes.Text)):
            if self.may_change(node) and not isinstance(node.parent, nodes.literal):
                self.link_text(node)

    def may_change(self, node: nodes.Node) -> bool:
        """Whether a node is neither part of a link nor of what has no links."""
        while node is not None:
            if isinstance(node, UNTOUCHED):
                return False
            node = node.parent
        return True

    def link_code(self, node: nodes.literal) -> None:
        """Make a link of a code span that is a public name, or a page."""
        text = node.astext()
        call, page = CALL.match(text), re.fullmatch(DOCS, text)
        if page and page[1] in self.env.found_docs:
            node.replace_self(self.to_page(page[1], nodes.inline(text, text)))
        elif call and call[1] in NAMES:
            link = self.link("py", "obj", NAMES[call[1]], node.deepcopy())
            node.replace_self(link)

    def link_text(self, node: nodes.Text) -> None:
        """Make links of pages and decisions that a text names."""
        text, parts, end = node.astext(), list[nodes.Node](), 0
        for match in IN_TEXT.finditer(text):
            page = match[1] or self.decision(match[2])
            if page in self.env.found_docs:
                shown = nodes.inline(match[0], match[0])
                parts += [nodes.Text(text[end : match.start()]), self.to_page(page, shown)]
                end = match.end()
        if parts:
            node.parent.replace(node, [*parts, nodes.Text(text[end:])])

    def decision(self, number: str) -> str | None:
        """The page of a decision."""
        found = (name for name in self.env.found_docs if name.startswith(f"adr/{number}"))
        return next(found, None)

    def to_page(self, page: str, shown: nodes.Node) -> addnodes.pending_xref:
        """A link to a page, by its title if its file name stood there."""
        titled = not shown.astext().startswith("ADR")
        return self.link("std", "doc", f"/{page}", shown, refexplicit=not titled)

    def link(
        self, domain: str, kind: str, target: str, shown: nodes.Node, **options: Any
    ) -> addnodes.pending_xref:
        """A link that Sphinx resolves later."""
        options = {"refexplicit": True, "refdoc": self.env.docname, "refwarn": True, **options}
        return addnodes.pending_xref(
            "", shown, refdomain=domain, reftype=kind, reftarget=target, **options
        )


def resolve_alias(app: Sphinx, env: Any, node: Any, shown: nodes.Node) -> nodes.Node | None:
    """Link another name of something to the one that is documented."""
    target = NAMES.get(node.get("reftarget"))
    if target is None or node.get("refdomain") != "py":
        return None
    return env.get_domain("py").resolve_xref(
        env, node["refdoc"], app.builder, "obj", target, node, shown
    )


def skip(app: Sphinx, what: str, name: str, thing: Any, skips: bool, options: Any) -> bool | None:
    """Leave out the fields of named tuples, which the docstring of the class describes."""
    doc = inspect.getdoc(thing) or ""
    return True if doc.startswith("Alias for field number") else None


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("builder-inited", write_pages)
    app.connect("missing-reference", resolve_alias)
    app.connect("autodoc-skip-member", skip)
    app.add_transform(Links)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
