"""Render the model card of an exported student from the metrics file of its run.

The card names models, teachers and sources, but no paths, addresses or texts: it may be published with the model.
"""

import html
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from trainer.plain_text import one_line
from trainer.report.formatting import PERFORMANCE_KEYS, format_number, format_section
from trainer.report.history import History
from trainer.report.summary import summarise

OMITTED_KEYS = (*PERFORMANCE_KEYS, "model", "chat_template", "roles", "seed")
SECTIONS = ("student", "fusion", "loss", "optim", "train")
TEACHER_KEYS = ("top_k", "signal", "weight", "final_weight")
TAGS = ("knowledge-distillation", "model-fusion")  # with one teacher only the first one, without teachers none
LINK = re.compile(r":(?=//)|(?<=www)\.|@")  # what Markdown makes a link without brackets
MARKDOWN_ESCAPES = str.maketrans({sign: f"&#{ord(sign)};" for sign in "|[]`*\\"})


def model_card(run: History, step: int, bpb: float | None) -> str:
    """Return the card as Markdown with a YAML header.

    step  steps after which the weights were exported
    bpb   bits per byte of held-out text with these weights; None if they were not evaluated
    """
    base = run.start.get("base", {"model": "unknown", "revision": None})
    header = ModelCardData(
        base_model=base["model"] if base["revision"] else None,  # otherwise a local folder
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["tutelage", *TAGS[: len(run.teachers)]],
    )
    return (
        _environment()
        .get_template("model_card.md")
        .render(
            header=_Yaml(header.to_yaml()),
            base=base,
            identity=run.start.get("identity", {}),
            step=step,
            bpb=bpb,
            summary=summarise(run),
            teachers=list(_teachers(run)),
            sources=run.start.get("sources", ()),
            num_held_out=run.start.get("held_out", 0),
            domains=_eval_values(run, step, "held_out_domains"),
            agreement=_agreement_rows(run, step),
            changed=[change for change in run.changed if _is_shown(change[1])],
            settings=[(name, format_section(values, OMITTED_KEYS)) for name, values in _sections(run)],
            software=run.start.get("software", {}),
        )
    )


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_escape,  # of every value in {{ }}; the template puts no Markdown there
    )
    environment.filters |= {"number": format_number, "name": _public_name}
    return environment


def _teachers(run: History) -> Iterator[Mapping[str, Any]]:
    """Yield the name, the section of the run file and the identity of each teacher."""
    identities = run.start.get("teachers", {})
    for teacher in run.config.get("teachers", ()):
        yield {"name": teacher["name"], "config": teacher, "identity": identities.get(teacher["name"], {})}


def _sections(run: History) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield name and values of the sections of the run file; the precision is the one that was used, never `auto`."""
    for name in SECTIONS:
        if name in run.config:
            used = {"precision": run.start["precision"]} if name == "student" and "precision" in run.start else {}
            yield name, {**run.config[name], **used}


def _is_shown(key: str) -> bool:
    """Return whether the card shows this key of the run file."""
    section, _, name = key.partition(".")
    is_shown = section in SECTIONS or (section == "teachers" and name.rpartition(".")[2] in ("", *TEACHER_KEYS))
    return is_shown and name not in OMITTED_KEYS


def _eval_values(run: History, step: int, prefix: str) -> dict[str, float]:
    """Return the numbers of the evaluation after `step` whose path starts with `prefix`, by the rest of the path."""
    rows = (run.evals.steps == step).nonzero()[0]
    columns = {path: column for path, column in run.evals.columns.items() if path.startswith(f"{prefix}/")}
    if not len(rows):
        return {}
    return {path.removeprefix(f"{prefix}/"): float(column[rows[-1]]) for path, column in columns.items()}


def _agreement_rows(run: History, step: int) -> list[tuple[str, float, float]]:
    """Return the target, top-1 agreement and KL divergence of each measured target."""
    rows = [(f"teacher {name}", _eval_values(run, step, f"teachers/{name}")) for name in run.teachers]
    rows.append(("fused target", _eval_values(run, step, "fused")))
    return [(target, values["top1"], values["kl"]) for target, values in rows if values]


def _public_name(value: str) -> str:
    """Return the last part of a path, but all of OWNER/NAME, a name on the Hub."""
    return Path(value).name if value.startswith(("/", ".", "~")) or value.count("/") > 1 else value


class _Yaml(str):
    """YAML text written by a library; it is inserted without escaping."""


def _escape(value: Any) -> str:
    """Escape a value for one line of Markdown, so that it contains no markup, HTML or links."""
    if isinstance(value, _Yaml):
        return value
    before, after = str(value)[:1].isspace(), str(value)[1:][-1:].isspace()  # of a separator in the template
    text = html.escape(f"{' ' * before}{one_line(str(value))}{' ' * after}", quote=False).translate(MARKDOWN_ESCAPES)
    return LINK.sub(lambda match: f"&#{ord(match[0])};", text)
