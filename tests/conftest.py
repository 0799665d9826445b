"""Makes the pack importable as `pladis_pack`, without its root on sys.path: there `nodes` would shadow ComfyUI's."""

from __future__ import annotations

import sys
import types
from pathlib import Path

ROOT = Path(__file__).parents[1]

package = types.ModuleType("pladis_pack")
package.__path__ = [str(ROOT)]
sys.modules.setdefault("pladis_pack", package)
