"""gptqmodel's own GPTQ of a model, as a checkpoint of its dequantized weights.

Run by the Python of an environment that has gptqmodel, which need not have llmpq:
`python _quality_gptqmodel.py JOB.json`. The job names the model's folder, bits, the group of each
linear (-1: the whole row), the token windows of the calibration, and the folder to write to.
Its defaults otherwise: activation order within groups, its own damping, no clipping.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.looper.gptq_processor import GPTQProcessor
from gptqmodel.quantization.gptq import GPTQ
from safetensors.torch import load_file, save_file


def main() -> None:
    """Quantizes the model and writes what its weights then stand for."""
    job = json.loads(Path(sys.argv[1]).read_text())
    found = quantized_weights(job)
    folder, output = Path(job["model"]), Path(job["output"])
    tensors = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    for name, weight in found.items():
        assert weight.shape == tensors[f"{name}.weight"].shape, name
        assert num_values(weight, job["groups"][name.split(".")[-1]]) <= 2 ** job["bits"], name
        tensors[f"{name}.weight"] = weight.contiguous()
    assert len(found) == sum(name.split(".")[-2] in job["groups"] for name in tensors)
    save_file(tensors, output / "model.safetensors")
    shutil.copy(folder / "config.json", output)


def num_values(weight: torch.Tensor, group: int) -> int:
    """The most different values in one group of a row."""
    groups = weight.view(len(weight), -1, weight.shape[1] if group < 0 else group)
    steps = groups.sort(dim=-1).values.diff(dim=-1)
    return int((steps > 0).sum(dim=-1).max()) + 1


def quantized_weights(job: dict[str, Any]) -> dict[str, torch.Tensor]:
    """fp32 weights on their grids, by the full name of their linear."""
    found: dict[str, torch.Tensor] = {}
    own = GPTQ.quantize

    def quantize(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = own(self, *args, **kwargs)
        found[self._named_module.full_name] = result[0].detach().float().cpu().clone()
        return result

    GPTQ.quantize = quantize
    GPTQProcessor.submodule_finalize = _leave  # its packing refuses sizes that 32 does not divide
    model = GPTQModel.load(job["model"], config(job), dtype=torch.float32, device="cpu")
    calibration = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in job["windows"]]
    model.quantize(calibration, batch_size=4)
    return found


def _leave(*args: Any, **kwargs: Any) -> None:
    """Leaves a linear as it is: its weight is on its grid already."""


def config(job: dict[str, Any]) -> QuantizeConfig:
    """Asymmetric, the groups as they are asked for."""
    dynamic: dict[str, dict[str, Any]] = {}
    for name, group in job["groups"].items():
        dynamic[rf".*\.{name}"] = {"group_size": group}
        if group < 0:  # there is no order of groups to choose
            dynamic[rf".*\.{name}"] |= {"act_group_aware": False, "desc_act": True}
    return QuantizeConfig(bits=job["bits"], group_size=64, sym=False, dynamic=dynamic)


if __name__ == "__main__":
    main()
