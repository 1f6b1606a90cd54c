"""compose: what belongs to a network but is not in its file becomes part of the graph, before it is partitioned.

Every function takes a model and gives a new one; the model given stays as it is.  All nodes are ONNX's own, so the
whole is partitioned, verified and saved like any other model.
"""

from partitioner.compose.channels import equal_counts, input_channel_axis, part_names, with_channels_split
from partitioner.compose.copies import averaged, with_flips
from partitioner.compose.outputs import with_output_ops
from partitioner.compose.preprocess import with_preprocess
from partitioner.compose.wrapping import Around, Wrapping, compose

__all__ = ["Around", "Wrapping", "averaged", "compose", "equal_counts", "input_channel_axis", "part_names",
           "with_channels_split", "with_flips", "with_output_ops", "with_preprocess"]
