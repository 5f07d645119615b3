"""What FLoRA keeps for backward beside z: the plan sees its contracted factors too."""

import torch
from test_plan_trace import CONFIGS, LAYERS, ROWS, TOKENS, allocated
from torch import nn
from transformers import AutoModelForCausalLM

from dlora import FloraConfig, attach
from dlora.plan.trace import trace


def model_on(device: str) -> nn.Module:
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(CONFIGS["llama"], dtype=torch.float32)
    return attach(model, FloraConfig(r=8, flora_r_out=5))


def test_bytes_are_those_of_a_real_pass() -> None:
    planned = trace(model_on("meta"), ROWS, TOKENS, checkpointing=False)
    saved, most = allocated(model_on("cpu"))
    assert planned.estimated == ""
    assert abs(max(planned.blocks, planned.loss) - most) <= 0.005 * most
    assert abs(planned.saved - saved) <= 6000 * LAYERS
