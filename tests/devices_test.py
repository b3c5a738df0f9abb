"""A device is known by the name that JAX gives it, or not at all."""

import jax
import pytest

from gemma_qat import devices


@pytest.mark.parametrize('kind, name', [
    ('NVIDIA H100 80GB HBM3', 'H100'), ('NVIDIA H100 PCIe', 'H100 PCIe'),
    ('NVIDIA H100 NVL', 'H100 NVL'), ('NVIDIA H200', 'H200'),
    ('NVIDIA B200', 'B200'), ('NVIDIA A100-SXM4-40GB', 'A100 40GB'),
    ('NVIDIA A100-SXM4-80GB', 'A100 80GB'),
    ('NVIDIA A100 80GB PCIe', 'A100 PCIe 80GB'),
    ('NVIDIA A100-PCIE-40GB', 'A100 PCIe 40GB'), ('NVIDIA L4', 'L4'),
    ('NVIDIA L40S', 'L40S'), ('NVIDIA A10G', 'A10G'), ('NVIDIA A10', 'A10'),
    ('NVIDIA GeForce RTX 3090', 'RTX 3090'), ('Tesla T4', 'T4'),
    ('NVIDIA GeForce RTX 4090', 'RTX 4090'), ('h100', 'H100'),
    ('Tesla V100-SXM2-16GB', 'V100 16GB'),
    ('TPU v2', 'v2'), ('TPU v3', 'v3'), ('TPU v4', 'v4'),
    ('TPU v5 lite', 'v5e'), ('TPU v5', 'v5p'), ('TPU v5p', 'v5p'),
    ('TPU v6 lite', 'v6e'), ('TPU7x', 'tpu7x'), ('v5e', 'v5e'), ('V6E', 'v6e'),
])
def test_names_of_jax_and_of_people_are_recognised(kind, name):
  assert devices.find(kind).name == name


@pytest.mark.parametrize('kind', [
    'cpu', '', 'TPU', 'TPU v9', 'NVIDIA', 'NVIDIA A100', 'NVIDIA GeForce RTX',
    'NVIDIA GeForce RTX 3090 Ti', 'NVIDIA GeForce RTX 4090 Laptop GPU',
    'NVIDIA GeForce RTX 4090 D', 'NVIDIA GeForce RTX 4080 SUPER',
    'NVIDIA H100 80GB HBM3 MIG 1g.10gb', 'AMD Instinct MI300X',
])
def test_what_is_not_listed_has_no_figures(kind):
  assert devices.find(kind) is None


def test_the_device_that_runs_this_is_a_cpu_without_figures():
  assert devices.find(jax.devices('cpu')[0].device_kind) is None


@pytest.mark.parametrize('known', [*devices.TPUS, *devices.GPUS])
def test_every_listed_name_means_itself(known):
  assert devices.find(known).name == known


@pytest.mark.parametrize('known', [*devices.TPUS, *devices.GPUS])
def test_figures_are_in_plain_units_and_in_proportion(known):
  # A slip by 10^3 in one column, or of bits for bytes, would show: products
  # of all these take tens to hundreds of FLOPs a byte to be worth their cores.
  d = devices.find(known)
  assert 2**32 < d.memory_bytes < 2**38
  assert d.link_bandwidth < d.memory_bandwidth
  if d.flops is not None:
    assert 50 < d.flops / d.memory_bandwidth < 600


def test_turing_has_no_bfloat16_to_be_utilised():
  assert devices.find('Tesla T4').flops is None
