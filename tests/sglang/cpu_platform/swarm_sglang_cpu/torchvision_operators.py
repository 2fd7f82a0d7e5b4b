"""Let a torchvision built for CUDA be imported beside a torch built for the CPU.

Its compiled operators cannot load there, and its Python side registers fake kernels for two of
them without asking. Declaring the two schemas is enough for the import; nobody calls them.
"""

import importlib.abc
import sys
from collections.abc import Sequence
from types import ModuleType

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class _DeclareBeforeTorchvision(importlib.abc.MetaPathFinder):
    """Finds nothing; declares the operators just before torchvision is looked for."""

    def __init__(self) -> None:
        self._library: object | None = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> None:
        if fullname != "torchvision" or self._library is not None:
            return
        import torch  # here, because this file runs in every interpreter

        if torch.version.cuda is None:
            library = torch.library.Library("torchvision", "DEF")
            for schema in _SCHEMAS:
                library.define(schema)
            self._library = library


sys.meta_path.insert(0, _DeclareBeforeTorchvision())
