"""A run that goes on, held against what it was when it was started before: another teacher under a name that is taken
is refused, another setting is said."""

from collections.abc import Iterator, Mapping
from typing import Any

from teachers.protocol import Card
from trainer.config import RunConfig
from trainer.errors import ConfigError

Start = Mapping[str, Any]  # a start event of the metrics file


def check_teachers(before: Start, cards: Mapping[str, Card]) -> None:
    """Raise ConfigError where a name stood for another model: what it taught would count as the new one's."""
    for name, card in cards.items():
        was = before.get("teachers", {}).get(name, {})
        if was and was["fingerprint"] != card.fingerprint:
            raise ConfigError(
                f"teacher {name} was {was['model']} with the fingerprint {was['fingerprint'][:16]} in this run so far, "
                f"and {card.model} with {card.fingerprint[:16]} answers now: serve the first one again, or give this "
                "one another name in the run file"
            )


def changes(before: Start, config: RunConfig) -> dict[str, list[Any]]:
    """By key of the run file what it was and what it is, where both had the key."""
    was, now = (dict(_flat(run)) for run in (before.get("run", {}), config.model_dump(mode="json")))
    return {key: [was[key], value] for key, value in now.items() if key in was and was[key] != value}


def _flat(run: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for section, values in run.items():
        if section == "teachers":
            yield section, [teacher["name"] for teacher in values]
            yield from _flat({f"teachers.{teacher['name']}": teacher for teacher in values})
        else:
            yield from ((f"{section}.{key}", value) for key, value in values.items())
