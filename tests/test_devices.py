"""What a device can do, and the share of it that a step takes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, LlamaForCausalLM

from errors import UserError
from llama3.model import Llama
from plan import devices
from trainer.args import NativeOptions
from trainer.trainer import Trainer


def test_the_operations_of_a_token_are_those_that_torch_counts(tiny):
    T, config = 48, AutoConfig.from_pretrained(tiny, attn_implementation="eager")
    with FlopCounterMode(display=False) as counted:
        ids = torch.randint(config.vocab_size, (2, T))
        LlamaForCausalLM(config)(ids, labels=ids).loss.backward()
    batch = {"input_ids": ids}
    assert Llama(str(tiny)).flops_per_token(batch) * ids.numel() == counted.get_total_flops()


def test_the_ranks_of_a_cpu_share_its_memory_and_its_rates():
    one, two = (devices.parse_device("CPU", ranks) for ranks in (1, 2))
    for name in ("memory_gib", "tflops", "memory_gbps"):
        assert getattr(two, name) == getattr(one, name) / 2 > 0


def test_a_device_is_named_or_given_as_numbers():
    assert devices.parse_device("a100-40g") == devices.DEVICES["a100-40g"]
    assert devices.parse_device("24:165:1008") == devices.Device(24, 165, 1008, 32)
    assert devices.parse_device("24:165:1008:64").link_gbps == 64
    for wrong in ("h1000", "", "24:165", "1:2:3:4:5", "24:-1:2", "nan:1:1", "inf:1:1"):
        with pytest.raises(UserError, match="h100-80g.*GiB:TFLOPS:GBps"):
            devices.parse_device(wrong)


@pytest.mark.parametrize(
    "cuda_name, kind",
    [
        ("NVIDIA H100 80GB HBM3", "h100-80g"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA A100-PCIE-40GB", "a100-40g"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GeForce RTX 4090 D", None),
    ],
)
def test_cuda_devices_are_known_by_name(monkeypatch, cuda_name, kind):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: cuda_name)
    assert devices.of(torch.device("cuda", 0)) == devices.DEVICES.get(kind)
    assert devices.of(torch.device("cpu")) is None


def test_mfu_is_the_share_of_all_devices_rates(tiny):
    trainer = object.__new__(Trainer)  # its constructor needs a run's arguments
    trainer.options = NativeOptions(device_tflops=2.0)
    trainer.world_size = 4
    trainer._flops_per_token = Llama(str(tiny)).flops_per_token({"input_ids": torch.zeros(1, 48)})
    expected = 1000 * trainer._flops_per_token / 8e12
    assert trainer._utilization(1000.0) == {"mfu": pytest.approx(expected)}
    trainer.options = NativeOptions()
    assert trainer._utilization(1000.0) == {}
