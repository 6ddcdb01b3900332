"""Eight simulated devices, no network, strict dtypes; a tiny random Llama folder for the models."""

import ctypes
import gc
import importlib.metadata
import os
import pathlib

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


# Bytes of a process of tests. Beyond it, what was compiled is forgotten behind a file: the
# programs of all files are many gigabytes together, for which processes have been killed.
MOST_MEMORY = 3 << 29


def _resident() -> int:
    """Bytes of this process; 0 where the system does not say."""
    pages = pathlib.Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages.exists() else 0


@pytest.fixture(scope="module", autouse=True)
def _free_memory():
    yield
    if _resident() > MOST_MEMORY:
        import jax

        jax.clear_caches()
        gc.collect()
        # What Python and the compiler freed, glibc keeps in pieces: two thirds of the process.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


@pytest.fixture(scope="session")
def packaged():
    """The packaged small model."""
    from fedsafe_jax import load_pretrained

    return load_pretrained("package:model")
