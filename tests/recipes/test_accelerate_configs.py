"""recipes/accelerate: accelerate knows every key, scripts get what klft needs, and ddp and two_nodes run.

The others need GPUs (fsdp2, tp) or DeepSpeed (zero2, zero3), so here their files go through accelerate's own reader and
launcher up to the environment that processes would get, and its plugins are made from that. That FSDP2 and ZeRO-2 then
train what DDP trains is tested where they are made to run on gloo: test_anchor_fsdp.py, test_ppo_deepspeed.py.
Run as a script, this file is what is launched.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import conftest  # noqa: F401 - also for the script: no hub, few threads
import pytest
from accelerate import DeepSpeedPlugin, FullyShardedDataParallelPlugin, ParallelismConfig
from accelerate.commands import launch as launcher
from accelerate.commands.config import load_config_from_file
from accelerate.utils import gather_object, prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from support.processes import environment, launch_nodes

FOLDER = Path(__file__).parents[2] / "recipes" / "accelerate"
CONFIGS = ["ddp", "fsdp2", "tp", "two_nodes", "zero2", "zero3"]


def options_of(name, *more):
    return ["--config_file", str(FOLDER / f"{name}.yaml"), *more]


def environment_of(name, monkeypatch):
    """What `accelerate launch --config_file` gives to the processes it starts; none is started."""
    given = []
    for kind in ("multi_gpu_launcher", "deepspeed_launcher", "simple_launcher"):
        monkeypatch.setattr(launcher, kind, lambda args, kind=kind: given.append((kind, args)))
    parser = launcher.launch_command_parser()
    launcher.launch_command(parser.parse_args(options_of(name, "--main_process_port", "0", "script.py")))
    ((kind, args),) = given
    if kind == "deepspeed_launcher":
        return kind, args, prepare_deepspeed_cmd_env(args)[1]
    return kind, args, prepare_multi_gpu_env(args)


def test_there_is_a_test_for_each():
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_knows_every_key(name):
    """Of sections accelerate takes any key, and says nothing of one that it does not know."""
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    known = vars(launcher.launch_command_parser().parse_args(["script.py"])).keys()
    sections = [config.fsdp_config, config.deepspeed_config, config.parallelism_config]
    assert [key for section in sections for key in section if key not in known] == []
    assert sum(map(bool, sections)) == (name not in ("ddp", "two_nodes"))


@pytest.mark.parametrize(("name", "kind", "processes"), [
    ("ddp", "multi_gpu_launcher", 8), ("fsdp2", "multi_gpu_launcher", 8), ("tp", "multi_gpu_launcher", 2),
    ("two_nodes", "multi_gpu_launcher", 8), ("zero2", "deepspeed_launcher", 8), ("zero3", "deepspeed_launcher", 8),
])  # fmt: skip
def test_a_process_is_started_for_every_gpu(name, kind, processes, monkeypatch):
    given, args, found = environment_of(name, monkeypatch)
    assert (given, int(args.nproc_per_node)) == (kind, processes)
    assert found["ACCELERATE_MIXED_PRECISION"] == "bf16"
    asked = {
        variable for variable in ("FSDP", "DEEPSPEED", "PARALLELISM_CONFIG") if f"ACCELERATE_USE_{variable}" in found
    }
    assert asked == {
        "fsdp2": {"FSDP"},
        "tp": {"PARALLELISM_CONFIG"},
        "zero2": {"DEEPSPEED"},
        "zero3": {"DEEPSPEED"},
    }.get(name, set())


def test_two_nodes_are_two_machines_that_know_where_to_meet(monkeypatch):
    _, args, _ = environment_of("two_nodes", monkeypatch)
    assert (args.nnodes, args.node_rank, args.rdzv_backend) == ("2", 0, "static")
    assert args.rdzv_endpoint == f"10.0.0.1:{args.main_process_port}"
    assert load_config_from_file(str(FOLDER / "two_nodes.yaml")).main_process_port > 0, "they could not agree on one"


def with_environment(found, monkeypatch):
    for name, value in found.items():
        monkeypatch.setenv(name, value)


def test_fsdp2_is_what_klft_can_read_a_head_of(monkeypatch):
    with_environment(environment_of("fsdp2", monkeypatch)[2], monkeypatch)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward, plugin.activation_checkpointing) == (2, True, False)
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert plugin.transformer_cls_names_to_wrap is None, "the model's own list"
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"
    assert type(plugin.cpu_offload).__name__ == "OffloadPolicy", "not CPUOffloadPolicy"
    assert not plugin.cpu_ram_efficient_loading


def test_tp_is_tensor_parallelism_alone(monkeypatch):
    with_environment(environment_of("tp", monkeypatch)[2], monkeypatch)
    config = ParallelismConfig()
    assert (config.tp_size, config.total_size) == (2, 2)
    assert config.total_size == load_config_from_file(str(FOLDER / "tp.yaml")).num_processes


@pytest.mark.parametrize(("name", "stage"), [("zero2", 2), ("zero3", 3)])
def test_zero_leaves_accumulation_and_clipping_to_the_trainer(name, stage, monkeypatch):
    with_environment(environment_of(name, monkeypatch)[2], monkeypatch)
    plugin = DeepSpeedPlugin()
    assert (plugin.zero_stage, plugin.gradient_accumulation_steps, plugin.gradient_clipping) == (stage, "auto", "auto")
    assert (plugin.offload_optimizer_device, plugin.offload_param_device) == ("none", "none")
    assert not plugin.zero3_init_flag


# ---- processes -----------------------------------------------------------------------------------------------------


def started(name, what, folder):
    """`accelerate launch --config_file` of this file, on the CPU: how it ended."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *options_of(name, "--num_processes", "2")]
    few = environment(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1", KLFT_TEST_THREADS="1")
    command += ["--mixed_precision", "no", __file__, what]
    return subprocess.run(command, capture_output=True, text=True, env=few, timeout=200, cwd=folder)


def world():
    """Every process's (rank, rank on its machine), from all of them."""
    from accelerate import PartialState

    from klft.exits import end_process_group

    state = PartialState(cpu=True)
    everyone = gather_object([(state.process_index, state.local_process_index)])
    if state.is_main_process:
        print(json.dumps({"world": everyone, "backend": state.backend}))
    end_process_group()


def trainer():
    from support import tiny

    tiny.trainer("unused")


@pytest.mark.slow
def test_ddp_runs(tmp_path):
    done = started("ddp", "world", tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout) == {"world": [[0, 0], [1, 1]], "backend": "gloo"}


@pytest.mark.slow
def test_two_nodes_run(tmp_path):
    ends = launch_nodes(
        __file__, "world", folder=tmp_path, options=options_of("two_nodes", "--mixed_precision", "no"), timeout=200
    )
    assert [done.returncode for done in ends] == [0, 0], ends[0].stderr[-4000:]
    assert json.loads(ends[0].stdout) == {"world": [[0, 0], [1, 0]], "backend": "gloo"}
    assert ends[1].stdout == ""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "message"), [
    ("fsdp2", "FSDP was asked for and MULTI_CPU runs"), ("tp", "ParallelismConfig is only compatible"),
])  # fmt: skip
def test_what_needs_gpus_does_not_run_as_ddp_on_a_cpu(name, message, tmp_path):
    done = started(name, "trainer", tmp_path)
    assert done.returncode == 1
    assert message in done.stderr


# ---- Slurm ---------------------------------------------------------------------------------------------------------

FAKES = {
    "scontrol": '[ "$1 $2 $3" = "show hostnames node[7-8]" ] && printf "node7\\nnode8\\n"',
    "srun": '[ "$1" = "--kill-on-bad-exit=1" ] || exit 9\nshift\nfor id in 0 1; do SLURM_NODEID=$id "$@" || exit; done',
    "accelerate": 'printf "%s\\0" "$@" > "$SLURM_NODEID"; echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT"',
}


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_slurm_starts_a_launcher_on_each_machine(tmp_path):
    """The script itself, with srun, scontrol and accelerate replaced by what says what it was told."""
    for name, text in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    job = {
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_ID": "1234567",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
    }
    given = ["--model_name_or_path", "a model", "--output_dir", "/shared/run"]
    done = subprocess.run(
        ["bash", str(FOLDER / "slurm.sh"), *given], capture_output=True, text=True, cwd=tmp_path, timeout=60,
        env=os.environ | job | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [int(line) > 30 for line in done.stdout.splitlines()] == [True, True], "seconds for a checkpoint"
    for rank in (0, 1):
        command, *words = (tmp_path / str(rank)).read_text().rstrip("\0").split("\0")
        assert command == "launch"
        args = launcher.launch_command_parser().parse_args(words)
        assert (args.num_machines, args.num_processes, args.machine_rank) == (2, 8, rank)
        assert (args.main_process_ip, args.main_process_port) == ("node7", 20000 + 1234567 % 20000)
        assert args.training_script == "recipes/ppo.py"
        assert args.training_script_args[-len(given) :] == given
        assert args.training_script_args[-len(given) - 2 : -len(given)] == ["--processes", "8"]
        for path in (args.config_file, args.training_script, "recipes/ppo.yaml"):
            assert (FOLDER.parents[1] / path).is_file()


if __name__ == "__main__":
    {"world": world, "trainer": trainer}[sys.argv[1]]()
