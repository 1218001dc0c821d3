"""One file a package; importing this fills the registry. Packages themselves are imported when a layer is prepared."""

from . import ours, torch, bitsandbytes, torchao, onnxruntime, openvino, ggml  # noqa: F401, I001  (the tables' order)
