"""Save, load, share and export converted networks.

``snn.save_pretrained(folder)``, :func:`load_pretrained`, ``snn.push_to_hub(repo_id)`` and
``snn.export(example)``; see ``docs/saving.md``.
"""

from __future__ import annotations

from .exporting import export
from .loading import load_pretrained
from .saving import push_to_hub, save_pretrained

__all__ = ["export", "load_pretrained", "push_to_hub", "save_pretrained"]
