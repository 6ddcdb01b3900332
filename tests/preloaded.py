"""What `commands.Run` has imported before it begins, in the manner of the command line."""

from fedsafe_jax.runtime import libraries

libraries.leave_out_torch()

import transformers  # noqa: E402

import fedsafe_jax.experiment  # noqa: E402, F401

transformers.AutoConfig.for_model("llama")  # imported on first use
