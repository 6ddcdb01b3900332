"""The exceptions that end a command as one line without a traceback, and that line."""


def one_line(error: BaseException) -> str:
    """Returns an error's message as one line of printable text.

    Messages quote file names and data, which may hold line breaks or a terminal's control codes.
    """
    text = " ".join(str(error).split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def storage_errors() -> tuple[type[Exception], ...]:
    """Returns the exception types of what may answer later: one line, not wrong input.

    A disk, a bucket, the endpoint of a judge: the same command goes on when it answers.
    """
    from fedsafe_jax.evals.judges.endpoint import EndpointError
    from fedsafe_jax.whole_files import StorageError

    return (EndpointError, StorageError)


def input_errors() -> tuple[type[Exception], ...]:
    """Returns the exception types of wrong input: reported as one line, without a traceback.

    Those of `storage_errors` are among them, since the line is the same; their exit code is not.
    """
    from fedsafe_jax.aot.targets import TargetError
    from fedsafe_jax.attacks.contract import AttackError
    from fedsafe_jax.cai.constitution import ConstitutionError
    from fedsafe_jax.data.chat_template import ChatTemplateError
    from fedsafe_jax.data.examples import SourceError
    from fedsafe_jax.data.partition import PartitionError
    from fedsafe_jax.evals.judges.contract import JudgeError
    from fedsafe_jax.evals.task import TaskError
    from fedsafe_jax.filters.protocol import FilterError
    from fedsafe_jax.guarding.contract import GuardError
    from fedsafe_jax.models.hub import ModelError
    from fedsafe_jax.registry import UnknownNameError
    from fedsafe_jax.runtime.cluster import ClusterError
    from fedsafe_jax.whole_files import WorkdirError

    data = ConstitutionError, PartitionError, SourceError, TaskError, WorkdirError
    return (
        *storage_errors(),
        *data,
        AttackError,
        ChatTemplateError,
        ClusterError,
        FilterError,
        GuardError,
        JudgeError,
        ModelError,
        TargetError,
        UnknownNameError,
    )
