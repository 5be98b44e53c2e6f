"""Compress Mixture-of-Experts models and export them to one small machine.

The names in ``__all__`` are the Python API; everything else may change between two versions.
Importing this package imports neither torch nor transformers; a name imports what it needs when it
is first used.

>>> import tempfile
>>> import moe2edge
>>> checkpoint = moe2edge.open_checkpoint("builtin:tiny-moe")
>>> checkpoint.model.expert_counts
(16, 16, 16, 16, 16, 16)
>>> recipe = moe2edge.parse_recipe("w4-rtn", ["evaluation.samples=2"])
>>> folder = tempfile.TemporaryDirectory()
>>> out = f"{folder.name}/out"
>>> report = moe2edge.export(checkpoint, recipe, "gptq", out)
>>> report.after.nbytes < report.before.nbytes / 3
True
>>> moe2edge.load(out).config.num_experts
16
>>> profile = moe2edge.profile(out, preset="quick", gen_tokens=2)
>>> profile.metrics["ttft_ms"].n
1
>>> folder.cleanup()
"""

import os as _os
import typing as _typing

if _typing.TYPE_CHECKING:
    from moe2edge.commands.api import Compressed as Compressed
    from moe2edge.commands.api import compress as compress
    from moe2edge.commands.api import export as export
    from moe2edge.commands.api import parse_recipe as parse_recipe
    from moe2edge.commands.api import profile as profile
    from moe2edge.commands.report import Report as Report
    from moe2edge.errors import Moe2EdgeError as Moe2EdgeError
    from moe2edge.evaluation.profile.result import Profile as Profile
    from moe2edge.model.model import Model as Model
    from moe2edge.pipeline.recipe import Recipe as Recipe
    from moe2edge.progress import Reporter as Reporter
    from moe2edge.runtime.load import load as load
    from moe2edge.storage.checkpoint import Checkpoint as Checkpoint
    from moe2edge.storage.checkpoint import open_checkpoint as open_checkpoint

    __version__: str

# Module of each public name.
_MODULES = {
    "Checkpoint": "moe2edge.storage.checkpoint",
    "Compressed": "moe2edge.commands.api",
    "Model": "moe2edge.model.model",
    "Moe2EdgeError": "moe2edge.errors",
    "Profile": "moe2edge.evaluation.profile.result",
    "Recipe": "moe2edge.pipeline.recipe",
    "Report": "moe2edge.commands.report",
    "Reporter": "moe2edge.progress",
    "compress": "moe2edge.commands.api",
    "export": "moe2edge.commands.api",
    "load": "moe2edge.runtime.load",
    "open_checkpoint": "moe2edge.storage.checkpoint",
    "parse_recipe": "moe2edge.commands.api",
    "profile": "moe2edge.commands.api",
}
# Static, because type checkers and editors read it.
__all__ = [
    "Checkpoint",
    "Compressed",
    "Model",
    "Moe2EdgeError",
    "Profile",
    "Recipe",
    "Report",
    "Reporter",
    "__version__",
    "compress",
    "export",
    "load",
    "open_checkpoint",
    "parse_recipe",
    "profile",
]

# onnxruntime reports its use over the network unless this is set before it is imported.
_os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


if not _typing.TYPE_CHECKING:  # which would take every name for one of ours

    def __getattr__(name):
        """Import a public name when it is first used."""
        if name == "__version__":
            from importlib.metadata import version

            return version("moe2edge")
        if name in _MODULES:
            from importlib import import_module

            return getattr(import_module(_MODULES[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names, used or not, and those that every module has."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
