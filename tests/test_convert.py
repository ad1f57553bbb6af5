"""Published networks as ours: the same functions, every key accounted for, and nothing of a pickle ever run.

The functions are compared with `tests.reference_ldm`, which knows neither diffusers nor ldbfr; in float64, so that
another epsilon (1e-5 for 1e-6) is a failure and not taken for rounding.
"""

import copy
import json
import os
import pickle
import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.models.unets.unet_2d import UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import ldbfr.models.convert as convert_module
from ldbfr.config import Preset, load_preset
from ldbfr.errors import ConfigError, StorageError, WeightsError
from ldbfr.models.convert import convert
from ldbfr.models.convert_compvis import read_checkpoint
from ldbfr.models.convert_diffusers import read_folder
from ldbfr.models.convert_keys import averaged_name, compvis_unet, compvis_vqgan, keys_of
from ldbfr.models.convert_sources import read_tensors
from ldbfr.models.dqe import make_unet
from ldbfr.models.loading import load_network
from ldbfr.models.vqgan import VQGAN
from ldbfr.weights import read_manifest, sha256_of
from tests import reference_ldm as reference
from tests import tiny

SMALL = (
    "hq_vqgan={block_out_channels=[32,64,64],layers_per_block=2,code_dim=16,num_codes=32,level_attention=true}",
    "latent_vqgan={block_out_channels=[32,64],layers_per_block=2,code_dim=3,num_codes=64}",
    "unet={block_out_channels=[32,64,96],layers_per_block=2,attention_levels=[false,true,true],attention_head_dim=32}",
)
"""Overrides of `tiny`: CompVis's 32 groups and 32 channels a head, the rest small; two and three heads."""

State = dict[str, Tensor]


def small(*overrides: str) -> Preset:
    return tiny.preset(*SMALL, *overrides)


@lru_cache
def first_stage() -> reference.VQModel:
    """A small vq-f4 with the loss of its training; nobody changes it."""
    return reference.scramble(reference.VQModel([32, 64], 2, [False, False], 3, 64), 0)


@lru_cache
def faces() -> reference.VQModel:
    """A small VQGAN like that of taming-transformers' faces."""
    return reference.scramble(reference.VQModel([32, 64, 64], 2, [False, False, True], 16, 32), 1)


@lru_cache
def unet(seed: int) -> reference.UNetModel:
    """A small UNet of latent-diffusion."""
    return reference.scramble(reference.UNetModel(3, [32, 64, 96], 2, [False, True, True], 32), seed)


RAW, AVERAGE = 2, 3
"""Seeds of the UNet's last and averaged weights."""


def ldm(**changes: Any) -> State:
    """The state of a small latent diffusion model; changes are keys to set, or to remove where None."""
    model = reference.LatentDiffusion(unet(RAW), first_stage(), unet(AVERAGE))
    return changed(model.state_dict(), changes)


def changed(state: dict[str, Tensor], changes: dict[str, Any]) -> State:
    return {key: value for key, value in {**state, **changes}.items() if value is not None}


def with_loss(state: State) -> State:
    """A VQGAN's state with all that its training's loss adds, its tensors cut down to nothing."""
    with torch.device("meta"):
        loss = reference.vq_f4().loss
    return state | {f"loss.{name}": torch.zeros(value.shape[:1]) for name, value in loss.state_dict().items()}


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def lightning(state: State, **more: Any) -> dict[str, Any]:
    """What Lightning writes around a state dict, as plain values."""
    return {
        "epoch": 3,
        "global_step": 1234,
        "pytorch-lightning_version": "1.4.2",
        "callbacks": {},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-6}]}],
        "lr_schedulers": [],
        "state_dict": OrderedDict(state),
        **more,
    }


def vqgan_in(folder: Path) -> VQGAN:
    return cast(VQGAN, load_network(VQGAN, folder)).eval()


def unet_in(folder: Path) -> UNet2DModel:
    return cast(UNet2DModel, load_network(UNet2DModel, folder)).eval()


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def assert_same_vqgan(ours: VQGAN, theirs: reference.VQModel) -> None:
    """The same features, codes and images."""
    ours, theirs = ours.double(), copy.deepcopy(theirs).double()
    images = tiny.normal(2, 3, 32, 32, seed=5).double()
    features = theirs.encode(images)
    codes = theirs.nearest(features)
    assert len(codes.unique()) > 5
    close(ours.encode(images), features)
    assert torch.equal(ours.quantize.nearest(features), codes)
    close(ours.from_latents(features * ours.config["scaling_factor"]), theirs.decode(features))


@torch.no_grad()
def assert_same_unet(ours: UNet2DModel, theirs: reference.UNetModel) -> None:
    """The same noise, early and late in the diffusion."""
    ours, theirs = ours.double(), copy.deepcopy(theirs).double()
    latents = tiny.normal(4, 3, 16, 16, seed=6).double()
    timesteps = torch.tensor([0, 1, 500, 999])
    expected = theirs(latents, timesteps)
    assert expected.std() > 0.1
    close(ours(latents, timesteps).sample, expected)


def refusal(source: Path, output: Path, *overrides: str, **arguments: Any) -> str:
    """The text with which a source is refused; nothing may have been written."""
    with pytest.raises(WeightsError) as caught:
        convert(source, output, small(*overrides), **arguments)
    assert not output.exists() or not list(output.iterdir())
    return str(caught.value)


# ------------------------------------------------------------------------------------------------- the same functions


def test_a_first_stage_of_latent_diffusion_is_our_latent_vqgan(tmp_path: Path) -> None:
    source = saved(tmp_path / "model.ckpt", lightning(with_loss(first_stage().state_dict())))
    (converted,) = convert(source, tmp_path / "out", small())
    assert converted[:2] == ("latent_vqgan", tmp_path / "out" / "latent_vqgan")
    ours = vqgan_in(converted.folder)
    assert ours.config["scaling_factor"] == 1.0
    assert converted.num_parameters == ours.num_parameters()
    assert_same_vqgan(ours, first_stage())


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "inside its transformer"])
def test_taming_transformers_faces_are_our_hq_vqgan(tmp_path: Path, inside: bool) -> None:
    state = with_loss(faces().state_dict())
    if inside:
        state = {f"first_stage_model.{key}": value for key, value in state.items()}
        state |= {"transformer.blocks.0.attn.mask": torch.ones(1), "transformer.tok_emb.weight": torch.ones(2, 2)}
    (converted,) = convert(saved(tmp_path / "last.ckpt", lightning(state)), tmp_path / "out", small())
    assert converted.stage == "hq_vqgan"
    assert_same_vqgan(vqgan_in(converted.folder), faces())


@pytest.mark.parametrize(
    ("weights", "taken", "seed"), [(None, "ema", AVERAGE), ("ema", "ema", AVERAGE), ("raw", "raw", RAW)]
)
def test_a_latent_diffusion_model_is_our_prior_and_our_latent_vqgan(
    tmp_path: Path, weights: Any, taken: str, seed: int
) -> None:
    source = saved(tmp_path / "model.ckpt", lightning(ldm()))
    converted = convert(source, tmp_path / "out", small(), weights=weights)
    assert [(each.stage, each.weights) for each in converted] == [("latent_vqgan", "raw"), ("prior", taken)]
    assert_same_vqgan(vqgan_in(tmp_path / "out" / "latent_vqgan"), first_stage())
    assert_same_unet(unet_in(tmp_path / "out" / "prior"), unet(seed))


def test_the_average_of_a_first_stage_is_taken_unless_the_raw_weights_are_asked_for(tmp_path: Path) -> None:
    model = copy.deepcopy(first_stage())
    model.model_ema = reference.moving_average(model)
    average = reference.scramble(copy.deepcopy(first_stage()), 9)
    state = dict(model.state_dict())
    state |= {f"model_ema.{averaged_name(name)}": value for name, value in average.state_dict().items()}
    state["model_ema.lossdiscriminatormain0weight"] = torch.zeros(1)
    source = saved(tmp_path / "model.ckpt", state)
    for weights, expected in ((None, average), ("raw", first_stage())):
        (converted,) = convert(source, tmp_path / str(weights), small(), weights=cast(Any, weights))
        assert converted.weights == (weights or "ema")
        assert_same_vqgan(vqgan_in(converted.folder), expected)


def test_safetensors_and_plain_and_half_precision_states_give_the_same(tmp_path: Path) -> None:
    state = {key: value.half() for key, value in first_stage().state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    sources = [
        tmp_path / "model.safetensors",
        saved(tmp_path / "plain.pt", state),
        saved(tmp_path / "lightning.ckpt", lightning(state)),
    ]
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)  # before torch 1.6
    weights = []
    for number, source in enumerate([*sources, tmp_path / "old.pth"]):
        (converted,) = convert(source, tmp_path / str(number), small())
        weights.append(load_file(converted.folder / "diffusion_pytorch_model.safetensors"))
    assert all(value.dtype == torch.float32 for value in weights[0].values())
    for other in weights[1:]:
        assert tiny.differing(weights[0], other) == []
    assert torch.equal(weights[0]["encoder.conv_in.weight"], state["encoder.conv_in.weight"].float())


def test_a_scale_factor_in_the_checkpoint_is_the_latents_scaling_factor(tmp_path: Path) -> None:
    source = saved(tmp_path / "model.ckpt", ldm(scale_factor=torch.tensor(0.5)))
    convert(source, tmp_path / "own", small())
    convert(source, tmp_path / "given", small(), scaling_factor=2.0)
    assert vqgan_in(tmp_path / "own" / "latent_vqgan").config["scaling_factor"] == 0.5
    assert vqgan_in(tmp_path / "given" / "latent_vqgan").config["scaling_factor"] == 2.0
    assert_same_vqgan(vqgan_in(tmp_path / "own" / "latent_vqgan"), first_stage())


# --------------------------------------------------------------------------------------------------- diffusers folders


def hub_vqgan(**changes: Any) -> dict[str, Any]:
    return {
        "block_out_channels": [32, 64],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "layers_per_block": 2,
        "num_vq_embeddings": 64,
        **changes,
    }


def hub_unet(**changes: Any) -> dict[str, Any]:
    return {
        "sample_size": 8,
        "block_out_channels": [32, 64, 96],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": 32,
        **changes,
    }


@lru_cache
def hub_networks() -> tuple[VQModel, UNet2DModel]:
    """diffusers' own networks at random."""
    with tiny.seeded():
        return (
            reference.scramble(VQModel(**hub_vqgan()), 4).eval(),
            reference.scramble(UNet2DModel(**hub_unet()), 5).eval(),
        )


OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def old_names(state: State, convolutions: bool = False) -> State:
    """The attention's names of 2022; its weights may have been 1×1 convolutions."""
    renamed = {}
    for key, value in state.items():
        name = key
        for new, old in OLD.items():
            name = name.replace(f".{new}.", f".{old}.")
        renamed[name] = value[:, :, None, None] if convolutions and name != key and value.ndim == 2 else value
    return renamed


def hub_folder(
    folder: Path,
    rename: Callable[[State], State] = dict,
    binary: bool = True,
    vqgan_config: dict[str, Any] | None = None,
    unet_config: dict[str, Any] | None = None,
) -> Path:
    """A folder like CompVis/ldm-celebahq-256."""
    configs = {"vqvae": vqgan_config or hub_vqgan(), "unet": unet_config or hub_unet()}
    for (name, config), network in zip(configs.items(), hub_networks(), strict=True):
        (folder / name).mkdir(parents=True)
        config = {"_class_name": type(network).__name__, "_diffusers_version": "0.1.2", **config}
        (folder / name / "config.json").write_text(json.dumps(config), "utf-8")
        state = rename(network.state_dict())
        if binary:
            torch.save(state, folder / name / "diffusion_pytorch_model.bin")
        else:
            save_file(state, folder / name / "diffusion_pytorch_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("rename", "binary"),
    [(dict, False), (old_names, True), (lambda state: old_names(state, convolutions=True), True)],
    ids=["names of today, safetensors", "old names, pickle", "old names, convolutions"],
)
@torch.no_grad()
def test_a_diffusers_folder_becomes_the_same_networks(
    tmp_path: Path, rename: Callable[[State], State], binary: bool
) -> None:
    converted = convert(hub_folder(tmp_path / "hub", rename, binary), tmp_path / "out", small())
    assert [(each.stage, each.weights) for each in converted] == [("latent_vqgan", "published"), ("prior", "published")]
    vqgan, unet_ = vqgan_in(converted[0].folder), unet_in(converted[1].folder)
    their_vqgan, their_unet = hub_networks()
    assert vqgan.config["scaling_factor"] == 1.0
    assert unet_.config["sample_size"] == small().latent_side
    images, latents = tiny.normal(2, 3, 32, 32), tiny.normal(2, 3, 16, 16)
    assert torch.equal(vqgan.encode(images), their_vqgan.encode(images).latents)
    torch.testing.assert_close(vqgan.from_latents(latents), their_vqgan.decode(latents).sample, rtol=1e-5, atol=1e-5)
    timesteps = torch.tensor([3, 800])
    assert torch.equal(unet_(latents, timesteps).sample, their_unet(latents, timesteps).sample)


def test_a_folder_with_one_network_gives_that_one(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "hub")
    (folder / "vqvae").rename(tmp_path / "elsewhere")
    assert [each.stage for each in convert(folder, tmp_path / "out", small())] == ["prior"]


@pytest.mark.parametrize(
    ("unet_config", "expected"),
    [
        (hub_unet(norm_eps=1e-6), "norm_eps is 1e-06, expected 1e-05"),
        (hub_unet(freq_shift=1), "freq_shift is 1, expected 0"),
        (hub_unet(flip_sin_to_cos=False), "flip_sin_to_cos is False, expected True"),
        (hub_unet(attention_head_dim=8), "attention_head_dim is 8, expected 32"),
        (hub_unet(downsample_padding=0), "downsample_padding is 0, expected 1"),
    ],
)
def test_weights_that_would_be_another_function_here_are_refused(
    tmp_path: Path, unet_config: dict[str, Any], expected: str
) -> None:
    folder = hub_folder(tmp_path / "hub", unet_config=unet_config)
    text = refusal(folder, tmp_path / "out")
    assert expected in text
    assert "choose the preset" in text


def test_the_scaling_factor_that_diffusers_writes_by_itself_is_not_believed(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "hub", vqgan_config=hub_vqgan(scaling_factor=0.18215))
    assert "LDM's is 1: give the scaling factor" in refusal(folder, tmp_path / "out")
    convert(folder, tmp_path / "out", small(), scaling_factor=1.0)
    assert vqgan_in(tmp_path / "out" / "latent_vqgan").config["scaling_factor"] == 1.0


def test_a_parameter_under_its_old_and_its_new_name_is_refused(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "hub", lambda state: {**state, **old_names(state)})
    assert "is there twice, under its old name and its new" in refusal(folder, tmp_path / "out")


def test_a_folder_that_is_none_of_diffusers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    assert "expected vqvae/ or unet/" in refusal(tmp_path / "hub", tmp_path / "out")
    (tmp_path / "hub" / "unet").mkdir()
    assert "config.json cannot be read" in refusal(tmp_path / "hub", tmp_path / "out")
    (tmp_path / "hub" / "unet" / "config.json").write_text(json.dumps(hub_unet()), "utf-8")
    assert "expected diffusion_pytorch_model.safetensors or" in refusal(tmp_path / "hub", tmp_path / "out")


# ------------------------------------------------------------------------------------------------ every key, full size


@lru_cache
def full_size(build: Callable[[], Any]) -> State:
    """All keys and shapes of a published checkpoint, and no numbers but the noise schedule's."""
    with torch.device("meta"):
        model = build()
    return dict(model.state_dict())


def paper() -> Preset:
    return load_preset("paper_512")


@pytest.mark.parametrize(
    ("build", "kind", "tensors", "networks"),
    [
        (reference.vq_f4, "vq-f4", 260, {"latent_vqgan": (205, 55_322_782)}),
        (lambda: reference.vq_f4(ema=True), "vq-f4", 480, {"latent_vqgan": (205, 55_322_782)}),
        (reference.taming_faces, "taming-faces", 398, {"hq_vqgan": (343, 72_141_699)}),
        (reference.ldm_vq_4, "ldm-vq-4", 955, {"latent_vqgan": (205, 55_322_782), "prior": (432, 274_056_163)}),
    ],
    ids=["vq-f4", "vq-f4 with its average", "taming-faces", "ldm-vq-4"],
)
def test_every_key_of_the_published_checkpoints_finds_its_place(
    build: Callable[[], Any], kind: Any, tensors: int, networks: dict[str, tuple[int, int]]
) -> None:
    state = full_size(build)
    assert len(state) == tensors
    read = read_checkpoint(state, Path("model.ckpt"), paper(), kind, None, None)
    assert {each.stage: (len(each.network.state_dict()), each.network.num_parameters()) for each in read} == networks


def test_the_maps_take_every_key_once_and_only_queries_keys_and_values_share_one() -> None:
    preset = paper()
    with torch.device("meta"):
        our_unet = make_unet(preset.unet, 3, preset.latent_side)
        vqgans = [VQGAN.from_settings(preset.latent_vqgan), VQGAN.from_settings(preset.hq_vqgan)]
        theirs = [reference.vq_f4(loss=False), reference.taming_faces(loss=False)]
    for vqgan, other in zip(vqgans, theirs, strict=True):
        origins = compvis_vqgan(vqgan.state_dict(), len(vqgan.config["block_out_channels"]))
        assert len(keys_of(origins)) == len(origins)
        assert set(keys_of(origins)) == set(other.state_dict())
    origins = compvis_unet(our_unet.state_dict(), 2, preset.unet.attention_levels, 32)
    assert set(keys_of(origins)) == set(full_size(reference.ldm_unet))
    uses: dict[str, list[int | None]] = {}
    for origin in origins.values():
        uses.setdefault(origin.key, []).append(origin.part)
    assert all(parts == ([0, 1, 2] if ".qkv." in key else [None]) for key, parts in uses.items())
    assert len({averaged_name(key) for key in uses}) == len(uses) == 368  # names without dots stay different


def test_the_keys_of_the_folder_on_the_hub_find_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With old names; the configurations as published, but for what follows from diffusers' defaults."""
    configs = {
        "vqvae": {
            "block_out_channels": [128, 256, 512],
            "down_block_types": ["DownEncoderBlock2D"] * 3,
            "up_block_types": ["UpDecoderBlock2D"] * 3,
            "layers_per_block": 2,
            "num_vq_embeddings": 8192,
        },
        "unet": {"sample_size": 64, "attention_head_dim": 32},
    }
    states = {}
    for name, config in configs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config), "utf-8")
        (tmp_path / name / "diffusion_pytorch_model.bin").touch()
        with torch.device("meta"):
            network = {"vqvae": VQModel, "unet": UNet2DModel}[name](**config)
        states[name] = old_names(network.state_dict())
    monkeypatch.setattr("ldbfr.models.convert_diffusers.read_tensors", lambda file: states[file.parent.name])
    read = read_folder(tmp_path, paper(), None)
    assert [each.network.num_parameters() for each in read] == [55_322_782, 274_056_163]


def test_a_full_size_checkpoint_is_read_from_its_file(tmp_path: Path) -> None:
    """Its tensors share one number each, so that the file is small."""
    shapes = {key: value.shape for key, value in full_size(reference.ldm_vq_4).items()}
    state = {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}
    tensors = read_tensors(saved(tmp_path / "model.ckpt", lightning(state)))
    assert {key: value.shape for key, value in tensors.items()} == shapes


# ----------------------------------------------------------------------------------------------- what does not fit


def test_all_keys_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    state = ldm(
        **{
            "model.diffusion_model.out.2.bias": None,
            "model.diffusion_model.label_emb.weight": torch.zeros(10, 128),
            "model.diffusion_model.middle_block.1.qkv.weight": torch.zeros(96 * 3, 95, 1),
            "model.diffusion_model.out.0.bias": torch.zeros(32, dtype=torch.int64),
        }
    )
    text = refusal(saved(tmp_path / "model.ckpt", state), tmp_path / "out")
    assert "missing (1):\n    model.diffusion_model.out.2.bias" in text
    assert "unknown (1):\n    model.diffusion_model.label_emb.weight" in text
    assert "middle_block.1.qkv.weight: (288, 95, 1), expected (288, 96, 1)" in text
    assert "model.diffusion_model.out.0.bias: (32,) int64, expected (32,)" in text
    assert "model.ckpt as prior" in text


def test_a_long_list_is_counted(tmp_path: Path) -> None:
    state = {**first_stage().state_dict(), **{f"head.{number}": torch.zeros(1) for number in range(30)}}
    text = refusal(saved(tmp_path / "model.ckpt", state), tmp_path / "out")
    assert "unknown (30):" in text
    assert "… and 10 more" in text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"first_stage_model.encoder.extra": torch.zeros(1)}, "first_stage_model.encoder.extra"),
        ({"cond_stage_model.embedding.weight": torch.zeros(1)}, "cond_stage_model.embedding.weight"),
        ({"model_ema.diffusion_modelout2bias": None}, "missing (1):\n    model_ema.diffusion_modelout2bias"),
        ({"model_ema.diffusion_modelextra": torch.zeros(1)}, "model_ema.diffusion_modelextra"),
        ({"first_stage_model.quantize.embedding.weight": torch.zeros(32, 3)}, "(32, 3), expected (64, 3)"),
        ({"first_stage_model.quant_conv.weight": torch.full((3, 3, 1, 1), torch.nan)}, "NaN or infinite weights"),
    ],
)
def test_no_part_of_a_latent_diffusion_model_goes_unchecked(
    tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    assert expected in refusal(saved(tmp_path / "model.ckpt", ldm(**changes)), tmp_path / "out")


def test_weights_that_are_not_there_are_not_replaced_by_others(tmp_path: Path) -> None:
    state = ldm()
    last = {key: value for key, value in state.items() if not key.startswith("model_ema.")}
    average = {key: value for key, value in state.items() if not key.startswith("model.")}
    text = refusal(saved(tmp_path / "last.ckpt", last), tmp_path / "out", weights="ema")
    assert "no ema weights are in it, only the raw weights" in text
    text = refusal(saved(tmp_path / "average.ckpt", average), tmp_path / "out", weights="raw", kind="ldm-vq-4")
    assert "no raw weights are in it, only averaged weights" in text
    assert [each.weights for each in convert(tmp_path / "last.ckpt", tmp_path / "out", small())] == ["raw", "raw"]


def test_another_noise_schedule_is_refused(tmp_path: Path) -> None:
    model = reference.LatentDiffusion(unet(RAW), first_stage(), None, beta_start=0.00085, beta_end=0.012)
    source = saved(tmp_path / "model.ckpt", dict(model.state_dict()))
    assert "1000 betas from 0.00085 to 0.012" in refusal(source, tmp_path / "out")
    convert(source, tmp_path / "out", small("diffusion={beta_start=0.00085,beta_end=0.012}"))


@pytest.mark.parametrize(
    ("override", "name"),
    [("latent_vqgan.norm_num_groups=16", "norm_num_groups is 16"), ("unet.attention_head_dim=16", "head_dim is 16")],
)
def test_a_preset_in_which_the_weights_would_be_another_function_is_refused(
    tmp_path: Path, override: str, name: str
) -> None:
    text = refusal(saved(tmp_path / "model.ckpt", ldm()), tmp_path / "out", override)
    assert f"{name}, expected CompVis's 32" in text


def test_a_checkpoint_of_another_size_is_refused_with_both_shapes(tmp_path: Path) -> None:
    source = saved(tmp_path / "model.ckpt", dict(first_stage().state_dict()))
    text = refusal(source, tmp_path / "out", "latent_vqgan.num_codes=128")
    assert "codebook of shape (64, 3), preset tiny expects vq-f4 (128, 3), taming-faces (32, 16)" in text
    text = refusal(source, tmp_path / "out", "latent_vqgan.num_codes=32", "latent_vqgan.code_dim=16")
    assert "choose the preset with its shape" in text
    source = saved(tmp_path / "last.ckpt", dict(faces().state_dict()))
    text = refusal(source, tmp_path / "out", "latent_vqgan.num_codes=32", "latent_vqgan.code_dim=16")
    assert "name the kind" in text


def test_a_kind_that_is_not_the_source_s_is_refused(tmp_path: Path) -> None:
    source = saved(tmp_path / "model.ckpt", dict(first_stage().state_dict()))
    assert "missing" in refusal(source, tmp_path / "out", kind="taming-faces")
    text = refusal(source, tmp_path / "out", kind="ldm-vq-4")
    assert "  missing (" in text
    assert "  unknown (" in text
    assert "is no diffusers folder" in refusal(source, tmp_path / "out", kind="diffusers")
    with pytest.raises(ConfigError, match="is a folder, a vq-f4 comes as a file"):
        convert(tmp_path, tmp_path / "out", small(), kind="vq-f4")


def test_arguments_that_say_nothing_about_a_source_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one set of weights"):
        convert(hub_folder(tmp_path / "hub"), tmp_path / "out", small(), weights="ema")
    source = saved(tmp_path / "last.ckpt", dict(faces().state_dict()))
    with pytest.raises(ConfigError, match="no latents"):
        convert(source, tmp_path / "out", small(), scaling_factor=1.0)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"a": torch.zeros(1)}, "no VQGAN and no latent diffusion model"),
        ({"state_dict": {"a": 3}}, "'a' is int and no tensor"),
        ([torch.zeros(1)], "holds no state dict but list"),
        ({}, "holds no state dict but dict"),
    ],
)
def test_what_is_no_checkpoint_of_a_network_is_refused(tmp_path: Path, content: Any, expected: str) -> None:
    assert expected in refusal(saved(tmp_path / "model.ckpt", content), tmp_path / "out")


def test_missing_and_damaged_files_are_refused(tmp_path: Path) -> None:
    assert "no checkpoint" in refusal(tmp_path / "nowhere.ckpt", tmp_path / "out")
    whole = saved(tmp_path / "model.ckpt", dict(first_stage().state_dict())).read_bytes()
    for name, data in (("cut.ckpt", whole[: len(whole) // 2]), ("empty.ckpt", b""), ("text.ckpt", b"<html>404</html>")):
        (tmp_path / name).write_bytes(data)
        text = refusal(tmp_path / name, tmp_path / "out")
        assert "cannot be read as a checkpoint" in text
        assert "download it again" in text
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    assert "no whole safetensors file" in refusal(tmp_path / "model.safetensors", tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------- pickles


class Command:
    """What an attacker puts into a pickle: it runs when it is read."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.arguments


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("function", [os.system, eval, __import__], ids=["os.system", "eval", "import"])
def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(
    tmp_path: Path, function: Callable[..., Any], zipped: bool
) -> None:
    trace = tmp_path / "trace"
    argument = {os.system: f"touch {trace}", eval: f"open({str(trace)!r}, 'w')"}.get(function, "antigravity")
    source = tmp_path / "model.ckpt"
    content = lightning(dict(first_stage().state_dict()), callbacks=Command(function, argument))
    torch.save(content, source, _use_new_zipfile_serialization=zipped)
    text = refusal(source, tmp_path / "out")
    assert function.__name__ in text
    assert "nothing in a checkpoint is ever run here" in text
    assert "machine that you can lose" in text
    assert not trace.exists()
    assert "antigravity" not in sys.modules


def test_the_attack_of_these_tests_is_one() -> None:
    assert pickle.loads(pickle.dumps(Command(eval, "6 * 7"))) == 42


def foreign_class(patch: pytest.MonkeyPatch, module: str, name: str) -> type:
    """A class of a library that is there only while a checkpoint is written."""
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        patch.setitem(sys.modules, ".".join(parts[:depth]), types.ModuleType(".".join(parts[:depth])))
    one = type(name, (), {"__module__": module})
    setattr(sys.modules[module], name, one)
    return one


def test_lightning_s_own_objects_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Published checkpoints hold the class of a callback as a key, and omegaconf's objects as hyperparameters."""
    with monkeypatch.context() as patch:
        callback = foreign_class(patch, "pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
        settings = foreign_class(patch, "omegaconf.dictconfig", "DictConfig")()
        settings.content = {"lr": 1e-6}
        content = lightning(
            dict(first_stage().state_dict()),
            callbacks={callback: {"best_model_path": Path("logs/last.ckpt"), "best_model_score": torch.tensor(0.1)}},
            hyper_parameters={"config": settings, "type": dict},
        )
        source = saved(tmp_path / "model.ckpt", content)
    allowed, imported = set(torch.serialization.get_safe_globals()), set(sys.modules)
    (converted,) = convert(source, tmp_path / "out", small())
    assert_same_vqgan(vqgan_in(converted.folder), first_stage())
    assert set(torch.serialization.get_safe_globals()) == allowed
    assert not [name for name in set(sys.modules) - imported if name.startswith(("pytorch_lightning", "omegaconf"))]


def test_objects_of_other_libraries_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        model = foreign_class(patch, "ldm.models.autoencoder", "VQModelInterface")()
        content = lightning(dict(first_stage().state_dict()), model=model)
        source = saved(tmp_path / "model.ckpt", content)
    text = refusal(source, tmp_path / "out")
    assert "holds ldm.models.autoencoder.VQModelInterface, which is no tensor" in text
    assert "weights_only=False" in text
    assert "convert model.safetensors" in text


# ---------------------------------------------------------------------------------------------------------- writing


def test_the_manifest_says_what_a_network_was_made_from(tmp_path: Path) -> None:
    source = saved(tmp_path / "model.ckpt", ldm())
    for converted in convert(source, tmp_path / "out", small()):
        manifest = read_manifest(converted.folder)
        assert set(manifest["files"]) == {"config.json", "diffusion_pytorch_model.safetensors"}
        assert manifest["source"] == {"kind": "ldm-vq-4", "file": "model.ckpt", "sha256": sha256_of(source)}
        assert (manifest["stage"], manifest["weights"]) == (converted.stage, converted.weights)
        assert manifest["preset"] == "tiny"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["latent_vqgan", "prior"]


@pytest.mark.parametrize("stage", ["hq_vqgan", "latent_vqgan", "prior"])
def test_a_training_stage_starts_from_what_was_converted(tmp_path: Path, stage: str) -> None:
    state = dict(faces().state_dict()) if stage == "hq_vqgan" else ldm(scale_factor=torch.tensor(0.5))
    convert(saved(tmp_path / "model.ckpt", state), tmp_path, small())
    fresh = tiny.new_stage(stage, *SMALL)
    network = load_network(fresh.network_class, tmp_path / stage)
    fresh.start_from(network)
    assert tiny.differing(tiny.snapshot(fresh.network), tiny.snapshot(network)) == []
    if stage == "latent_vqgan":
        assert fresh.network.config["scaling_factor"] == 0.5


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("step", ["write_manifest", "os.replace"])
def test_an_interrupted_conversion_leaves_nothing_and_can_be_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Any, step: str
) -> None:
    source = saved(tmp_path / "model.ckpt", dict(first_stage().state_dict()))
    seen: list[str] = []

    def fail(*arguments: Any) -> None:
        seen.extend(path.name for path in (tmp_path / "out").iterdir())
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(convert_module, "write_manifest", fail) if step == "write_manifest" else patch.setattr(
            convert_module.os, "replace", fail
        )
        with pytest.raises(KeyboardInterrupt if failure is KeyboardInterrupt else StorageError):
            convert(source, tmp_path / "out", small())
    assert seen
    assert "latent_vqgan" not in seen  # the name is taken last
    assert list((tmp_path / "out").iterdir()) == []
    convert(source, tmp_path / "out", small())
    assert read_manifest(tmp_path / "out" / "latent_vqgan")


def test_a_place_that_cannot_be_written_is_an_error_in_words(tmp_path: Path) -> None:
    source = saved(tmp_path / "model.ckpt", dict(first_stage().state_dict()))
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot write .*latent_vqgan"):
        convert(source, tmp_path / "file" / "out", small())


def test_converting_again_changes_nothing_and_something_else_there_is_kept(tmp_path: Path) -> None:
    source = saved(tmp_path / "model.ckpt", ldm())
    convert(source, tmp_path / "out", small())
    written = tmp_path / "out" / "prior" / "manifest.json"
    before = written.stat().st_mtime_ns
    assert len(convert(source, tmp_path / "out", small())) == 2
    assert written.stat().st_mtime_ns == before
    with pytest.raises(WeightsError, match=r"prior holds something else already"):
        convert(source, tmp_path / "out", small(), weights="raw")
    tiny.flip_byte(tmp_path / "out" / "prior" / "diffusion_pytorch_model.safetensors", 5000)
    with pytest.raises(WeightsError, match="was changed"):
        convert(source, tmp_path / "out", small())


def test_nothing_is_written_where_one_of_two_networks_has_no_place(tmp_path: Path) -> None:
    (tmp_path / "out" / "prior").mkdir(parents=True)
    (tmp_path / "out" / "prior" / "notes.txt").touch()
    with pytest.raises(WeightsError, match="holds something else already"):
        convert(saved(tmp_path / "model.ckpt", ldm()), tmp_path / "out", small())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["prior"]
