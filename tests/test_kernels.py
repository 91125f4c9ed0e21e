"""Are the kernels those of another processor where `make test-kernels` asks for them?"""

from __future__ import annotations

import os

import numpy as np
import pytest
import ray
import threadpoolctl
import torch

pytestmark = pytest.mark.kernels


def kernels() -> tuple[str, str | None, set[str]]:
    """What this process computes with: PyTorch's kernels, MKL's, and those of every OpenBLAS."""
    np.ones((2, 2)) @ np.ones((2, 2))
    blas = {
        library["architecture"]
        for library in threadpoolctl.threadpool_info()
        if library["internal_api"] == "openblas"
    }
    return torch.backends.cpu.get_cpu_capability(), os.environ.get("MKL_CBWR"), blas


@pytest.mark.skipif("MKL_CBWR" not in os.environ, reason="only under `make test-kernels`")
@pytest.mark.usefixtures("ray_session")
def test_this_process_and_rays_workers_have_the_kernels_that_were_asked_for():
    asked = os.environ["OPENBLAS_CORETYPE"]
    expected = "DEFAULT", "COMPATIBLE", {asked}
    assert kernels() == expected
    assert ray.get(ray.remote(kernels).remote()) == expected
