"""Saved weights come back bit for bit or not at all: every cut, change, loss and mix-up is refused by file name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldbfr.errors import LDBFRError, WeightsError
from ldbfr.pipeline import LDBFRPipeline
from ldbfr.weights import MANIFEST, find_weights, manifest_digest, read_manifest, sha256_of, write_manifest
from tests import tiny

FACES = tiny.blob_faces(2)

FILES = [
    "model_index.json",
    "preset.json",
    *(f"{part}/config.json" for part in ("dc_vqr", "latent_vqgan", "unet")),
    *(f"{part}/diffusion_pytorch_model.safetensors" for part in ("dc_vqr", "latent_vqgan", "unet")),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the tiny pipeline; nobody changes them."""
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    tiny.new_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def weights(saved: Path, tmp_path: Path) -> Path:
    """A copy of them to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "weights"))


# ---------------------------------------------------------------------------------------------------------- round trip


def test_a_saved_pipeline_restores_bit_for_bit_the_same(saved: Path) -> None:
    original, loaded = tiny.pipeline(), LDBFRPipeline.from_pretrained(saved)
    assert loaded.preset == original.preset
    for part in ("dc_vqr", "latent_vqgan", "unet"):
        assert tiny.differing(tiny.snapshot(getattr(original, part)), tiny.snapshot(getattr(loaded, part))) == []
    settings: Any = {"output_type": "pt", "num_samples": 2, "return_first_stage": True}
    one, other = original(FACES, **settings), loaded(FACES, **settings)
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.first_stage, other.first_stage)
    assert np.array_equal(one.uncertainty, other.uncertainty)


def test_the_folder_holds_what_the_manifest_says(saved: Path) -> None:
    held = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    assert held == {*FILES, MANIFEST}
    manifest = read_manifest(saved)
    assert set(manifest["files"]) == set(FILES)
    for name, entry in manifest["files"].items():
        assert entry == {"size": (saved / name).stat().st_size, "sha256": sha256_of(saved / name)}


def test_the_digest_names_the_weights(saved: Path, tmp_path: Path) -> None:
    loaded = LDBFRPipeline.from_pretrained(saved)
    assert loaded.weights_digest == manifest_digest(read_manifest(saved))
    again, other = tiny.new_pipeline(), tiny.new_pipeline(seed=1)
    again.save_pretrained(tmp_path / "again")
    other.save_pretrained(tmp_path / "other")
    assert again.weights_digest == loaded.weights_digest
    assert other.weights_digest != loaded.weights_digest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_saved_in_half_precision_load_in_full(tmp_path: Path, dtype: torch.dtype) -> None:
    pipeline = tiny.new_pipeline().to(dtype)
    pipeline.save_pretrained(tmp_path / "half")
    loaded = LDBFRPipeline.from_pretrained(tmp_path / "half")
    assert loaded.dtype == torch.float32
    for part in ("dc_vqr", "latent_vqgan", "unet"):
        before = {name: value.float() for name, value in tiny.snapshot(getattr(pipeline, part)).items()}
        assert tiny.differing(before, tiny.snapshot(getattr(loaded, part))) == []
    assert loaded(FACES).images.shape == FACES.shape


def test_weights_load_in_half_precision_on_request(saved: Path) -> None:
    loaded = LDBFRPipeline.from_pretrained(saved, torch_dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert loaded(FACES).images.shape == FACES.shape


def test_a_folder_that_holds_something_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(WeightsError, match=r"is not empty: choose another folder"):
        tiny.pipeline().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_empty_folder_can_be_saved_into(tmp_path: Path) -> None:
    tiny.new_pipeline().save_pretrained(tmp_path)
    read_manifest(tmp_path)


# ------------------------------------------------------------------------------------------------------------- damages


def refused(weights: Path, file: str) -> None:
    with pytest.raises(WeightsError) as caught:
        LDBFRPipeline.from_pretrained(weights)
    assert str(weights / file) in str(caught.value)


@pytest.mark.parametrize("file", [*FILES, MANIFEST])
def test_a_file_that_is_cut_at_any_byte_is_refused_by_name(weights: Path, file: str) -> None:
    data = (weights / file).read_bytes()
    rng = np.random.default_rng(0)
    for size in {0, 1, len(data) // 2, len(data) - 1, *rng.integers(1, len(data), 5).tolist()}:
        (weights / file).write_bytes(data[:size])
        refused(weights, file)


@pytest.mark.parametrize("file", FILES)
def test_a_file_with_any_byte_flipped_is_refused_by_name(weights: Path, file: str) -> None:
    size = (weights / file).stat().st_size
    rng = np.random.default_rng(1)
    for position in {0, size // 2, size - 1, *rng.integers(0, size, 5).tolist()}:
        tiny.flip_byte(weights / file, position)
        refused(weights, file)
        tiny.flip_byte(weights / file, position)
    LDBFRPipeline.from_pretrained(weights)


@pytest.mark.parametrize("file", [*FILES, MANIFEST])
def test_a_file_that_is_gone_is_missed_by_name(weights: Path, file: str) -> None:
    (weights / file).unlink()
    with pytest.raises(WeightsError) as caught:
        LDBFRPipeline.from_pretrained(weights)
    assert file in str(caught.value)


def test_a_file_that_grew_is_refused_by_name_with_both_sizes(weights: Path) -> None:
    file = weights / "unet" / "config.json"
    size = file.stat().st_size
    with file.open("ab") as stream:
        stream.write(b"\n")
    with pytest.raises(WeightsError, match=rf"config\.json has {size + 1} bytes instead of {size}; copy"):
        LDBFRPipeline.from_pretrained(weights)


def test_an_edited_configuration_is_refused_even_at_the_same_size(weights: Path) -> None:
    file = weights / "unet" / "config.json"
    text = file.read_text("utf-8")
    edited = text.replace('"ablation": "D"', '"ablation": "C"')
    assert edited != text
    file.write_text(edited, "utf-8")
    with pytest.raises(WeightsError, match=r"unet/config\.json was changed: its SHA-256"):
        LDBFRPipeline.from_pretrained(weights)


@pytest.mark.parametrize(
    "manifest",
    [
        "[]",
        "{}",
        '{"files": []}',
        '{"files": {"model_index.json": 3}}',
        '{"files": {"a": {"size": "x", "sha256": ""}}}',
        '{"files": {}}',
    ],
)
def test_a_manifest_that_describes_nothing_is_refused(weights: Path, manifest: str) -> None:
    (weights / MANIFEST).write_text(manifest)
    with pytest.raises(WeightsError, match=r"manifest\.json"):
        LDBFRPipeline.from_pretrained(weights)


# ------------------------------------------------------------------------------------------------------------- mix-ups


def replace_part(weights: Path, part: str, *overrides: str) -> None:
    """Put another model's network in, with a manifest that vouches for every byte of it."""
    network = getattr(tiny.new_pipeline(*overrides), part)
    shutil.rmtree(weights / part)
    network.save_pretrained(weights / part)
    (weights / MANIFEST).unlink()
    write_manifest(weights, {"kind": "weights", "preset": "tiny"})


@pytest.mark.parametrize(
    ("part", "override"),
    [
        ("dc_vqr", "hq_vqgan.num_codes=16"),
        ("dc_vqr", "hq_vqgan.block_out_channels=[8,8,16]"),
        ("latent_vqgan", "latent_vqgan.code_dim=4"),
        ("unet", "latent_vqgan.code_dim=4"),
        ("unet", "unet.block_out_channels=[16,16]"),
        ("unet", "hq_vqgan.code_dim=32"),
        ("unet", "injection.ablation=B"),
    ],
)
def test_a_network_of_another_preset_is_refused_by_name(weights: Path, part: str, override: str) -> None:
    replace_part(weights, part, override)
    with pytest.raises(WeightsError) as caught:
        LDBFRPipeline.from_pretrained(weights)
    assert str(weights / part) in str(caught.value)


def test_a_network_in_another_s_place_is_refused_by_name(weights: Path) -> None:
    shutil.rmtree(weights / "dc_vqr")
    shutil.copytree(weights / "latent_vqgan", weights / "dc_vqr")
    (weights / MANIFEST).unlink()
    write_manifest(weights, {})
    with pytest.raises(WeightsError, match="dc_vqr"):
        LDBFRPipeline.from_pretrained(weights)


def test_weights_of_another_preset_than_the_expected_one_are_refused(saved: Path) -> None:
    assert LDBFRPipeline.from_pretrained(saved, preset="tiny").side == 32
    with pytest.raises(WeightsError, match="are weights of preset tiny, not of faces_64"):
        LDBFRPipeline.from_pretrained(saved, preset="faces_64")


def test_a_checkpoint_folder_is_no_weights(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{}")
    write_manifest(tmp_path, {"kind": "checkpoint"})
    with pytest.raises(WeightsError, match=r"preset\.json cannot be read.*ldbfr export"):
        LDBFRPipeline.from_pretrained(tmp_path)


SPOILT: list[tuple[str, Callable[[Path], Any]]] = [
    ("preset.json is no JSON", lambda folder: (folder / "preset.json").write_text("{")),
    ("preset.json has an unknown setting", lambda folder: edit(folder / "preset.json", colour=3)),
    ("config.json is no JSON", lambda folder: (folder / "unet" / "config.json").write_text("{")),
    ("no weights", lambda folder: (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()),
    ("weights that are none", lambda folder: (folder / FILES[-1]).write_bytes(b"x" * 100)),
]


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("spoil", [spoil for _, spoil in SPOILT], ids=[name for name, _ in SPOILT])
def test_what_a_manifest_vouches_for_wrongly_is_an_error_of_ours_too(
    weights: Path, spoil: Callable[[Path], Any]
) -> None:
    """Someone edits a file and writes the manifest anew: the error still names the folder, and is no traceback."""
    spoil(weights)
    (weights / MANIFEST).unlink()
    write_manifest(weights, {})
    with pytest.raises(LDBFRError, match="weights"):
        LDBFRPipeline.from_pretrained(weights)


# ------------------------------------------------------------------------------------------------------------- finding


def test_weights_that_are_nowhere_are_missed_with_the_places_that_were_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LDBFR_CACHE", str(tmp_path / "cache"))
    with pytest.raises(WeightsError) as caught:
        LDBFRPipeline.from_pretrained("no-such-weights")
    for text in ("'no-such-weights'", "pretrained/no-such-weights", str(tmp_path / "cache" / "no-such-weights")):
        assert text in str(caught.value)


def test_weights_are_found_by_path_and_by_name_in_the_cache(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LDBFR_CACHE", str(saved.parent))
    monkeypatch.chdir(tmp_path)
    assert find_weights(saved) == saved
    assert find_weights("tiny") == saved


def test_a_file_is_no_folder_of_weights(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"")
    with pytest.raises(WeightsError, match="no weights"):
        LDBFRPipeline.from_pretrained(file)


def test_a_manifest_is_written_in_one_step(tmp_path: Path) -> None:
    (tmp_path / "data.bin").write_bytes(b"123")
    write_manifest(tmp_path, {"kind": "test"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.bin", MANIFEST]
    assert read_manifest(tmp_path)["kind"] == "test"
