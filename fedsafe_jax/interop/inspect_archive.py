"""The archive `.eval` of inspect_ai: a zip with a header and a file for each sample."""

import io
import pathlib
import zipfile

from fedsafe_jax.data import limits
from fedsafe_jax.data.examples import SourceError
from fedsafe_jax.data.packed_files import read_bytes, unpacked
from fedsafe_jax.data.text_files import decode, parse_json

HEADER, SAMPLES = "header.json", "samples/"


def read_archive(path: pathlib.Path) -> dict:
    """Reads a log out of its archive.

    Args:
      path: the file.

    Returns:
      The log, as it stands in a `.json` of it; of a sample written twice the last one.

    Raises:
      SourceError: no such archive, damaged, larger than `limits` allows, or packed in a way
        that this Python does not read, such as zstandard.
    """
    try:
        _, data = read_bytes(path)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = {one.filename: one for one in archive.infolist()}
            names = [name for name in infos if name.startswith(SAMPLES) and name.endswith(".json")]
            if HEADER not in infos:
                raise SourceError(f"{path}: no '{HEADER}' inside; the log was not finished.")
            left = min(limits.MOST_BYTES, max(limits.FREE_BYTES, limits.MOST_RATIO * len(data)))
            contents = {}
            for name in (HEADER, *names):
                with archive.open(infos[name]) as inside:
                    piece = unpacked(path, inside, len(data), left)
                left -= len(piece)
                contents[name] = piece
    except SourceError:
        raise
    except NotImplementedError:
        raise SourceError(
            f"{path}: packed as this Python does not read (zstandard: from 3.14 on); `inspect log "
            f"convert {path.name} --to json --output-dir=FOLDER` writes it as JSON."
        ) from None
    except Exception as error:  # damaged bytes raise a dozen unrelated types in zipfile
        words = " ".join(str(error).split())[:200] or type(error).__name__
        raise SourceError(f"{path}: damaged, or no log of inspect_ai ({words}).") from None
    log = _parsed(path, HEADER, contents.pop(HEADER))
    return log | {"samples": [_parsed(path, name, text) for name, text in contents.items()]}


def _parsed(path: pathlib.Path, name: str, data: bytes) -> dict:
    try:
        content = parse_json(decode(data, path))
    except SourceError:
        raise
    except ValueError as error:
        words = getattr(error, "msg", " ".join(str(error).split()))
        raise SourceError(f"{path}: '{name}' inside is not JSON ({words}).") from None
    if not isinstance(content, dict):
        raise SourceError(f"{path}: '{name}' inside must be an object.")
    return content
