"""Training in several processes, started by `accelerate launch` on the CPU (gloo, loopback).

What the guide promises of GPUs is what is asserted here; the launcher is the same one.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModelWithProjection

import demo
from nested_core.training.__main__ import main

ROOT = Path(__file__).parents[2]
LIMIT = 300  # seconds until a run is said to hang


def save_base(folder):
    """The narrowest small world, its vision tower, and five pictures of three dogs."""
    torch.manual_seed(1)
    letters = [chr(c) for c in range(33, 127)]
    tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    text = CLIPTextConfig(
        vocab_size=190, hidden_size=128, intermediate_size=64, projection_dim=128, num_hidden_layers=1,
        num_attention_heads=2, bos_token_id=188, eos_token_id=189, pad_token_id=189,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderTiny(latent_channels=4, encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
                            num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4),
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77),
        unet=UNet2DConditionModel(
            in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 32),
            down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
            attention_head_dim=2, cross_attention_dim=128, use_linear_projection=True,
        ),
        scheduler=DDIMScheduler(prediction_type="v_prediction", steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder / "base")
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, projection_dim=16, num_hidden_layers=2, num_attention_heads=2,
        image_size=32, patch_size=8,
    )  # fmt: skip
    CLIPVisionModelWithProjection(vision).save_pretrained(folder / "vision")
    for i in range(5):
        place = folder / "pets" / f"dog{i % 3}" / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((64, 64), 40 + 20 * i).convert("RGB").save(place)
        place.with_suffix(".txt").write_text("a <subject> on grass\na dog" if i else "a dog and a <subject>")


@pytest.fixture(scope="module")
def configured(tmp_path_factory):
    """A folder with models, pictures and config.yaml, which says all but output and how many share the work."""
    folder = tmp_path_factory.mktemp("processes")
    save_base(folder)
    said = {
        "steps": 4, "batch_size": 1, "cpu": True, "workers": 0, "precision": "fp32", "log_every": 1,
        "base": {
            "model": str(folder / "base"), "vision": str(folder / "vision"),
            "family": str(Path(demo.__file__).parent / "family.json"),
        },
        "data": {"folders": [str(folder / "pets")], "class_word": "dog", "resolution": 64, "flip": 0.5},
        "encoder": {"tokens": 4, "dim": 32, "depth": 1, "heads": 1, "dim_head": 32, "learn_alpha": True},
        # A large epsilon: AdamW divides a gradient of nearly 0 by nearly 0, and rounding would decide its step.
        "optimiser": {"warmup": 2, "ema": 0.9, "schedule": "cosine", "epsilon": 1.0e-4},
        "loss": {"drop_text": 0.2, "drop_both": 0.2, "min_snr_gamma": 5},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(said))
    return folder


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def arguments(configured, output, **changes):
    """Options of the command line; "__" stands for the dot in a name."""
    options = {"config": configured / "config.yaml", "output": output, **changes}
    return [part for name, value in options.items() for part in (f"--{name.replace('__', '.')}", str(value))]


def launch(processes, given, machine=(), folder=ROOT):
    """`accelerate launch` with so many processes, as the guide has it; the cards are missing, so `cpu` is in config."""
    machine = machine or ("--num_machines", "1", "--main_process_port", str(free_port()))
    command = [
        sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes",
        str(processes), "--mixed_precision", "no", "--dynamo_backend", "no", *machine,
        "-m", "nested_core.training", *given,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process):
    """(exit code, standard output, standard error) of a run that ends within LIMIT."""
    try:
        out, err = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        raise
    return process.returncode, out, err


def finished(process):
    """What a run that ended well has said: standard output and error."""
    code, out, err = ended(process)
    assert code == 0, err[-4000:]
    return out, err


def entries(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").open()]


def checkpoint(output, step):
    return output / "checkpoints" / f"step-{step:08}"


def assert_same_run(one, other, step, since=0):
    """Losses and weights of two runs are equal to rounding."""
    for a, b in zip(entries(one)[since:], entries(other)[since:], strict=True):
        assert a["step"] == b["step"] and a["bound"] == pytest.approx(b["bound"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5), a["step"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4), a["step"]
    for name in (f"checkpoints/step-{step:08}/model.safetensors", "encoder.safetensors"):
        ours, theirs = load_file(one / name), load_file(other / name)
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[key], rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


@pytest.fixture(scope="module")
def alone(configured, tmp_path_factory):
    """One process with twice the batch."""
    output = tmp_path_factory.mktemp("alone") / "run"
    assert main(arguments(configured, output, batch_size=2, accumulation=2)) == 0
    return output


def test_two_processes_are_one_with_twice_the_batch(configured, alone, tmp_path):
    """Also with accumulation; and one of them alone writes, logs and samples."""
    output = tmp_path / "run"
    given = arguments(configured, output, accumulation=2, samples__every=4, samples__count=1, samples__steps=2)
    out, err = finished(launch(2, given))
    assert_same_run(output, alone, 4)
    assert out.count("The encoder: ") == 1
    assert sum("4/4" in line for line in err.replace("\r", "\n").splitlines() if line.startswith("steps: 100%")) >= 1
    assert [p.name for p in (output / "samples").iterdir()] == ["step-00000004.png"]
    assert len(list(output.rglob("events.out*"))) == 1
    assert [entry["step"] for entry in entries(output)] == [1, 2, 3, 4]
    said = json.loads((checkpoint(output, 4) / "run.json").read_text())
    assert said["samples"] == 16 and said["per_step"] == {"processes": 2, "batch_size": 1, "accumulation": 2}
    assert not list((output / "checkpoints").glob(".*"))


def rank_of(process):
    return process.environ().get("RANK")


def wait_until(happened, process):
    """Polls; a run that ends meanwhile, or takes LIMIT, fails the test."""
    begun = time.monotonic()
    while not happened():
        assert process.poll() is None, process.communicate()[1][-4000:]
        assert time.monotonic() - begun < LIMIT
        time.sleep(0.05)


@pytest.fixture(scope="module")
def bereft(configured, tmp_path_factory):
    """A run of two processes of which the second was killed: its folder, exit code and standard error."""
    output = tmp_path_factory.mktemp("bereft") / "run"
    given = arguments(configured, output, steps=100_000, save_every=2, optimiser__schedule="constant")
    process = launch(2, given)
    wait_until(checkpoint(output, 2).exists, process)
    children = psutil.Process(process.pid).children(recursive=True)
    (victim,) = (child for child in children if rank_of(child) == "1")
    os.kill(victim.pid, signal.SIGKILL)
    code, _, err = ended(process)
    return output, code, err


def newest(output):
    return max(int(path.name.split("-")[1]) for path in (output / "checkpoints").glob("step-*"))


def test_a_process_that_dies_ends_the_run(bereft):
    """With a message, an exit code, and a newest checkpoint that is whole."""
    output, code, err = bereft
    step = newest(output)
    assert code != 0
    assert "Error: Process 0 of 2 lost another one" in err or "Error: The run was ended from outside (SIGTERM)" in err
    assert f"The newest checkpoint is {checkpoint(output, step)}, and whole" in err
    said = json.loads((checkpoint(output, step) / "run.json").read_text())
    assert (said["step"], said["samples"]) == (step, 2 * step)
    assert load_file(checkpoint(output, step) / "model.safetensors")


def gone_on(configured, bereft, folder, processes, batch_size):
    """The bereft run, copied, with two more steps in so many processes; its folder and what it said."""
    output = folder / f"run-{processes}-{batch_size}"
    shutil.copytree(bereft[0], output)
    given = arguments(
        configured, output, steps=newest(output) + 2, batch_size=batch_size, optimiser__schedule="constant"
    )
    if processes == 1:
        assert main(given) == 0
        return output, ""
    return output, finished(launch(processes, given))[1]


def test_goes_on_with_other_numbers_of_processes(configured, bereft, tmp_path, caplog):
    """Stopped at two, at three: the next six examples, as one process with a batch of three takes them."""
    before = newest(bereft[0])
    three, said = gone_on(configured, bereft, tmp_path, 3, 1)
    with caplog.at_level("INFO"):
        one, _ = gone_on(configured, bereft, tmp_path, 1, 3)
    for told in (said, caplog.text):
        assert "no example is repeated or left out; 3 examples a step where there were 2: another curve" in told
    assert said.count("no example is repeated") == 1  # one process says it
    assert_same_run(three, one, before + 2, since=-2)
    state = json.loads((checkpoint(three, before + 2) / "run.json").read_text())
    assert state["samples"] == 2 * before + 6


def test_goes_on_alone_with_as_many_examples(configured, bereft, tmp_path, caplog):
    """Stopped at two processes: one with a batch of two, or with two passes a step, takes the same steps."""
    before = newest(bereft[0])
    with caplog.at_level("INFO"):
        wide, _ = gone_on(configured, bereft, tmp_path, 1, 2)
    assert "as many examples a step, summed in another order: equal to rounding, not bit for bit" in caplog.text
    long = tmp_path / "long"
    shutil.copytree(bereft[0], long)
    changes = {"steps": before + 2, "accumulation": 2, "optimiser__schedule": "constant"}
    assert main(arguments(configured, long, **changes)) == 0
    assert_same_run(long, wide, before + 2, since=-2)


def test_two_machines_share_a_folder(configured, alone, tmp_path):
    output, port = tmp_path / "run", str(free_port())
    given = arguments(configured, output, accumulation=2)
    machines = [
        launch(2, given, machine=("--num_machines", "2", "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1",
                                  "--main_process_port", port))
        for rank in range(2)
    ]  # fmt: skip
    said = [finished(machine) for machine in machines]
    assert_same_run(output, alone, 4)
    assert [out.count("The encoder: ") for out, _ in said] == [1, 0]


def test_machines_that_share_no_folder_are_told(configured, tmp_path):
    """Each has its own place under one relative path, as where nothing is mounted."""
    port, machines = str(free_port()), []
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        machine = ("--num_machines", "2", "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1",
                   "--main_process_port", port)  # fmt: skip
        machines.append(launch(2, arguments(configured, "run"), machine=machine, folder=tmp_path / str(rank)))
    codes, errors = zip(*((code, err) for code, _, err in map(ended, machines)), strict=True)
    assert all(codes)
    assert "All machines of a run need the same output folder" in errors[1]
