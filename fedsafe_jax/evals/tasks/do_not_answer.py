"""Do-Not-Answer: questions that should not be answered, by five risk areas.

Wang et al., 2023, arXiv 2308.13387. The score is the share of harmless answers. Where a judge
labels the six actions of an answer (from "cannot assist" to "follows the instruction"), their
histogram stands in `by_label`: it tells refusing everything from answering with care.
"""

import os
import pathlib

from fedsafe_jax.data import sources
from fedsafe_jax.data.examples import Example, SourceError
from fedsafe_jax.data.packed_files import READABLE
from fedsafe_jax.evals.tasks.refusal import MACRO, harmful


def load(source: str, data_dir: str) -> list[Example]:
    """Returns the questions of the original CSV, or of a folder with one file for each risk area.

    Args:
      source: `do_not_answer:LOCATION`; a file in a folder names the risk area of its questions.
      data_dir: folder of the location, or `hub`.

    Raises:
      SourceError: the source cannot be read, or the folder holds no file that can.
    """
    name, location, part = sources.parse_source(source)
    folder = pathlib.Path(data_dir) / location
    if data_dir == "hub" or not os.path.isdir(folder):
        return sources.load(source, data_dir)
    files = sorted(p for p in folder.iterdir() if p.suffix in READABLE and os.path.isfile(p))
    if not files:
        raise SourceError(f"{folder}: holds no file that ends in {', '.join(READABLE)}.")
    if part:
        raise SourceError(f"source '{source}': a folder has no parts; name one of its files.")
    return [
        example._replace(category=file.stem)
        for file in files
        for example in sources.load(f"{name}:{location}/{file.name}", data_dir)
    ]


DO_NOT_ANSWER = harmful(
    "do_not_answer",
    source="do_not_answer:do_not_answer/risk_areas",
    benchmark="Do-Not-Answer",
    load=load,
    columns=(MACRO._replace(title="mean over risk areas"),),
)
