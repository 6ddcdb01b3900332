"""Eight simulated devices, no network, strict dtypes; a tiny random Llama folder for the models."""

import importlib.metadata
import os

# The compiler's costly passes make nothing here faster, and compiling is most of the time.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# jaxlib 0.11 has the newer code generator alone, and ends a process that is given this flag.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    QUICK += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {QUICK}"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest  # noqa: E402
import transformers  # noqa: E402, F401  # with torch: a command that is called here would go without

# Minutes each; begun first, so that two processes that share the files end together.
LONG = (
    "flower survival guard classifier main launch notebook processes clients constitutional"
).split()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)


@pytest.fixture(scope="session")
def packaged():
    """The packaged small model."""
    from fedsafe_jax import load_pretrained

    return load_pretrained("package:model")
