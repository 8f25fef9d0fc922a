"""The reference pages, made from the code.

``{command-line}`` lists every command of a typer app. For the Python pages, small repairs let Sphinx's autodoc
read modules whose heavy imports are mocked, and docstrings whose types stand in the signatures only.
"""

import re
from importlib import import_module
from typing import Union

import typer
from docutils import nodes
from sphinx.ext.autodoc.mock import _MockObject
from sphinx.util.docutils import SphinxDirective


class CommandLine(SphinxDirective):
    """``{command-line} package.module:app`` → a section per command: usage, help, arguments and options."""

    required_arguments = 1

    def run(self):
        module, app = self.arguments[0].split(":")
        self.env.note_dependency(import_module(module).__file__)
        root = typer.main.get_command(getattr(import_module(module), app))
        root.name = module.partition(".")[0]
        return [self.section(command, context) for command, context in self.walk(root)]

    def walk(self, command, parent=None):
        """Commands that do something, each with its context, in the order of the code."""
        context = command.context_class(command, info_name=command.name, parent=parent)
        if not hasattr(command, "commands"):
            yield command, context
        for child in getattr(command, "commands", {}).values():
            if not child.hidden:
                yield from self.walk(child, context)

    def section(self, command, context):
        title = context.command_path
        section = nodes.section(ids=[nodes.make_id(title)], names=[nodes.fully_normalize_name(title)])
        section += nodes.title(title, title)
        usage = command.get_usage(context).removeprefix("Usage: ")
        section += nodes.literal_block(usage, " ".join(usage.split()), language="text")
        section += [paragraph(text) for text in (command.help or "").split("\n\n")]
        # Each as --help shows it, default included; --help itself is on every command.
        records = [parameter.get_help_record(context) for parameter in command.params]
        items = nodes.definition_list(classes=["options"])
        for term, text in filter(None, records):
            items += nodes.definition_list_item(
                "", nodes.term("", "", nodes.literal("", term)), nodes.definition("", paragraph(text))
            )
        section += items
        self.state.document.note_implicit_target(section)
        return section


def paragraph(text):
    """Text in which `code` and --options are set as code."""
    node = nodes.paragraph()
    parts = re.split(r"(`+[^`]+`+|(?<!\S)--?[a-z][\w-]*)", " ".join(text.split()))
    for i, part in enumerate(parts):  # every second one is code
        node += nodes.literal("", part.strip("`")) if i % 2 else nodes.Text(part)
    return node


def link_to_documented_name(app, env, node, contnode):
    """A room re-exports what its files define, so companion.train.loop.History is documented as train.History."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or ("." not in target and target != "CompanionError"):
        return None
    short = target.rpartition(".")[2] if target.startswith("companion.") else target
    domain = env.domains["py"]
    found = [name for name in domain.objects if name.endswith(f".{short}")]
    if len(found) != 1:
        return None
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", found[0], node, contnode)


COLON = "\N{MODIFIER LETTER COLON}"


def hide_colons(app, what, name, obj, options, lines):
    """Keep napoleon from taking what stands before a colon, in an attribute's or a Returns text, for a type."""
    in_returns = False
    for i, line in enumerate(lines):
        if what in ("attribute", "property") or in_returns:
            lines[i] = line.replace(":", COLON)
        in_returns = line.strip() == "Returns:"


def show_colons(app, what, name, obj, options, lines):
    lines[:] = [line.replace(COLON, ":") for line in lines]


def shorten_signature(app, what, name, obj, options, signature, returns):
    # A default made by a function is no Python expression, and Sphinx then prints the whole list badly.
    return signature and signature.replace("<factory>", "..."), returns


def setup(app):
    # `str | nn.Module` and sums of constants are evaluated on import, and Sphinx's mocks know no operators.
    _MockObject.__or__ = lambda self, other: Union[self, other]  # noqa: UP007
    _MockObject.__ror__ = lambda self, other: Union[other, self]  # noqa: UP007
    for operator in ("__add__", "__sub__", "__mul__", "__truediv__", "__neg__"):
        setattr(_MockObject, operator, lambda self, *_: self)
    app.add_directive("command-line", CommandLine)
    app.connect("autodoc-process-docstring", hide_colons, priority=400)  # napoleon comes at 500
    app.connect("autodoc-process-docstring", show_colons, priority=600)
    app.connect("autodoc-process-signature", shorten_signature)
    app.connect("missing-reference", link_to_documented_name)
    return {"parallel_read_safe": True}
