"""``{results} NAME``: the table of a bench, rendered from data/results/NAME.json, with what it was measured on below.

Options: ``columns`` names some columns, with commas between them, in the order wanted; ``caption`` is written above the
table.
"""

import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.util.docutils import SphinxDirective

from companion import CompanionError


def load_alone(name):
    """A module of the package without the room around it: the room needs torch, and the site is built without."""
    package = Path(find_spec("companion").origin).parent
    spec = spec_from_file_location(f"_alone_{name}", package.joinpath(*name.split(".")).with_suffix(".py"))
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


results = load_alone("metrics.results")


class Results(SphinxDirective):
    required_arguments = 1
    option_spec = {"columns": directives.unchanged_required, "caption": directives.unchanged_required}  # noqa: RUF012

    def run(self):
        columns = self.options.get("columns")
        try:
            path = results.shipped_file(self.arguments[0])
            text = results.read(path).to_markdown(columns and [name.strip() for name in columns.split(",")])
        except CompanionError as error:
            raise self.error(str(error)) from error
        self.env.note_dependency(str(path))
        table, provenance = found = self.parse_text_to_nodes(text)
        table["classes"].append("results")
        provenance["classes"].append("results-provenance")
        if "caption" in self.options:
            table.insert(0, nodes.title("", "", *self.parse_inline(self.options["caption"], lineno=self.lineno)[0]))
        return found


def setup(app):
    app.add_directive("results", Results)
    return {"parallel_read_safe": True}
