"""TensorBoard events of a run; written where tensorboardX (the extra `report`) is installed."""

from etils import epath


def write(workdir: epath.Path, rows: list[dict]) -> None:
    """Writes the events of every arm and seed below `tensorboard/`.

    Args:
      workdir: the run's folder.
      rows: lines of `metrics.jsonl`.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return
    if "://" in str(workdir):  # the writer knows local folders alone
        return
    for arm, seed in sorted({(row["arm"], row["seed"]) for row in rows}):
        folder = workdir / "tensorboard" / f"{arm.replace('/', '_')}_seed{seed}"
        for old in folder.glob("events.*"):
            old.unlink()
        with SummaryWriter(str(folder)) as writer:
            for row in rows:
                if (row["arm"], row["seed"]) == (arm, seed):
                    _add(writer, row)


def _add(writer, row: dict) -> None:
    for name in ("loss", "update_norm", "tokens_per_second"):
        if row[name] is not None:
            writer.add_scalar(name, row[name], row["round"])
    for name, value in row.get("eval", {}).items():
        if value is not None:
            writer.add_scalar(f"eval/{name}", value, row["round"])
