"""Folders of weights for rollout servers: what is written is read, and every damage is refused by name."""

import hashlib
import json
import os
import random
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from teachers.sync_folder import SyncFolderError, expected_shapes, read_sync_folder, write_sync_folder
from tests.tiny import save_tiny_model

QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tied head, whose files contain no lm_head.weight."""
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def weights(model: Path) -> dict[str, Tensor]:
    return load_file(model / "model.safetensors")


@pytest.fixture
def folder(tmp_path: Path, weights: dict[str, Tensor]) -> Path:
    write_sync_folder(weights, tmp_path / "v1")
    return tmp_path / "v1"


def read(folder: Path, model: Path, digest: str | None = None) -> dict[str, Tensor]:
    digest = digest or hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    return read_sync_folder(folder, digest, expected_shapes(model))


def test_all_weights_return_in_bfloat16_with_the_head_of_a_tied_model(
    folder: Path, model: Path, weights: dict[str, Tensor]
) -> None:
    received = read(folder, model)
    assert received.keys() == weights.keys() | {"lm_head.weight"}
    for name, weight in (weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}).items():
        assert torch.equal(received[name], weight.to(torch.bfloat16)), name


def test_the_head_of_an_untied_model_is_its_own(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", tied=False)
    weights = load_file(model / "model.safetensors")
    write_sync_folder(weights, tmp_path / "v1")
    assert torch.equal(read(tmp_path / "v1", model)["lm_head.weight"], weights["lm_head.weight"].to(torch.bfloat16))


def test_tied_weights_that_share_memory_are_written(tmp_path: Path, model: Path, weights: dict[str, Tensor]) -> None:
    shared = {name: weight.to(torch.bfloat16) for name, weight in weights.items()}
    shared["lm_head.weight"] = shared["model.embed_tokens.weight"]
    write_sync_folder(shared, tmp_path / "v1")
    assert read(tmp_path / "v1", model).keys() == shared.keys()


def test_a_folder_is_replaced_as_a_whole_and_gets_another_digest(
    folder: Path, model: Path, weights: dict[str, Tensor]
) -> None:
    (folder / "other.safetensors").write_bytes(b"left over")
    digest = write_sync_folder({name: weight + 1 for name, weight in weights.items()}, folder)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["v1"]
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "model.safetensors"]
    assert torch.equal(read(folder, model, digest)["model.norm.weight"], weights["model.norm.weight"].bfloat16() + 1)
    assert write_sync_folder(weights, folder) == write_sync_folder(weights, folder) != digest


def test_weights_without_a_head_and_embeddings_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"embed_tokens\.weight"):
        write_sync_folder({"model.norm.weight": torch.ones(4)}, tmp_path / "v1")
    assert list(tmp_path.iterdir()) == []


def rewrite(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """Return a function that changes the tensors of a folder and writes a manifest that agrees with them."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        write_sync_folder(tensors, folder)

    return apply


def replace_file(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """Return a function that changes the tensors of a file, and states its new digest in the manifest."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        store(folder, save(tensors))

    return apply


def store(folder: Path, data: bytes, name: str = "model.safetensors") -> None:
    """Write a file of weights, and its size and digest to the manifest. The names of the tensors are not changed."""
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def flip_a_byte(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)


def claim_more_bytes(folder: Path) -> None:
    """Append a gigabyte of zeros, without using the disk, and state it in the manifest."""
    os.truncate(folder / "model.safetensors", 1 << 30)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["model.safetensors"]["num_bytes"] = 1 << 30
    (folder / "manifest.json").write_text(json.dumps(manifest))


def append(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"0")


def repeat_a_tensor(folder: Path) -> None:
    store(folder, save({"model.norm.weight": torch.ones(32, dtype=torch.bfloat16)}), "other.safetensors")


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)


def cut_in_header(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 50)


def link(folder: Path) -> None:
    moved = folder.parent / "elsewhere.safetensors"
    (folder / "model.safetensors").rename(moved)
    (folder / "model.safetensors").symlink_to(moved)


def fifo(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


def name_other_file(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"model.safetensors"', '"../v0/model.safetensors"'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"model\.safetensors is damaged: its size or SHA-256 differs from manifest\.json"),
        (cut_in_header, r"model\.safetensors is damaged"),
        (flip_a_byte, r"model\.safetensors is damaged"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), r"model\.safetensors is damaged"),
        (append, r"has \d+ bytes, expected at most \d+$"),
        (lambda f: store(f, b""), r"malformed model\.safetensors: SafetensorError"),
        (claim_more_bytes, r"the files of weights have 1073741824 bytes, expected at most"),
        (repeat_a_tensor, r"other\.safetensors: model\.norm\.weight is also in another file"),
        (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors cannot be read: No such file"),
        (lambda f: (f / "manifest.json").write_text("{}"), r"malformed manifest\.json: files: Field required"),
        (name_other_file, r"malformed manifest\.json: files\.\.\./v0"),
        (rewrite(lambda t: t.pop(QUERY)), rf"manifest\.json: {QUERY} is missing"),
        (rewrite(lambda t: [t.pop(n) for n in list(t) if ".1.mlp" in n]), r"down_proj\.weight, .* are missing"),
        (rewrite(lambda t: t.update(extra=torch.ones(2))), r"manifest\.json: extra is unknown to the model"),
        (rewrite(lambda t: t.update({QUERY: t[QUERY].T})), rf"{QUERY} has shape \[32, 64\], expected \[64, 32\]"),
        (rewrite(lambda t: t[QUERY].view(-1)[7].fill_(torch.nan)), f"the weight {QUERY} has values that are NaN"),
        (rewrite(lambda t: t[QUERY].view(-1)[7].fill_(-torch.inf)), f"the weight {QUERY} has values that are NaN"),
        (rewrite(lambda t: t.update({QUERY: t[QUERY].view(torch.int16)})), f"{QUERY} is stored as torch.int16"),
        (replace_file(lambda t: t.pop(QUERY)), f"the files of weights: {QUERY} is missing"),
        (replace_file(lambda t: t.update(extra=torch.ones(2).bfloat16())), "the files of weights: extra is unknown"),
        (replace_file(lambda t: t.update({QUERY: t[QUERY].float()})), f"{QUERY} is stored as torch.float32"),
        (replace_file(lambda t: t.update({QUERY: t[QUERY].to(torch.float8_e4m3fn)})), f"{QUERY} is stored as torch.f"),
        (link, r"model\.safetensors cannot be read: Too many levels of symbolic links"),
        (fifo, r"model\.safetensors is not a regular file"),
    ],
)
def test_every_damage_is_refused_by_name(
    folder: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    model = save_tiny_model(tmp_path / "model", head_dim=16)  # q_proj is not square
    write_sync_folder(load_file(model / "model.safetensors"), folder)
    read(folder, model)
    damage(folder)
    with pytest.raises(SyncFolderError, match=message):
        read(folder, model)


def test_a_changed_header_raises_no_error_of_another_class(folder: Path, model: Path) -> None:
    rng, data = random.Random(1), (folder / "model.safetensors").read_bytes()
    end, num_refused = 8 + int.from_bytes(data[:8], "little"), 0
    for _ in range(300):
        changed = bytearray(data)
        changed[rng.randrange(end)] = rng.choice(b'0129"{}[],:\xff\x00')
        store(folder, bytes(changed))
        try:
            read(folder, model)
        except SyncFolderError:
            num_refused += 1
    assert num_refused > 200


def test_every_flipped_bit_of_a_file_is_refused(folder: Path, model: Path) -> None:
    path, rng = folder / "model.safetensors", random.Random(1)
    data = path.read_bytes()
    for _ in range(30):
        changed = bytearray(data)
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(SyncFolderError, match=r"model\.safetensors is damaged"):
            read(folder, model)


def test_a_header_with_metadata_of_null_is_read_like_one_without(folder: Path, model: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip().replace(b"{", b'{"__metadata__":null,', 1)
    store(folder, len(header).to_bytes(8, "little") + header + data[8 + length :])
    assert read(folder, model).keys() == expected_shapes(model).keys()


def test_a_folder_of_another_time_is_refused_by_its_digest(folder: Path, model: Path) -> None:
    with pytest.raises(SyncFolderError, match="differs from the digest in the request"):
        read(folder, model, "0" * 64)


def test_tensors_that_models_compute_are_not_expected(tmp_path: Path, model: Path, weights: dict[str, Tensor]) -> None:
    old = tmp_path / "old"
    old.mkdir()
    save_file(weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, old / "model.safetensors")
    assert expected_shapes(old) == expected_shapes(model)


def test_only_the_weights_of_the_index_are_expected(tmp_path: Path, model: Path, weights: dict[str, Tensor]) -> None:
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    save_file(weights, sharded / "model-00001-of-00001.safetensors")
    save_file({"other.weight": torch.ones(4)}, sharded / "other.safetensors")
    index = {"weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    assert expected_shapes(sharded) == expected_shapes(model)


def test_a_consolidated_copy_of_the_weights_is_not_expected(
    tmp_path: Path, model: Path, weights: dict[str, Tensor]
) -> None:
    for names in (["model", "consolidated"], ["consolidated"]):
        copied = tmp_path / str(len(names))
        copied.mkdir()
        for name in names:
            prefix = "layers." if name == "consolidated" and len(names) == 2 else ""
            save_file({prefix + key: weight for key, weight in weights.items()}, copied / f"{name}.safetensors")
        assert expected_shapes(copied) == expected_shapes(model)


# --- a folder that cannot be written ---


def test_a_full_disk_is_one_error_and_leaves_the_earlier_folder(
    folder: Path, model: Path, weights: dict[str, Tensor]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(SyncFolderError, match=rf"cannot write {folder}: .*File too large"):
            write_sync_folder(weights, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in folder.parent.iterdir()] == ["v1"]
    read(folder, model)


def test_a_target_that_is_a_link_or_below_a_file_is_refused(
    folder: Path, model: Path, weights: dict[str, Tensor]
) -> None:
    link = folder.with_name("link")
    link.symlink_to(folder)
    with pytest.raises(SyncFolderError, match="it is a link"):
        write_sync_folder(weights, link)
    with pytest.raises(SyncFolderError, match="Not a directory"):
        write_sync_folder(weights, folder / "manifest.json" / "v2")
    assert sorted(path.name for path in folder.parent.iterdir()) == ["link", "v1"]
    read(folder, model)
