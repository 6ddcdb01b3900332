"""The code of `wire.REFUSALS` that each error of a site is sent as."""

from fedsafe_jax.cai.constitution import ConstitutionError
from fedsafe_jax.config import ConfigError
from fedsafe_jax.data.chat_template import ChatTemplateError
from fedsafe_jax.data.examples import SourceError
from fedsafe_jax.evals.judges import JudgeError
from fedsafe_jax.evals.task import TaskError
from fedsafe_jax.filters.protocol import FilterError
from fedsafe_jax.flower.site_policy import PolicyError, SettingsError
from fedsafe_jax.flower.wire import WireError
from fedsafe_jax.models.hub import ModelError
from fedsafe_jax.registry import UnknownNameError
from fedsafe_jax.whole_files import WorkdirError

# In order: a class comes before its bases.
CODES: dict[type[Exception], str] = {
    SettingsError: "settings",
    PolicyError: "policy",
    ConfigError: "config",
    UnknownNameError: "config",
    ConstitutionError: "config",
    FilterError: "filter",
    SourceError: "data",
    TaskError: "data",
    JudgeError: "config",
    ModelError: "model",
    ChatTemplateError: "model",
    WireError: "message",
    WorkdirError: "storage",
    OSError: "storage",
}


def code_of(error: BaseException) -> str:
    """Returns the code of an error: the first of `CODES` that it is, else "internal"."""
    return next((code for kind, code in CODES.items() if isinstance(error, kind)), "internal")
