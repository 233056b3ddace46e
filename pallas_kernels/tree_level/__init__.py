from pallas_kernels.tree_level.api import grow_level as grow_level
from pallas_kernels.tree_level.reference import Levels as Levels
from pallas_kernels.tree_level.reference import empty_levels as empty_levels
