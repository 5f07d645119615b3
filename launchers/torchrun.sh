#!/usr/bin/env bash
# One node of a run on several; started on every node with the same arguments, which are
# dlora.train's:
#
#   HEAD=host0 NNODES=2 NODE_RANK=0 launchers/torchrun.sh --config configs/multi_node.yaml
#   HEAD=host0 NNODES=2 NODE_RANK=1 launchers/torchrun.sh --config configs/multi_node.yaml
#
#   HEAD            host that the nodes meet on: the one with NODE_RANK=0 (default: this one)
#   PORT            free there and open between the nodes (29500)
#   NNODES          nodes (1)
#   NODE_RANK       of this node, from 0 (under Slurm: SLURM_NODEID)
#   NPROC_PER_NODE  ranks on each node (the GPUs that torch may use there; without any, 1)
#   RUN_ID          the same on all nodes of a run, and no other's (dlora; under Slurm: the job)
#
# The exit status is that of the first worker that failed: 2 for a wrong configuration, 143 and 130
# for a stop by signal after the commit. Which network is used: GLOO_SOCKET_IFNAME and
# NCCL_SOCKET_IFNAME.
set -euo pipefail

NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}}
PYTHON=${PYTHON:-python}
# Not those that nvidia-smi lists, of which CUDA_VISIBLE_DEVICES may hide some.
count='import torch; print(max(torch.cuda.device_count(), 1))'
NPROC_PER_NODE=${NPROC_PER_NODE:-$("$PYTHON" -c "$count")}
is_host=$([[ $NODE_RANK == 0 ]] && echo true || echo false)

exec "$PYTHON" -m dlora launch \
  --nnodes "${NNODES:-1}" \
  --node-rank "$NODE_RANK" \
  --nproc-per-node "$NPROC_PER_NODE" \
  --rdzv-backend c10d \
  --rdzv-endpoint "${HEAD:-localhost}:${PORT:-29500}" \
  --rdzv-conf "is_host=$is_host" \
  --rdzv-id "${RUN_ID:-dlora}" \
  "$@"
