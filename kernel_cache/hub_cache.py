"""Files of model directories, and the layout of a Hugging Face hub cache, in which files are links to blobs."""

from pathlib import Path


def in_hub_cache(path: Path, kind: str) -> bool:
    """Return whether `path` is in the directory `kind` ("snapshots" or "blobs") of a Hugging Face hub cache."""
    return path.parent.name == kind and path.parent.parent.name.startswith("models--")


def file_inside(folder: Path, name: str) -> Path | None:
    """Return the path of a file in a model directory, or None if it is missing, not regular, or a link out of it.

    A link may point to another file of the directory or, in a snapshot of a hub cache, to the blobs of the same model.
    """
    path, own = folder / name, folder.resolve()
    if not path.is_file():
        return None
    target = path.resolve()
    blobs = own.parents[1] / "blobs" if in_hub_cache(own, "snapshots") else own
    return path if target.is_relative_to(own) or target.parent == blobs else None
