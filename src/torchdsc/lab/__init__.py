"""The laboratory: corpora, tokenizers, the budget solver, training, comparison and its report."""

from importlib.util import find_spec

# Looked for, not imported: the command line shows its help before they load.
_NEEDED = ("accelerate", "jsonargparse", "matplotlib", "numpy", "peft", "rich", "tokenizers", "transformers", "yaml")
_missing = [name for name in _NEEDED if find_spec(name) is None]
if _missing:
    raise ImportError(f"torchdsc.lab needs {', '.join(_missing)}: pip install 'torchdsc[lab]'")
