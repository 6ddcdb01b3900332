"""What `commands.Run` has imported before it begins, in the manner of the command line."""

import importlib

from fedsafe_jax.runtime import libraries

libraries.leave_out_torch()
for name in ("fedsafe_jax.experiment", "transformers.models.auto.configuration_auto"):
    importlib.import_module(name)
importlib.import_module("transformers").AutoConfig.for_model("llama")
