"""Every benchmark states its error to float64 beside its time, and the results file how it came about."""

import datetime
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch

torch._dynamo.config.cache_size_limit = 64


@pytest.fixture
def step(benchmark):
    """Times loss and gradients of a function of tensors; returns (loss, gradients) of its last call."""

    def run(loss, tensors, trained):
        leaves = [t.detach().requires_grad_(i < trained) for i, t in enumerate(tensors)]

        def once():
            for leaf in leaves:
                leaf.grad = None
            value = loss(*leaves)
            value.backward()
            if value.is_cuda:
                torch.cuda.synchronize()
            return value

        value = benchmark.pedantic(once, warmup_rounds=2, rounds=9, iterations=1)
        return value.detach(), [leaf.grad for leaf in leaves[:trained]]

    return run


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["torch_threads"] = torch.get_num_threads()
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None


def pytest_benchmark_update_json(config, benchmarks, output_json):
    packages = ("torch", "triton", "trl", "liger-kernel", "transformers", "hkdfast")
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    output_json["versions"] = versions
    output_json["date"] = datetime.date.today().isoformat()
    output_json["command"] = shlex.join(["pytest", *sys.argv[1:]])
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
