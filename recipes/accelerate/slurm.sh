#!/bin/bash
# PPO of a model of your own on two machines under Slurm: one task per machine, each an `accelerate launch`.
#   sbatch recipes/accelerate/slurm.sh --model_name_or_path any/causal-lm --prompts prompts.jsonl \
#       --reward my_module:my_reward --output_dir /shared/run
# Submit it from the repository's folder. All options go to recipes/ppo.py; output_dir, the models' cache (HF_HOME)
# and the environment must lie where both machines see them.
#SBATCH --job-name=klft-ppo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
# SIGTERM ten minutes before the end: all processes save at the end of their step and stop. To go on, submit it again with
# --resume_from_checkpoint true.
#SBATCH --signal=TERM@600
set -euo pipefail

# source .venv/bin/activate # or however your environment is loaded

# The first machine of the job is where all processes meet, on a port that follows from the job's number.
read -r main_process_ip < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
main_process_port=$((20000 + SLURM_JOB_ID % 20000))
processes=$((SLURM_JOB_NUM_NODES * SLURM_GPUS_ON_NODE))
export main_process_ip main_process_port processes

# How long the launcher waits between SIGTERM and SIGKILL, in seconds: long enough for a step and a checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=540

# Single quotes: SLURM_NODEID, the machine's number, is another one in each task. A task that fails ends the others.
srun --kill-on-bad-exit=1 bash -c '
    exec accelerate launch --config_file recipes/accelerate/two_nodes.yaml \
        --num_machines "$SLURM_JOB_NUM_NODES" --num_processes "$processes" --machine_rank "$SLURM_NODEID" \
        --main_process_ip "$main_process_ip" --main_process_port "$main_process_port" \
        recipes/ppo.py --config recipes/ppo.yaml --processes "$processes" "$@"
' bash "$@"
