"""The loop's promises: exact resume, the same gradient on any number of workers, EMA, and stopping in time."""

import itertools
import json
import logging
import math
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldbfr.data.sampler import Batch
from ldbfr.errors import ConfigError, StorageError, WeightsError
from ldbfr.storage import write_bytes
from ldbfr.training.checkpoint import checkpoint_folders, latest_checkpoint, read_state, read_training
from ldbfr.training.loop import Trainer, TrainingError, emulates_bf16, learning_rate
from ldbfr.training.run import finished as run_finished
from ldbfr.training.run import load_stage_network, train_run
from ldbfr.training.runtime import SingleProcess
from ldbfr.training.scores import best_step, result_uri
from ldbfr.training.stages import STAGE_NAMES, PriorStage
from ldbfr.weights import PRESET_FILE, read_manifest
from tests import tiny
from tests.tiny import Worker

PLAIN = "training.hq_vqgan.reconstruction.adversarial=0"


def state_of(trainer: Trainer) -> dict[str, Any]:
    """Everything that the next step depends on, flat."""
    state: dict[str, Any] = {f"network.{key}": value for key, value in tiny.snapshot(trainer.stage.network).items()}
    state |= {f"ema.{number}": value for number, value in enumerate(trainer.ema.shadow_params)}
    state["ema.step"] = trainer.ema.optimization_step
    for name, optimizer in trainer.optimizers.items():
        for number, entry in optimizer.state_dict()["state"].items():
            state |= {f"{name}.{number}.{key}": value for key, value in entry.items()}
    for name, module in trainer.stage.extras().items():
        state |= {f"{name}.{key}": value for key, value in tiny.snapshot(module).items()}
    return state


def folder_of(trainer: Trainer) -> Path:
    """RUN/<stage>."""
    return Path(trainer.stage_uri)


def trained(trainer: Trainer) -> Path:
    """Train, and give the newest checkpoint."""
    step = trainer.train()
    checkpoint = latest_checkpoint(folder_of(trainer))
    assert checkpoint is not None
    assert read_state(checkpoint)["step"] == step
    return checkpoint


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    wrong = [
        key
        for key, value in one.items()
        if not (torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key])
    ]
    assert wrong == []


# -------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("name", STAGE_NAMES)
def test_four_steps_are_two_a_stop_and_two_more_bit_for_bit(tmp_path: Path, name: str) -> None:
    through = tiny.new_trainer(tmp_path / "through", name)
    whole = trained(through)

    stopped = tiny.new_trainer(tmp_path / "halves", name, runtime=Worker(stop_after=2))
    assert stopped.train() == 2
    resumed = tiny.new_trainer(tmp_path / "halves", name, noise_seed=2)  # all that counts is in the checkpoint
    halves = trained(resumed)

    assert (through.step, stopped.step, resumed.step) == (4, 2, 4)
    assert_same(state_of(through), state_of(resumed))
    files, others = (read_manifest(folder)["files"] for folder in (whole, halves))
    saved = [file for file in files if not file.startswith("training")]
    assert {file: files[file] for file in saved} == {file: others[file] for file in saved}


def test_a_stop_between_checkpoints_leaves_one_of_its_own(tmp_path: Path) -> None:
    trainer = tiny.new_trainer(tmp_path, "prior", runtime=Worker(stop_after=1))
    assert trainer.train() == 1
    resumed = tiny.new_trainer(tmp_path, "prior")
    assert resumed.train() == 4
    through = tiny.new_trainer(tmp_path / "through", "prior")
    through.train()
    assert_same(state_of(through), state_of(resumed))


def test_a_finished_run_that_is_run_again_does_nothing(tmp_path: Path) -> None:
    tiny.new_trainer(tmp_path, "prior").train()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    worker = Worker()
    again = tiny.new_trainer(tmp_path, "prior", runtime=worker)
    assert again.train() == 4
    assert worker.reports == []
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_how_often_something_is_kept_may_change_between_a_run_and_its_continuation(tmp_path: Path) -> None:
    tiny.new_trainer(tmp_path, "prior", runtime=Worker(stop_after=2)).train()
    changes = [f"training.prior.{key}" for key in ("checkpoint_every=3", "log_every=1", "images_every=2")]
    assert tiny.new_trainer(tmp_path, "prior", *changes, "training.prior.keep_checkpoints=5").train()


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("training.prior.learning_rate=0.5", "learning_rate: 0.001 there, 0.5 now"),
        ("training.prior.batch_size=2", "batch_size: 4 there, 2 now"),
        ("training.prior.steps=9", "steps: 4 there, 9 now"),
        ("training.seed=7", "seed: 0 there, 7 now"),
        ("diffusion.beta_end=0.02", "beta_end"),
        ("unet.layers_per_block=2", "layers_per_block"),
        ("latent_vqgan.code_dim=4", "code_dim"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused_with_the_difference(
    tmp_path: Path, override: str, text: str
) -> None:
    tiny.new_trainer(tmp_path, "prior", runtime=Worker(stop_after=2)).train()
    with pytest.raises(WeightsError) as caught:
        tiny.new_trainer(tmp_path, "prior", override).train()
    assert text in str(caught.value)
    assert "--run" in str(caught.value)


def test_a_checkpoint_on_other_upstream_networks_is_refused(tmp_path: Path) -> None:
    trainer = tiny.new_trainer(tmp_path, "prior", runtime=Worker(stop_after=2))
    trainer.upstream = {"latent_vqgan": "aaa"}
    trainer.train()
    other = tiny.new_trainer(tmp_path, "prior")
    other.upstream = {"latent_vqgan": "bbb"}
    with pytest.raises(WeightsError, match="upstream latent_vqgan: aaa there, bbb now"):
        other.train()


def test_a_damaged_newest_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    through = tiny.new_trainer(tmp_path, "prior")
    newest = trained(through)
    file = newest / "network" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    again = tiny.new_trainer(tmp_path, "prior", noise_seed=3)
    with caplog.at_level(logging.WARNING):
        again.resume()
    assert again.step == 2
    assert str(file) in caplog.text
    assert again.train() == 4
    assert_same(state_of(through), state_of(again))
    read_manifest(newest)


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    overrides = [f"training.prior.{key}" for key in ("steps=6", "checkpoint_every=1", "keep_checkpoints=2")]
    trainer = tiny.new_trainer(tmp_path, "prior", *overrides)
    trainer.train()
    assert [folder.name for folder in checkpoint_folders(folder_of(trainer))] == ["step-00000006", "step-00000005"]
    assert sorted(path.name for path in (folder_of(trainer) / "checkpoints").iterdir()) == [
        "step-00000005",
        "step-00000006",
    ]


# ------------------------------------------------------------------------------------------------------------- workers


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", STAGE_NAMES)
def test_workers_gradients_averaged_are_the_gradient_of_one(tmp_path: Path, name: str, world_size: int) -> None:
    """Three workers share four samples unevenly; the average is what DDP makes of the workers' gradients."""

    def gradient(rank: int, size: int) -> Tensor:
        trainer = tiny.new_trainer(tmp_path, name, PLAIN, runtime=Worker(rank, size))
        batch = trainer.sampler.batch(0, rank, size)
        trainer.backward("generator", batch, len(batch) / trainer.settings.batch_size, last=True)
        return torch.cat([(p.grad if p.grad is not None else 0 * p).flatten() for p in trainer.groups["generator"]])

    alone = gradient(0, 1)
    together = torch.stack([gradient(rank, world_size) for rank in range(world_size)]).mean(dim=0)
    assert alone.abs().max() > 0
    assert (together - alone).abs().max() < 1e-5 * max(1.0, alone.abs().max().item())


def test_the_workers_losses_add_up_to_those_of_one(tmp_path: Path) -> None:
    """What is summed over the workers is each one's share: here of three uneven ones."""

    class OneOfThree(Worker):
        def sum(self, values: Tensor) -> Tensor:
            shares.append(values)
            return values

    shares: list[Tensor] = []
    alone = tiny.new_trainer(tmp_path, "prior")
    loss = alone.optimize(alone.sampler.batch(0))["loss"]
    for rank in range(3):
        trainer = tiny.new_trainer(tmp_path, "prior", runtime=OneOfThree(rank, 3))
        trainer.optimize(trainer.sampler.batch(0, rank, 3))
    assert sum(share[0].item() for share in shares) == pytest.approx(loss, rel=1e-4)


def test_more_workers_than_samples_are_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size"):
        tiny.new_trainer(tmp_path, "prior", runtime=Worker(4, 5))


# --------------------------------------------------------------------------------------------- learning rate, EMA, bf16


def test_the_learning_rate_warms_up_linearly_and_then_stays() -> None:
    settings = tiny.preset("training.prior.warmup_steps=4", "training.prior.steps=10").training.prior
    assert [learning_rate(settings, step) for step in range(6)] == pytest.approx(
        [settings.learning_rate * share for share in (0.25, 0.5, 0.75, 1, 1, 1)]
    )


def test_the_cosine_falls_to_a_hundredth() -> None:
    settings = tiny.preset("training.prior.decay=cosine", "training.prior.steps=100").training.prior
    rates = [learning_rate(settings, step) / settings.learning_rate for step in range(101)]
    assert rates[0] == 1
    assert rates[50] == pytest.approx(0.505)
    assert rates[100] == pytest.approx(0.01)
    assert all(late < early for early, late in itertools.pairwise(rates))


def test_the_optimiser_gets_the_step_s_learning_rate(tmp_path: Path) -> None:
    worker = Worker()
    trainer = tiny.new_trainer(tmp_path, "prior", "training.prior.warmup_steps=3", runtime=worker)
    trainer.train()
    rates = [report["learning_rate"] for report in worker.reports]
    assert rates == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3])
    assert trainer.optimizers["generator"].param_groups[0]["lr"] == pytest.approx(rates[-1])


@pytest.mark.parametrize("name", STAGE_NAMES)
def test_the_averaged_weights_follow_the_law_of_ema(tmp_path: Path, name: str) -> None:
    """shadow ← d shadow + (1 - d) θ with d = min(decay, 1 - k^(-2/3)) at the k-th step; also while a GAN is trained."""

    class Watching(Worker):
        def report(self, step: int, metrics: dict[str, float]) -> None:
            super().report(step, metrics)
            seen.append([p.detach().clone() for p in trainer.groups["generator"]])

    seen: list[list[Tensor]] = []
    steps, decay = 6, 0.6
    trainer = tiny.new_trainer(
        tmp_path, name, f"training.{name}.steps={steps}", f"training.{name}.ema_decay={decay}", runtime=Watching()
    )
    expected = [p.detach().clone() for p in trainer.groups["generator"]]
    trainer.train()
    for number, parameters in enumerate(seen, start=1):
        kept = min(decay, 1 - number ** (-2 / 3))
        expected = [kept * old + (1 - kept) * new for old, new in zip(expected, parameters, strict=True)]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(trainer.ema.shadow_params, expected, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(trainer.ema.shadow_params, seen[-1], strict=True))


def test_a_checkpoint_holds_the_network_as_trained_and_averaged(tmp_path: Path) -> None:
    trainer = tiny.new_trainer(tmp_path, "prior")
    checkpoint = trained(trainer)
    as_trained, averaged = (
        dict(PriorStage.network_class.from_pretrained(checkpoint / part, low_cpu_mem_usage=False).named_parameters())
        for part in ("network", "ema")
    )
    for (name, parameter), shadow in zip(
        trainer.stage.network.named_parameters(), trainer.ema.shadow_params, strict=True
    ):
        assert torch.equal(as_trained[name], parameter)
        assert torch.equal(averaged[name], shadow)


def test_bfloat16_trains_with_weights_and_latents_in_full_precision(tmp_path: Path) -> None:
    trainer = tiny.new_trainer(tmp_path, "enhancer", "training.enhancer.precision=bf16")
    before = tiny.snapshot(trainer.stage.network)
    trainer.train()
    assert {p.dtype for p in trainer.stage.network.parameters()} == {torch.float32}
    assert tiny.differing(before, tiny.snapshot(trainer.stage.network)) != []


@pytest.mark.parametrize(("precision", "emulated", "told"), [("bf16", True, 1), ("bf16", False, 0), ("fp32", True, 0)])
def test_who_trains_in_bfloat16_where_it_is_slow_is_told_so(
    precision: str,
    emulated: bool,
    told: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert isinstance(emulates_bf16(torch.device("cpu")), bool)
    assert not emulates_bf16(torch.device("meta"))
    monkeypatch.setattr("ldbfr.training.loop.emulates_bf16", lambda device: emulated)
    tiny.new_trainer(tmp_path, "prior", f"training.prior.precision={precision}").warn_of_emulation()
    said = [text for text in caplog.messages if "precision=fp32" in text]
    assert len(said) == told, said


def test_gradients_are_clipped(tmp_path: Path) -> None:
    trainer = tiny.new_trainer(tmp_path, "prior", "training.prior.clip_norm=0.001")
    norm = trainer.optimize(trainer.sampler.batch(0))["gradient_norm"]
    clipped = torch.cat([p.grad.flatten() for p in trainer.groups["generator"] if p.grad is not None]).norm().item()
    assert norm > 0.001
    assert clipped == pytest.approx(0.001, rel=1e-2)


# ---------------------------------------------------------------------------------------------------------- no number


class BreaksAtStep(PriorStage):
    """The prior with a loss, or only a gradient, that is no number at one step."""

    def __init__(self, step: int, what: str) -> None:
        with tiny.seeded():
            super().__init__(tiny.preset(), tiny.networks())
        self.bad_step, self.what = step, what

    def forward(self, objective: str, batch: Batch, step: int) -> dict[str, Tensor]:
        losses = super().forward(objective, batch, step)
        if step == self.bad_step and self.what == "loss":
            losses["loss"] = losses["loss"] * math.inf
        elif step == self.bad_step:  # √x at 0: the value is 0, the slope infinite
            losses["loss"] = losses["loss"] + (0 * self.unet.conv_in.weight.sum()).sqrt()
        return losses


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_no_number_stops_training_before_it_reaches_the_weights(tmp_path: Path, what: str) -> None:
    trainer = tiny.new_trainer(tmp_path, "prior", stage=BreaksAtStep(3, what))
    with pytest.raises(TrainingError, match=rf"stage prior, step 3: .*{what}.* is not finite.*learning_rate"):
        trainer.train()
    assert all(p.isfinite().all() for p in trainer.stage.network.parameters())
    checkpoint = latest_checkpoint(folder_of(trainer))
    assert checkpoint is not None
    assert read_state(checkpoint)["step"] == 2
    healthy = tiny.new_trainer(tmp_path, "prior")
    assert healthy.train() == 4


# ------------------------------------------------------------------------------------------------------ the whole run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of all five stages, stopped once on the way."""
    run, faces = tmp_path_factory.mktemp("run"), tiny.face_images()
    assert not train_run(tiny.preset(), STAGE_NAMES, faces, faces, run, Worker(stop_after=6))
    assert [done(run, name) for name in STAGE_NAMES] == [True, False, False, False, False]
    assert train_run(tiny.preset(), STAGE_NAMES, faces, faces, run, Worker())
    return run


def done(run: Path, name: str) -> bool:
    checkpoint = latest_checkpoint(run / name)
    return checkpoint is not None and read_state(checkpoint)["step"] == 4


def test_five_stages_follow_each_other_and_are_passed_by_when_finished(finished: Path) -> None:
    worker, faces = Worker(), tiny.face_images()
    assert train_run(tiny.preset(), STAGE_NAMES, faces, faces, finished, worker)
    assert worker.reports == []
    assert all(done(finished, name) for name in STAGE_NAMES)
    assert json.loads((finished / PRESET_FILE).read_text()) == tiny.preset().model_dump(mode="json")


def test_later_stages_stand_on_the_averaged_networks_of_the_earlier(finished: Path) -> None:
    for name, upstream in (("dc_vqr", ["hq_vqgan"]), ("enhancer", ["latent_vqgan", "dc_vqr", "prior"])):
        state = read_state(finished / name / "checkpoints" / "step-00000004")
        digests = {key: load_stage_network(finished, key, tiny.preset())[1] for key in upstream}
        assert state["upstream"] == digests | {"data": tiny.face_images().digest}


def test_the_latents_of_a_finished_run_have_deviation_one(finished: Path) -> None:
    network: Any = load_stage_network(finished, "latent_vqgan", tiny.preset())[0]
    assert network.config["scaling_factor"] != 1.0
    with torch.no_grad():
        assert network.to_latents(tiny.lq_batch(8)).std().item() == pytest.approx(1, rel=0.02)


def test_pictures_and_logs_are_kept(finished: Path) -> None:
    for name in STAGE_NAMES:
        assert [path.name for path in (finished / name / "images").iterdir()] == ["step-00000004.png"]
        assert list((finished / name / "tensorboard").iterdir())


def test_a_checkpoint_loads_without_running_code(finished: Path) -> None:
    training = read_training(finished / "hq_vqgan" / "checkpoints" / "step-00000004")
    assert set(training["extras"]) == {"health", "discriminator"}
    assert set(training["optimizers"]) == {"generator", "discriminator"}


def test_a_stage_without_its_upstream_says_what_to_train_first(tmp_path: Path) -> None:
    faces = tiny.face_images()
    with pytest.raises(WeightsError, match=r"stage hq_vqgan in .* has 0 of 4 steps.*ldbfr train --stage hq_vqgan"):
        train_run(tiny.preset(), ["dc_vqr"], faces, faces, tmp_path, Worker())


def test_an_unknown_stage_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    faces = tiny.face_images()
    with pytest.raises(ConfigError, match=r"no stage 'gan'.*hq_vqgan.*enhancer"):
        train_run(tiny.preset(), ["gan"], faces, faces, tmp_path, Worker())


def test_a_stage_starts_from_given_weights(finished: Path, tmp_path: Path) -> None:
    faces, given = tiny.face_images(), finished / "latent_vqgan" / "checkpoints" / "step-00000004" / "ema"
    still = tiny.preset("training.latent_vqgan.learning_rate=1e-30", "training.latent_vqgan.revive_until=0")
    assert train_run(still, ["latent_vqgan"], faces, faces, tmp_path, Worker(), init={"latent_vqgan": given})
    before, after = (
        load_stage_network(run, "latent_vqgan", settings)[0]
        for run, settings in ((finished, tiny.preset()), (tmp_path, still))
    )
    assert tiny.differing(tiny.snapshot(before), tiny.snapshot(after)) == []
    other = finished / "latent_vqgan" / "checkpoints" / "step-00000002" / "ema"
    with pytest.raises(WeightsError, match=r"upstream init"):
        train_run(still, ["latent_vqgan"], faces, faces, tmp_path, Worker(), init={"latent_vqgan": other})


def test_weights_to_start_from_that_do_not_fit_are_refused(finished: Path, tmp_path: Path) -> None:
    faces, given = tiny.face_images(), finished / "latent_vqgan" / "checkpoints" / "step-00000004" / "ema"
    wider = tiny.preset("latent_vqgan.num_codes=32")
    with pytest.raises(WeightsError, match=r"does not fit stage latent_vqgan"):
        train_run(wider, ["latent_vqgan"], faces, faces, tmp_path, Worker(), init={"latent_vqgan": given})
    with pytest.raises(WeightsError, match="nowhere"):
        train_run(
            tiny.preset(),
            ["latent_vqgan"],
            faces,
            faces,
            tmp_path,
            Worker(),
            init={"latent_vqgan": tmp_path / "nowhere"},
        )
    with pytest.raises(ConfigError, match="stage latent_vqgan is not trained by this command"):
        train_run(tiny.preset(), ["prior"], faces, faces, tmp_path, Worker(), init={"latent_vqgan": given})


def test_a_refused_command_leaves_the_run_s_preset_as_it_was(tmp_path: Path) -> None:
    faces = tiny.face_images()
    train_run(tiny.preset(), ["latent_vqgan"], faces, faces, tmp_path, Worker(stop_after=2))
    before = (tmp_path / PRESET_FILE).read_text()
    with pytest.raises(WeightsError):
        train_run(tiny.preset("training.latent_vqgan.batch_size=3"), ["latent_vqgan"], faces, faces, tmp_path, Worker())
    assert (tmp_path / PRESET_FILE).read_text() == before


def test_a_profile_that_does_not_exist_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    faces, worker = tiny.face_images(), Worker()
    with pytest.raises(ConfigError, match=r"'savage'.*wide"):
        train_run(tiny.preset("training.dc_vqr.profile=savage"), STAGE_NAMES, faces, faces, tmp_path, worker)
    assert worker.reports == []


def test_a_finished_stage_is_not_passed_over_when_what_it_was_trained_on_was_trained_again(tmp_path: Path) -> None:
    stages = ["latent_vqgan", "prior"]
    for name, seed in (("run", 0), ("other", 5)):
        faces = tiny.face_images(seed=seed)
        assert train_run(tiny.preset(), stages[: 2 - bool(seed)], faces, faces, tmp_path / name, Worker())
    assert run_finished(tmp_path / "run", "prior", tiny.preset())
    shutil.rmtree(tmp_path / "run" / "latent_vqgan")
    shutil.copytree(tmp_path / "other" / "latent_vqgan", tmp_path / "run" / "latent_vqgan")
    with pytest.raises(WeightsError, match=r"upstream latent_vqgan: \w+ there, \w+ now"):
        run_finished(tmp_path / "run", "prior", tiny.preset())


def test_the_best_checkpoint_is_kept_beside_the_newest_and_one_that_is_gone_does_not_count(tmp_path: Path) -> None:
    """Validations come late: here each when the checkpoint after the next is written."""
    scores = {2: 3.0, 4: 1.0, 6: 2.0, 8: 4.0, 10: 5.0, 12: 6.0}  # of the noise error, less is better

    class Late(Worker):
        def saved(self, step: int) -> None:
            super().saved(step)
            if step - 2 in scores:
                text = json.dumps({"step": step - 2, "metrics": {"noise_error": scores[step - 2]}})
                write_bytes(result_uri(str(tmp_path / "prior"), step - 2, "json"), text.encode())

    settings = [f"training.prior.{key}" for key in ("steps=12", "checkpoint_every=2", "keep_checkpoints=2")]
    trainer = tiny.new_trainer(tmp_path, "prior", *settings, runtime=Late())
    trainer.train()
    assert [folder.name for folder in checkpoint_folders(folder_of(trainer))] == [
        f"step-{step:08d}" for step in (12, 10, 4)
    ]
    write_bytes(result_uri(str(tmp_path / "prior"), 2, "json"), b'{"step": 2, "metrics": {"noise_error": 0.1}}')
    assert best_step(str(tmp_path / "prior"), ("noise_error", "min")) == 2
    assert best_step(str(tmp_path / "prior"), ("noise_error", "min"), (4, 10, 12)) == 4


def test_a_run_whose_lock_is_lost_stops_after_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its own
    runtime = SingleProcess("cpu")

    def lost() -> None:
        raise StorageError("another took over")

    runtime.check = lost
    trainer = tiny.new_trainer(tmp_path, "prior", runtime=runtime)
    with pytest.raises(StorageError, match="another took over"):
        trainer.train()
    assert trainer.step == 1
