#!/bin/bash

# Parameters
#SBATCH --account=lab
#SBATCH --array=0-2%2
#SBATCH --constraint=a100
#SBATCH --cpus-per-task=8
#SBATCH --error=/results/flap-1/%A_%a_0_log.err
#SBATCH --gres=gpu:1
#SBATCH --job-name=flap-1
#SBATCH --mail-type=FAIL
#SBATCH --mem=48G
#SBATCH --nodes=1
#SBATCH --open-mode=append
#SBATCH --output=/results/flap-1/%A_%a_0_log.out
#SBATCH --partition=gpu
#SBATCH --qos=high
#SBATCH --requeue
#SBATCH --signal=USR2@90
#SBATCH --time=31

# setup
module load cuda
export HF_HOME='/scratch/hf cache'

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /results/flap-1/%A_%a_%t_log.out --error /results/flap-1/%A_%a_%t_log.err --cpus-per-task=8 python -u -m submitit.core._submit /results/flap-1
