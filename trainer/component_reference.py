"""Generate docs/components.md, the list of registered components, from the registries.

Run `make docs` after a change of a registry or of the docstring of a component.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pkgutil import resolve_name


@dataclass(frozen=True)
class ComponentKind:
    """One kind of component.

    registry  "module:NAME" of the registry
    usage     where the name of a component is used, as a sentence
    """

    title: str
    registry: str
    usage: str


COMPONENT_KINDS = (
    ComponentKind("Divergences", "trainer.losses:DIVERGENCES", "Set `loss.divergence`."),
    ComponentKind("Fusion methods", "trainer.fusion:FUSION_METHODS", "Set `fusion.method`."),
    ComponentKind("Teacher signals", "trainer.signals:SIGNALS", "Set `signal` of a teacher in `[[teachers]]`."),
    ComponentKind(
        "Dialects", "teachers.client.dialects:DIALECTS", "A client detects the dialect of an address, in this order."
    ),
    ComponentKind(
        "Engines",
        "teachers.engines:ENGINES",
        "Set `tutelage serve --engine`, or `engine` in `[teachers.serve]`. The first one is the default.",
    ),
    ComponentKind(
        "Tokenizer kinds", "alignment.tokenizers:TOKENIZER_KINDS", "The first kind that matches a tokenizer is used."
    ),
    ComponentKind(
        "Sources",
        "trainer.sources:SOURCES",
        "The suffix of a file names its source, or `file_format` in `[[data.sources]]`.",
    ),
    ComponentKind(
        "Record formats",
        "trainer.sources.record_formats:RECORD_FORMATS",
        "A source has the format whose columns it has. Set `record_format` in `[[data.sources]]` if several fit.",
    ),
    ComponentKind("Trackers", "trainer.telemetry.trackers:TRACKERS", "Set the key of this name in `[tracking]`."),
)
INTRODUCTION = """\
# Components

<!-- Generated from the registries by trainer/component_reference.py: make docs -->

Every kind of component has one registry. [CONTRIBUTING.md](../CONTRIBUTING.md) shows how to add a component.
"""


def component_reference() -> str:
    """Return the reference as Markdown: one table for each registry."""
    return INTRODUCTION + "".join(map(_section, COMPONENT_KINDS))


def _section(kind: ComponentKind) -> str:
    registry: Mapping[str, str] = resolve_name(kind.registry)
    module, _, name = kind.registry.partition(":")
    rows = "".join(_row(*entry) for entry in registry.items())
    introduction = f"{kind.usage} Registry: `{name}` of `{module}`."
    return f"\n## {kind.title}\n\n{introduction}\n\n| name | description | module |\n|---|---|---|\n{rows}"


def _row(name: str, target: str) -> str:
    description = first_sentence(resolve_name(target)).replace("|", "\\|")
    return f"| `{name}` | {description} | `{target.partition(':')[0]}` |\n"


def first_sentence(component: object) -> str:
    """Return the first sentence of a docstring on one line. Raises ValueError if there is no docstring."""
    text = " ".join((component.__doc__ or "").split())
    if not text:
        raise ValueError(f"{component} has no docstring: its first sentence describes the component")
    return text.partition(". ")[0].rstrip(".") + "."


if __name__ == "__main__":
    sys.stdout.write(component_reference())
