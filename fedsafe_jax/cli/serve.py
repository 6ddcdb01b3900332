"""Serves a model and adapters to clients of OpenAI's API.

    fedsafe serve --model=FOLDER [--adapter=NAME=FOLDER ...] [--port=8000] [--api_key=KEY]
    fedsafe serve --workdir=DIR --arm=ARM[,ARM...] [--seed=N] [--round=T] [--client=K]
    fedsafe serve --guard=FOLDER [--guard=NAME=FOLDER ...]
    fedsafe serve --model=FOLDER --guard=FOLDER --decoding=budget [--guardian=FOLDER]

The second form serves the base of a run under its own name, and arms by theirs; the third, alone or
with one of the others, guards. In the fourth all models answer under guards: a decoding reads the
risk that the first --guard sees. Endpoints are /v1/models, /v1/chat/completions, /v1/completions
and /v1/moderations. Only this machine can connect, unless --host says otherwise; FEDSAFE_API_KEY
takes the place of --api_key, which other users can see.
"""

import functools
import importlib.util
import os
import socket
import sys
from typing import TYPE_CHECKING, Any

from absl import flags

from fedsafe_jax.cli import guard_flags, template_flags
from fedsafe_jax.cli.command import Command, UsageError
from fedsafe_jax.cli.export import Saved
from fedsafe_jax.evals import judges
from fedsafe_jax.guarding.contract import risk_of
from fedsafe_jax.models import lora

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from jax.sharding import Mesh

    from fedsafe_jax.evals.judges.guard import Guard
    from fedsafe_jax.guarding.guarded_model import Guards
    from fedsafe_jax.guarding.spec import GuardSpec
    from fedsafe_jax.inference.language_model import LanguageModel
    from fedsafe_jax.serving.served_models import ServedModels

PACKAGES = ("starlette", "uvicorn")
KEY = "FEDSAFE_API_KEY"
GRACE_S = 10  # that requests have to end once the server is told to stop


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags."""
    text, whole = flags.DEFINE_string, flags.DEFINE_integer
    here = {"flag_values": values}
    text("model", None, "Model folder, GGUF file or Hub id; its name for clients, too.", **here)
    flags.DEFINE_multi_string("adapter", [], "NAME=FOLDER of a PEFT adapter.", **here)
    flags.DEFINE_multi_string(
        "guard",
        [],
        "[NAME=]FOLDER of a guard, or of a filter that `fedsafe train-filter` wrote, for "
        "/v1/moderations; #FORMAT behind it where its family cannot be told.",
        **here,
    )
    guard_flags.define_around(values)
    text("workdir", None, "Folder of a run, local or gs://BUCKET/FOLDER.", **here)
    flags.DEFINE_list("arm", None, "Arms of the run, such as fl,fl+cai.", **here)
    whole("seed", None, "Seed; may be left out where the run has one.", **here)
    whole("round", None, "Rounds done, from 1; the newest that is kept if left out.", **here)
    whole("client", None, "What this client sent in the round, not the server's model.", **here)
    template_flags.define(values)
    flags.DEFINE_enum(
        "dtype", "float32", ["float32", "bfloat16"], "Precision of the model.", **here
    )
    text("host", "127.0.0.1", "Address to listen at; 0.0.0.0 for any.", **here)
    whole("port", 8000, "Port; 0 for any that is free.", 0, 65535, **here)
    flags.DEFINE_list(
        "allow_host",
        [],
        "Names for the header Host beside the address and localhost; * for any. "
        "On loopback others are refused; elsewhere only where this is given.",
        **here,
    )
    text("api_key", None, f"Key that clients must send; else that of {KEY}, else none.", **here)
    whole("batch_size", 64, "Prompts computed at once.", lower_bound=1, **here)
    whole("max_length", 0, "Tokens of prompt and answer; 0: the context.", lower_bound=0, **here)
    whole("max_prompt_tokens", 1 << 20, "Tokens of a prompt.", lower_bound=1, **here)
    whole("max_body_bytes", 4 << 20, "Size of a request.", lower_bound=1024, **here)
    whole("max_queue", 1024, "Prompts that may wait.", lower_bound=1, **here)
    flags.DEFINE_float("timeout_s", 600.0, "Seconds of a request.", lower_bound=0.1, **here)


def check_packages() -> None:
    """Checks that the web framework is installed.

    Raises:
      UsageError: it is not.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"`fedsafe serve` needs {' and '.join(missing)}; pip install -e .[serve]")


def named_folders(entries: list[str]) -> dict[str, str]:
    """Returns the folder of each adapter by its name.

    Raises:
      UsageError: an entry is no NAME=FOLDER, or a name is given twice.
    """
    folders: dict[str, str] = {}
    for entry in entries:
        name, _, folder = entry.partition("=")
        if not name or not folder:
            raise UsageError(f"--adapter={entry}: expected NAME=FOLDER.")
        if name in folders:
            raise UsageError(f"--adapter={entry}: '{name}' is given twice.")
        folders[name] = folder
    return folders


def named_guards(entries: list[str], taken: set[str]) -> dict[str, str]:
    """Returns what stands behind `guard:` in a judge's spec, by the name of each guard.

    Args:
      entries: folders, each with `NAME=` before it or not; the name is else as it is written.
      taken: names of models.

    Raises:
      UsageError: an entry is no guard, or a name is there twice.
    """
    guards: dict[str, str] = {}
    for entry in entries:
        name, mark, argument = entry.partition("=")
        argument = argument if mark else entry
        if name in {*guards, *taken}:
            raise UsageError(f"--guard={entry}: '{name}' is the name of another one.")
        try:
            judges.parse(f"guard:{argument}")
            if judges.measures(f"guard:{argument}") != judges.HARM:
                raise UsageError(f"--guard={entry}: this format tells refusals, not harm.")
        except judges.JudgeError as error:
            raise UsageError(f"--guard={entry}: {error}") from None
        guards[name] = argument
    return guards


def of_run(values: flags.FlagValues) -> tuple[dict[str, lora.Adapter], Any]:
    """Returns the adapters of the arms asked for by name, and the run's config.

    The name is the arm's, with those of seed, round and client that the flags give.

    Raises:
      UsageError: there is no such run, arm, seed, round or client.
    """
    adapters: dict[str, lora.Adapter] = {}
    config = None
    for arm in values.arm or [None]:
        saved = Saved(values.workdir, arm, values.seed)
        rounds_done = saved.round(values.round)
        if values.client is None:
            factors = saved.factors(rounds_done)
        else:
            factors = saved.client_factors(rounds_done, values.client)
        name = saved.planned.id
        for flag in ("seed", "round", "client"):
            if values[flag].value is not None:
                name += f":{flag}{values[flag].value}"
        adapters[name], config = (
            lora.Adapter(factors, lora.config_of(factors, saved.lora), saved.config.model),
            saved.config,
        )
    return adapters, config


def listen(host: str, port: int) -> socket.socket:
    """Takes the port, before anything is loaded.

    Raises:
      UsageError: it is taken, or the address is not of this machine.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        why = error.strerror or error
        raise UsageError(f"--host={host} --port={port}: cannot listen there ({why}).") from None


def http_server(app: Any) -> Any:
    """Returns uvicorn's server of an application; `run(sockets=[...])` starts it."""
    import uvicorn

    settings = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="on",
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=GRACE_S,
    )
    return uvicorn.Server(settings)


def served_models(
    values: flags.FlagValues, folders: dict[str, str], mesh: "Mesh", guards: "Guards | None"
) -> "ServedModels":
    """Loads the base and all adapters.

    Args:
      values: the command's flags.
      folders: folder of each adapter by its name.
      mesh: devices.
      guards: guards that all answer under; None for none.

    Raises:
      UsageError: two have one name, or there is no such run or arm.
    """
    from fedsafe_jax import load_adapter, load_pretrained
    from fedsafe_jax.guarding.guarded_model import guard_model
    from fedsafe_jax.serving.guarded_models import GuardedModels
    from fedsafe_jax.serving.served_models import ServedModels

    adapters: dict[str, lora.Adapter] = {}
    if values.workdir:
        adapters, config = of_run(values)
        name, template = (
            config.model,
            {
                "quantization": config.quantization,
                "chat_template": config.chat_template,
                "chat_template_kwargs": config.chat_template_kwargs.to_dict(),
                "date": config.date,
            },
        )
        dtype = config.dtype
    else:
        name, template, dtype = values.model, template_flags.options(values), values.dtype
    if twice := {*adapters, name} & folders.keys():
        raise UsageError(f"--adapter: '{min(twice)}' is the name of another model.")
    adapters |= {known: load_adapter(folder) for known, folder in folders.items()}
    lm = load_pretrained(name, dtype, mesh=mesh, **template)
    sizes = {"batch_size": values.batch_size, "max_length": values.max_length}
    if guards is None:
        return ServedModels(lm, name, adapters, **sizes)
    guarded = functools.partial(guard_model, guards=guards)
    return GuardedModels(lm, name, adapters, guarded, **sizes)


def _around(values: flags.FlagValues) -> "GuardSpec":
    """Returns the guards that models answer under; the first of `--guard` reads the risk."""
    first = next(iter(named_guards(values.guard, set()).values()), "")
    is_read = bool(first) and guard_flags.reads_risk(values)
    return guard_flags.spec(values, f"guard:{first}" if is_read else "")


def _loaded(
    around: "GuardSpec",
    guards: "Mapping[str, Guard]",
    load_model: "Callable[[str], LanguageModel]",
) -> "Guards | None":
    """Loads what models answer under, but for the guard, which is loaded already."""
    if not around.label:
        return None
    if not around.guard:
        return around.load(load_model)
    first = next(iter(guards.values()))
    judge = judges.Judge(around.guard, judges.HARM, first.judge)
    return around.load(load_model, risk_of(judge))


def _check(values: flags.FlagValues) -> None:
    if values.model and values.workdir or not (values.model or values.workdir or values.guard):
        raise UsageError("--model, --workdir: give one of them, or --guard.")
    if values.adapter and not (values.model or values.workdir):
        raise UsageError("--adapter: needs --model or --workdir.")
    if values.workdir:
        given = [x for x in ("chat_template", "chat_template_kwargs", "date") if values[x].present]
        if given or values["dtype"].present:
            raise UsageError(f"--{(given or ['dtype'])[0]}: with --workdir it is the run's.")
    else:
        for flag in ("arm", "seed", "round", "client"):
            if values[flag].value is not None:
                raise UsageError(f"--{flag}: needs --workdir.")


def main(values: flags.FlagValues) -> None:
    """Loads what is served, and answers requests until it is interrupted."""
    check_packages()
    _check(values)
    folders = named_folders(values.adapter)
    named_guards(values.guard, {values.model, *folders})  # before the port is taken
    around = _around(values)
    if around.label and not (values.model or values.workdir):
        raise UsageError("--decoding, --guardian: they are around a model; give --model.")

    import jax

    from fedsafe_jax import load_pretrained
    from fedsafe_jax.evals.judges import guard
    from fedsafe_jax.federated.mesh import make_mesh, use_cores
    from fedsafe_jax.models.sharding import one_copy
    from fedsafe_jax.runtime import devices
    from fedsafe_jax.serving.admission import Limits
    from fedsafe_jax.serving.app import make_app
    from fedsafe_jax.serving.batching import Batcher
    from fedsafe_jax.serving.hosts import allowed_hosts, is_loopback

    key = values.api_key or os.environ.get(KEY, "")
    taken = listen(values.host, values.port)
    use_cores(values.batch_size)
    mesh = make_mesh(jax.local_devices())
    arguments = named_guards(values.guard, {values.model, *folders})
    load_model = functools.partial(load_pretrained, dtype=values.dtype, mesh=one_copy(mesh))
    try:
        guards = {name: guard.load(one, load_model) for name, one in arguments.items()}
    except judges.JudgeError as error:
        raise UsageError(f"--guard: {error}") from None
    models = None
    if values.model or values.workdir:
        models = served_models(values, folders, mesh, _loaded(around, guards, load_model))
        named_guards(values.guard, set(models.names))  # no guard is called as an arm is
    limits = Limits(
        values.max_body_bytes,
        values.max_prompt_tokens,
        values.timeout_s,
        api_key=key,
        hosts=allowed_hosts(values.host, tuple(values.allow_host)),
    )
    batcher = Batcher(models, values.batch_size, values.max_queue, guards=guards)
    app = make_app(models, batcher, limits, guards=guards)
    devices.announce()
    if not key and not is_loopback(values.host):
        print(
            f"warning: anybody who reaches {values.host} may ask; give --api_key or {KEY}.",
            file=sys.stderr,
        )
    host, port = taken.getsockname()[:2]
    if models:
        print(f"models: {', '.join(models.names)}")
    if around.label:
        print(f"under guards: {around.label}")
    if guards:
        print(f"guards: {', '.join(guards)}")
    print(f"serving: http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)
    http_server(app).run(sockets=[taken])


COMMAND = Command(define_flags, main)
