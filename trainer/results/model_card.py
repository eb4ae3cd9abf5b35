"""The card of an exported model: what it was made of and how it measures, from the run's metrics file alone.

Names only: where models, teachers and texts lay on the machine that trained is nobody else's business.
"""

import html
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from trainer.reports.curves import figure
from trainer.reports.history import History
from trainer.reports.report import PLUMBING, settings
from trainer.reports.summary import summarise

PRIVATE = (*PLUMBING, "model", "chat_template", "roles", "seed")
MARKDOWN = str.maketrans({sign: f"&#{ord(sign)};" for sign in "|[]`*\\"})
SECTIONS = ("student", "fusion", "loss", "optim", "train")
OF_TEACHERS = ("top_k", "match", "weight", "final_weight")


def model_card(run: History, step: int, bpb: float | None) -> str:
    """Markdown with a YAML head, for the weights after `step` steps, which have `bpb` on held-out text, if measured."""
    base = run.start.get("base", {"model": "unknown", "revision": None})
    room = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    room.filters |= {"figure": figure, "cell": _cell, "name": _name}
    head = ModelCardData(
        base_model=base["model"] if base["revision"] else None,  # what has no revision has no name on the hub
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["tutelage", *["knowledge-distillation", "model-fusion"][: len(run.teachers)]],
    )
    summary = summarise(run)
    return room.get_template("model_card.md").render(
        head=head.to_yaml(),
        base=base,
        identity=run.start.get("identity", {}),
        step=step,
        bpb=bpb,
        summary=summary,
        teachers=list(_teachers(run)),
        sources=run.start.get("sources", ()),
        num_held_out=run.start.get("held_out", 0),
        domains=_at(run, step, "held_out_domains"),
        agreement=_agreement(run, step),
        changed=[change for change in run.changed if _public(change[1])],
        settings=[(name, settings(run.run[name], PRIVATE)) for name in SECTIONS if name in run.run],
        software=run.start.get("software", {}),
    )


def _teachers(run: History) -> Iterator[Mapping[str, Any]]:
    """What the run file says of each, and what its own card said."""
    cards = run.start.get("teachers", {})
    for teacher in run.run.get("teachers", ()):
        yield {"name": teacher["name"], "asked": teacher, "card": cards.get(teacher["name"], {})}


def _public(key: str) -> bool:
    """Whether a key of the run file is one that the card tells of."""
    section, _, name = key.partition(".")
    shown = section in SECTIONS or (section == "teachers" and name.rpartition(".")[2] in ("", *OF_TEACHERS))
    return shown and name not in PRIVATE


def _at(run: History, step: int, key: str) -> dict[str, float]:
    """Figures of the measurement after a step whose path begins with `key`, by the rest of it."""
    places = (run.evals.steps == step).nonzero()[0]
    columns = {path.removeprefix(f"{key}/"): c for path, c in run.evals.columns.items() if path.startswith(f"{key}/")}
    return {name: float(column[places[-1]]) for name, column in columns.items()} if len(places) else {}


def _agreement(run: History, step: int) -> list[tuple[str, float, float]]:
    """With whom, top-1 and KL."""
    rows = [(f"teacher {name}", _at(run, step, f"teachers/{name}")) for name in run.teachers]
    rows.append(("their fusion", _at(run, step, "fused")))
    return [(who, found["top1"], found["kl"]) for who, found in rows if found]


def _name(value: str) -> str:
    """Of a path the last part; of a name of the hub, OWNER/NAME, all."""
    return Path(value).name if value.startswith(("/", ".", "~")) or value.count("/") > 1 else value


def _cell(value: Any) -> str:
    """As text in a table of Markdown, whatever it holds."""
    return html.escape(" ".join(str(value).split()), quote=False).translate(MARKDOWN)
