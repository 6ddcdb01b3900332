"""What the mesh refuses, and that a copy of the base lies inside a host wherever it fits."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from fedsafe_jax.federated import mesh
from fedsafe_jax.models.decoder_config import ModelError


def test_devices_are_shared_out_evenly():
    assert dict(mesh.make_mesh(jax.devices()[:4], 2).shape) == {"clients": 2, "model": 2}
    with pytest.raises(ModelError, match="model_parallel=3 does not divide 4 devices"):
        mesh.make_mesh(jax.devices()[:4], 3)


@pytest.mark.parametrize("model", [1, 2, 4, 8])
def test_one_process_without_a_torus_gets_the_mesh_of_jax(model):
    axes = (jax.sharding.AxisType.Auto,) * 2
    expected = jax.make_mesh((8 // model, model), ("clients", "model"), axis_types=axes)
    assert mesh.make_mesh(model_parallel=model) == expected
    assert not mesh.spans_hosts(expected)


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device as far as meshes look at it."""

    id: int
    process_index: int
    coords: tuple[int, int, int] = ()
    slice_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0


def a_slice(size, host=(2, 2, 1), kind="TPU v5 lite", number=0, first=0):
    """The chips of a slice; hosts are boxes, numbered along the axes."""
    grid = [n // h for n, h in zip(size, host, strict=True)]
    hosts = int(np.prod(grid))
    return [
        Chip(
            number * 1000 + i,
            first
            + int(np.ravel_multi_index([x // h for x, h in zip(at, host, strict=True)], grid)),
            at,
            slice_index=number,
            device_kind=kind,
        )
        for i, at in enumerate(np.ndindex(*size))
    ], first + hosts


V6E, V5P = "TPU v6 lite", "TPU v5p"
CASES = [
    # size of the slice, chips of a host, kind, model, hosts a copy spans
    ((4, 4, 1), (2, 2, 1), "TPU v5 lite", 4, 1),
    ((4, 4, 1), (2, 2, 1), "TPU v5 lite", 8, 2),
    ((8, 8, 1), (2, 2, 1), V6E, 4, 1),
    ((8, 8, 1), (2, 2, 1), V6E, 8, 2),
    ((8, 8, 1), (2, 4, 1), V6E, 8, 1),  # the machines of eight chips
    ((4, 4, 4), (2, 2, 1), V5P, 4, 1),
    ((4, 4, 4), (2, 2, 1), V5P, 8, 2),
    ((4, 4, 4), (2, 2, 1), V5P, 16, 4),
]  # fmt: skip


@pytest.mark.parametrize(("size", "host", "kind", "model", "spanned"), CASES)
def test_a_copy_takes_as_few_hosts_as_it_can(size, host, kind, model, spanned):
    chips, _ = a_slice(size, host, kind)
    grid = mesh.device_grid(chips, model)
    assert grid.shape == (len(chips) // model, model) and set(grid.flat) == set(chips)
    for copy in grid:
        assert len({chip.process_index for chip in copy}) == spanned
        # Neighbours: the chips of a copy fill a box of the torus.
        assert np.prod(np.ptp([chip.coords for chip in copy], axis=0) + 1) == model


def test_no_copy_lies_on_two_slices_where_one_holds_it():
    first, hosts = a_slice((4, 4, 1))
    second, _ = a_slice((4, 4, 1), number=1, first=hosts)
    for model in (1, 4, 8, 16):
        grid = mesh.device_grid([*second, *first], model)
        assert all(len({chip.slice_index for chip in copy}) == 1 for copy in grid)
    assert mesh.device_grid([*first, *second], 32).shape == (1, 32)


@pytest.mark.parametrize(
    ("counts", "model", "spanned"),
    [
        ((8, 8), 8, [1, 1]),
        ((4, 4), 8, [2]),
        ((1, 1, 1, 1), 2, [2, 2]),  # a process for each GPU
        ((6, 6), 4, [1, 1, 2]),  # each host holds one copy, and half of a third
    ],
)
def test_hosts_of_gpus(counts, model, spanned):
    of = np.repeat(np.arange(len(counts)), counts)
    gpus = [Chip(i, int(host), platform="gpu") for i, host in enumerate(of)]
    grid = mesh.device_grid(gpus, model)
    assert [len({gpu.process_index for gpu in copy}) for copy in grid] == spanned
    if max(spanned) == 1:
        assert [gpu.id for gpu in grid.flat] == list(range(len(gpus)))


TOPOLOGIES = {"v5e:4x4": (1, 2, 4, 8), "v6e:8x8": (1, 4, 8), "v5p:4x4x4": (1, 4, 8)}
DESCRIBE = """
import json, sys
from jax.experimental import topologies
from fedsafe_jax.federated import mesh
found = {}
for name, models in json.loads(sys.argv[1]).items():
    devices = topologies.get_topology_desc(name, platform="tpu").devices
    for model in models:
        made = mesh.make_mesh(devices, model)
        hosts = [len({d.process_index for d in copy}) for copy in made.devices]
        found[f"{name} {model}"] = [max(hosts), mesh.spans_hosts(made), made.size]
print(json.dumps(found))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_the_compilers_own_slices():
    variables = {
        "TPU_SKIP_MDS_QUERY": "1",
        "JAX_PLATFORMS": "cpu",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    }
    done = subprocess.run(
        [sys.executable, "-c", DESCRIBE, json.dumps(TOPOLOGIES)],
        env=os.environ | variables, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name, models in TOPOLOGIES.items():
        for model in models:
            hosts, spans, size = found[f"{name} {model}"]
            assert hosts == max(1, model // 4) and spans == (model > 4)
            assert size == np.prod([int(x) for x in name.split(":")[1].split("x")])
