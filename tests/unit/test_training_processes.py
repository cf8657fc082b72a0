"""Training in several processes, started by `accelerate launch` on the CPU (gloo, loopback).

What the guide promises of GPUs is what is asserted here; the launcher is the same one.
"""

from __future__ import annotations

import gc
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
from diffusers.models.attention import FeedForward
from safetensors.torch import load_file

from narrow_training import arguments, assert_same_run, checkpoint, entries, newest, save_config
from nested_core.errors import NestedAttentionError
from nested_core.training import OptimiserConfig, TrainingConfig, parallel
from nested_core.training.__main__ import main
from nested_core.training.checkpoints import check_shared
from nested_core.training.loop import accelerated

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "nested_core" / "training" / "configs" / "accelerate"
TOGETHER = {"accumulation": 2, "validation__share": 0.3}
LIMIT = 300  # seconds until a run is said to hang


@pytest.fixture(scope="module")
def configured(tmp_path_factory):
    return save_config(tmp_path_factory.mktemp("processes"))


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def launch(processes, given, machine=(), folder=ROOT):
    """`accelerate launch` with so many processes, as the guide has it; the cards are missing, so `cpu` is in config."""
    file = "machines.yaml" if machine else "gpus.yaml"
    machine = machine or ("--main_process_port", str(free_port()))
    command = [
        sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(CONFIGS / file),
        "--num_processes", str(processes), *machine,
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


@pytest.fixture(scope="module")
def alone(configured, tmp_path_factory):
    """One process with twice the batch."""
    output = tmp_path_factory.mktemp("alone") / "run"
    assert main(arguments(configured, output, batch_size=2, **TOGETHER)) == 0
    return output


def test_two_processes_are_one_with_twice_the_batch(configured, alone, tmp_path):
    """Also with accumulation; and one of them alone writes, logs and samples."""
    output = tmp_path / "run"
    given = arguments(configured, output, **TOGETHER, samples__every=4, samples__count=1, samples__steps=2)
    out, err = finished(launch(2, given))
    assert_same_run(output, alone, 4)
    assert out.count("The encoder: ") == 1
    assert sum("4/4" in line for line in err.replace("\r", "\n").splitlines() if line.startswith("steps: 100%")) >= 1
    assert [p.name for p in (output / "samples").iterdir()] == ["step-00000004.png"]
    assert len(list(output.rglob("events.out*"))) == 1
    # A validation at the start and one with the checkpoint.
    assert [entry["step"] for entry in entries(output)] == [0, 1, 2, 3, 4, 4]
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
        configured,
        output,
        steps=newest(output) + 2,
        batch_size=batch_size,
        optimiser__schedule="constant",
        optimiser__shard=True,
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
    """And the optimiser's moments: each has half of them, the checkpoint all."""
    output, port = tmp_path / "run", str(free_port())
    given = arguments(configured, output, **TOGETHER, optimiser__shard=True)
    machines = [
        launch(2, given, machine=("--machine_rank", str(rank), "--main_process_ip", "127.0.0.1",
                                  "--main_process_port", port))
        for rank in range(2)
    ]  # fmt: skip
    said = [finished(machine) for machine in machines]
    assert_same_run(output, alone, 4)
    ours, theirs = (torch.load(checkpoint(run, 4) / "optimizer.bin", weights_only=True) for run in (output, alone))
    torch.testing.assert_close(ours["state"], theirs["state"], rtol=1e-3, atol=1e-7)
    assert [out.count("The encoder: ") for out, _ in said] == [1, 0]


def test_machines_that_share_no_folder_are_told(tmp_path):
    """What process 0 has written is not there."""
    with accelerated(TrainingConfig(output=str(tmp_path), tracker="none", cpu=True, precision="fp32")) as accelerator:
        with pytest.raises(NestedAttentionError, match="All machines of a run need the same output folder"):
            check_shared(TrainingConfig(output=str(tmp_path)), accelerator)


def test_goes_on_with_another_accumulation(configured, tmp_path):
    """Stopped after an odd number of passes, two passes a step are two from the first on."""
    for name in ("wide", "long"):
        assert main(arguments(configured, tmp_path / name, steps=1, optimiser__schedule="constant")) == 0
    changes = {"steps": 3, "optimiser__schedule": "constant"}
    assert main(arguments(configured, tmp_path / "wide", batch_size=2, **changes)) == 0
    assert main(arguments(configured, tmp_path / "long", accumulation=2, **changes)) == 0
    assert_same_run(tmp_path / "long", tmp_path / "wide", 3)


@pytest.mark.parametrize("name, title", [("FSDP", "FSDP"), ("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron-LM")])
def test_what_takes_the_weights_apart_is_refused(configured, tmp_path, monkeypatch, capsys, name, title):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    assert main(arguments(configured, tmp_path)) == 1
    assert f"told to use {title}" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_one_process_where_several_were_asked_for(configured, tmp_path):
    """What accelerate makes of `--cpu --num_processes 2`."""
    command = [
        sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "-m", "nested_core.training", *arguments(configured, tmp_path),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode != 0 and "asked for several processes on the CPU and has started one" in done.stderr


def test_moments_in_8_bits_need_bitsandbytes(configured, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert main(arguments(configured, tmp_path, optimiser__kind="adamw8bit")) == 1
    assert "needs bitsandbytes" in capsys.readouterr().err
    with pytest.raises(NestedAttentionError, match='optimiser.shard is for kind "adamw"'):
        OptimiserConfig(kind="adamw8bit", shard=True)


def test_more_workers_than_cores_are_said(caplog, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with accelerated(TrainingConfig(tracker="none", cpu=True, precision="fp32")) as accelerator:
        parallel.check_workers(accelerator, 0)
        assert not caplog.text
        parallel.check_workers(accelerator, 1000)
    assert "workers is 1000 in each of 4 process(es) of this machine" in caplog.text


def test_compiled_parts_are_as_before_afterwards():
    unet = torch.nn.ModuleList([FeedForward(8), torch.nn.Linear(8, 8)])
    with parallel.compiled(unet, True):
        assert [part._compiled_call_impl is not None for part in unet] == [True, False]
    assert not any(part._compiled_call_impl for part in unet)


def test_what_workers_share_is_not_collected():
    before = gc.get_freeze_count()
    with parallel.heap_left_alone(False):
        assert gc.get_freeze_count() == before
    with parallel.heap_left_alone(True):
        assert gc.get_freeze_count() > 10_000
    assert gc.get_freeze_count() == 0
