"""Text on its way to the devices: examples, readers, partition over clients, chat form, packing.

`sources.load` reads examples, `partition.partition` deals them to clients, `chat.encode` makes
token ids, and `batches.RoundBatches` packs a round's batches. The room knows nothing of devices.
"""

from fedsafe_jax.data.batches import RoundBatches
from fedsafe_jax.data.chat import Encoded, encode
from fedsafe_jax.data.examples import Choice, Example, SourceError
from fedsafe_jax.data.packing import Batch, pack
from fedsafe_jax.data.partition import PARTITIONS, PartitionError
from fedsafe_jax.data.readers import READERS

__all__ = [
    "PARTITIONS",
    "READERS",
    "Batch",
    "Choice",
    "Encoded",
    "Example",
    "PartitionError",
    "RoundBatches",
    "SourceError",
    "encode",
    "pack",
]
