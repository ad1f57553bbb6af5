"""Presets load, overrides reach their place, and what does not fit together is refused by name."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ldbfr.config import Preset, apply_override, load_preset, preset_names
from ldbfr.errors import ConfigError
from tests import tiny


def test_the_presets_of_the_design_are_there() -> None:
    assert {"tiny", "faces_64", "faces_128", "paper_512"} <= set(preset_names())


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_bears_its_file_s_name(name: str) -> None:
    preset = load_preset(name)
    assert preset.name == name
    assert preset.latent_side * preset.latent_vqgan.downsampling == preset.side
    assert preset.feature_side * preset.hq_vqgan.downsampling == preset.side


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("training.dc_vqr.steps=123", "training.dc_vqr.steps", 123),
        ("training.prior.learning_rate=1e-5", "training.prior.learning_rate", 1e-5),
        ("training.prior.betas=[0.5, 0.9]", "training.prior.betas", (0.5, 0.9)),
        ("training.hq_vqgan.flip=false", "training.hq_vqgan.flip", False),
        ("injection.ablation=A", "injection.ablation", "A"),
        ('injection.ablation="B"', "injection.ablation", "B"),
        ("training.prior.min_snr_gamma=none", "training.prior.min_snr_gamma", None),
        ("training.prior.timestep_power=2", "training.prior.timestep_power", 2.0),
        ("training.enhancer.min_snr_gamma=5", "training.enhancer.min_snr_gamma", 5.0),
        ("attention.channel=false", "attention.channel", False),
        ("training.hq_vqgan.reconstruction.l2=2.5", "training.hq_vqgan.reconstruction.l2", 2.5),
    ],
)
def test_an_override_sets_its_value_and_nothing_else(override: str, path: str, value: object) -> None:
    before, after = flat(load_preset("tiny")), flat(load_preset("tiny", [override]))
    assert after.pop(path) == value
    assert path in before
    before.pop(path)
    assert after == before


def flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Settings as {dotted.path: value}."""
    found: dict[str, Any] = {}
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if hasattr(type(value), "model_fields"):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def test_the_last_of_two_overrides_counts() -> None:
    assert load_preset("tiny", ["training.seed=1", "training.seed=2"]).training.seed == 2


# fmt: off
WRONG = [
    # override, what the error's text must say
    ("training.dc_vqr.stepz=3",                 ["training.dc_vqr.stepz"]),
    ("colour=3",                                ["colour"]),
    ("training.dc_vqr.steps=many",              ["training.dc_vqr.steps", "integer"]),
    ("training.dc_vqr.steps=0",                 ["training.dc_vqr.steps", "greater than 0"]),
    ("training.dc_vqr.learning_rate=-1",        ["training.dc_vqr.learning_rate", "greater than 0"]),
    ("training.dc_vqr.ema_decay=1",             ["training.dc_vqr.ema_decay", "less than 1"]),
    ("training.dc_vqr.precision=fp8",           ["training.dc_vqr.precision", "'bf16'", "'fp32'"]),
    ("training.enhancer.condition_dropout=1.5", ["training.enhancer.condition_dropout"]),
    ("injection.ablation=E",                    ["injection.ablation", "'A'", "'D'"]),
    ("sampling.scheduler=euler",                ["sampling.scheduler", "'dpm_solver'", "'ddpm'"]),
    ("sampling.num_inference_steps=0",          ["sampling.num_inference_steps"]),
    ("sampling.condition_scale=-0.5",           ["sampling.condition_scale"]),
    ("diffusion.beta_end=2",                    ["diffusion.beta_end", "less than 1"]),
    ("template=square",                         ["template", "'ffhq'", "'tight'"]),
    ("hq_vqgan.block_out_channels=[]",          ["hq_vqgan.block_out_channels"]),
    ("side.width=3",                            ["side", "not a table"]),
    ("training.dc_vqr.steps",                   ["training.dc_vqr.steps", "must look like"]),
    ("=3",                                      ["must look like"]),
    # numbers that do not fit together
    ("side=30",                                 ["side 30", "hq_vqgan", "downsampling 4"]),
    ("latent_vqgan.block_out_channels=[8,8,8,8,8,8,8]", ["side 32", "latent_vqgan", "downsampling 64"]),
    ("hq_vqgan.block_out_channels=[8,16,18]",   ["hq_vqgan.block_out_channels", "18", "norm_num_groups 4"]),
    ("latent_vqgan.norm_num_groups=3",          ["latent_vqgan.block_out_channels", "8", "norm_num_groups 3"]),
    ("unet.norm_num_groups=5",                  ["unet.block_out_channels", "16", "norm_num_groups 5"]),
    ("unet.attention_levels=[true]",            ["unet.attention_levels", "1 entries", "2 levels"]),
    ("unet.block_out_channels=[8,8,8,8,8,8]",   ["unet.attention_levels", "2 entries", "6 levels"]),
    ("unet.attention_head_dim=7",               ["unet level 1", "32", "attention_head_dim"]),
    ("injection.head_dim=12",                   ["unet level 0", "16", "injection.head_dim"]),
    ("hq_vqgan.code_dim=6",                     ["hq_vqgan.code_dim 6", "4", "pixel-shuffle"]),
    ("sampling.start_step=1001",                ["sampling.start_step 1001", "num_train_timesteps 1000"]),
]
# fmt: on


@pytest.mark.parametrize(("override", "texts"), WRONG, ids=[override for override, _ in WRONG])
def test_a_setting_that_cannot_be_is_refused_by_name(override: str, texts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_preset("tiny", [override])
    for text in texts:
        assert text in str(caught.value)


def test_latents_that_cannot_be_halved_often_enough_are_refused() -> None:
    with pytest.raises(ConfigError, match="latents of side 16 cannot be halved 5 times"):
        load_preset(
            "tiny",
            ["unet.block_out_channels=[8,8,8,8,8,8]", "unet.attention_levels=[false,false,false,false,false,false]"],
        )


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["sampling.num_inference_steps=600"], id="more sampling steps than start_step"),
        pytest.param(["diffusion.beta_start=0.5", "diffusion.beta_end=0.1"], id="noise that shrinks"),
        pytest.param(["training.prior.betas=[0.9, 1.5]"], id="beta above 1"),
    ],
)
def test_numbers_that_would_fail_only_later_are_refused_when_the_preset_loads(overrides: list[str]) -> None:
    with pytest.raises(ConfigError):
        load_preset("tiny", overrides)


def test_several_wrong_settings_are_all_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        load_preset("tiny", ["training.dc_vqr.steps=many", "training.prior.precision=fp8"])
    assert "training.dc_vqr.steps" in str(caught.value)
    assert "training.prior.precision" in str(caught.value)


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no preset 'huge'.*faces_64.*paper_512.*tiny.*\.toml"):
        load_preset("huge")


def test_a_preset_is_read_from_a_file_of_one_s_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    source = Path(sys.modules["ldbfr.config"].__file__ or "").parent / "presets" / "tiny.toml"
    file.write_text(source.read_text("utf-8").replace('name = "tiny"', 'name = "mine"'), "utf-8")
    assert load_preset(str(file)) == load_preset("tiny").model_copy(update={"name": "mine"})


@pytest.mark.parametrize("content", [b"side = = 3", b'name = "\xff\xfe"'], ids=["no TOML", "no UTF-8"])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "broken.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"broken\.toml"):
        load_preset(str(file))


def test_settings_cannot_be_changed_after_they_were_checked() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        tiny.preset().side = 64


def test_an_override_of_a_new_table_creates_it() -> None:
    values: dict[str, Any] = {}
    apply_override(values, "sampling.start_step=7")
    assert values == {"sampling": {"start_step": 7}}


def test_the_digest_is_equal_for_equal_settings_and_differs_for_others() -> None:
    preset = load_preset("tiny")
    again = Preset.model_validate(json.loads(preset.model_dump_json()))
    assert again.digest() == preset.digest()
    others = [load_preset("tiny", [override]).digest() for override in ("training.seed=1", "attention.self_logit=15")]
    assert len({preset.digest(), *others}) == 3


def test_the_digest_is_the_same_in_another_process() -> None:
    code = "from ldbfr.config import load_preset; print(load_preset('tiny').digest())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == load_preset("tiny").digest()
